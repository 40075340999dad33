"""What a rank is at, for others to see, and what ends a run that hangs.

Each rank writes heartbeats/rank00000.json every few seconds. One whose loop makes no step within `log.hang_after`
seconds writes the stacks of all its threads to stacks/ and says so in stacks/hang.json; the others see that and write
theirs; one of them names the rank that is to blame, and all end with 70. Threads do all of it: the loop may be stuck
anywhere that lets go of the interpreter: in a collective, in a read.
"""

import contextlib
import faulthandler
import json
import os
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeAlias

from trainer.config import Config
from trainer.errors import HUNG, shown, to_stderr
from trainer.parallel import place
from trainer.parallel.ranks import Ranks

PERIOD = 5.0  # seconds from one file of a rank to the next
RANKS_A_SECOND = 50.0  # files that all ranks together write at most: a shared file system has others to serve
UNWRITTEN = 3  # files in a row that cannot be written before that is said: a disk that is full ends the run anyway
TICK = 1.0  # seconds between looks at the clock
SLOW = 3  # times hang_after that may pass before the first update, which compiles, and in a save
FAREWELL = 20.0  # seconds that the stacks of all ranks may take, at least
LINGER = 3.0  # seconds that the others stay when all stacks are there
DISK = 60.0  # seconds after which the file system counts as hung too
At: TypeAlias = Literal["meet", "data", "step", "evaluate", "pictures", "save", "end"]
SELDOM = ("evaluate", "pictures", "save", "end")  # written when they begin; what every update passes is not
DOING = {
    "meet": "building and restoring",
    "data": "waiting for data",
    "step": "in an update",
    "evaluate": "in an evaluation",
    "pictures": "drawing pictures",
    "save": "saving",
    "end": "ending",
}


class Heartbeat:
    """`with Heartbeat(config, ranks) as heart:` then `heart.at("step", images)` wherever all ranks pass alike.

    `at` costs a microsecond: it leaves a note, and the threads look."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        run = config.run
        self.rank, self.world = ranks.rank, ranks.world
        self.images, self.total, self.hang_after = 0, config.updates * config.batch, config.log.hang_after
        self.speed: float | None = None
        """Images a second, over all ranks."""
        self.save_seconds = _read(_path(run, 0)).get("save_seconds")
        """Of the last save, perhaps in an earlier start."""
        self._run, self._started = run, time.time()
        self._start = float(ranks.first(self._started))  # one for all ranks: tells this start's files from others'
        self._at: At = "meet"
        self._since, self._passed, self._beats, self._updates = self._started, 0, 0, 0
        self._unwritten, self._looked = 0, 0.0
        self._ending, self._over, self._news = threading.Event(), threading.Event(), threading.Event()
        self._period = max(PERIOD, self.world / RANKS_A_SECOND)
        self._farewell = max(FAREWELL, 3 * self._period)
        self._threads = [threading.Thread(target=self._write_on, name="heartbeat", daemon=True)]
        if self.hang_after > 0:
            self._threads.append(threading.Thread(target=self._watch, name="watchdog", daemon=True))

    # ---------------------------------------------------------------- the loop's
    def at(self, what: At, images: int | None = None) -> None:
        """All ranks pass here, in the same order: whoever has passed less often is behind."""
        self._at, self._since, self._beats = what, time.time(), 0
        self._passed += 1
        if images is not None:
            self._updates += what == "step"
            self.images = images
        if what in SELDOM:
            self._news.set()

    def beat(self) -> None:
        """Progress within what the rank is at."""
        self._beats += 1

    def doing(self) -> str:
        """For a message: `in an update, at 12,800 images`."""
        return f"{DOING[self._at]}, at {self.images:,} images"

    def __enter__(self) -> "Heartbeat":
        if self.rank == 0:
            _tidy(self._run, self.world)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._ending.is_set():  # a peer has left; it is the hang that ends us, and not the connection that it closed
            time.sleep(DISK + self._farewell + LINGER)
        self._over.set()
        self._news.set()
        for thread in self._threads:
            thread.join(TICK)

    # ---------------------------------------------------------------- the writer
    def _write_on(self) -> None:
        while not self._over.is_set():
            self._write()
            self._news.wait(self._period)
            self._news.clear()
        self._write()

    def _write(self) -> None:
        told = {
            "rank": self.rank,
            "host": place.host(),
            "pid": os.getpid(),
            "job": place.job(),
            "restart": place.restart(),
            "time": time.time(),
            "started": self._started,
            "start": self._start,
            "images": self.images,
            "total": self.total,
            "at": self._at,
            "since": self._since,
            "passed": [self._passed, self._beats],
            "images_per_second": self.speed,
            "save_seconds": self.save_seconds,
        }
        path = _path(self._run, self.rank)
        aside = path.with_name(f".{path.name}")
        try:
            path.parent.mkdir(exist_ok=True)
            aside.write_text(json.dumps(told), encoding="utf-8")
            aside.replace(path)  # not flushed: what matters is that others see it, not that it outlives the machine
            self._unwritten = 0
        except OSError as error:
            self._unwritten += 1
            if self._unwritten == UNWRITTEN:
                to_stderr(f"tandem: rank {self.rank}: no heartbeat can be written: {shown(str(error))}")

    # ---------------------------------------------------------------- the watchdog
    def _watch(self) -> None:
        seen, quiet, last = (0, 0), 0.0, time.monotonic()
        while not self._over.wait(min(TICK, self.hang_after / 4)):
            now = time.monotonic()
            quiet += min(now - last, 2 * TICK)  # a process that was suspended has not hung meanwhile
            last = now
            if seen != (now_seen := (self._passed, self._beats)):
                seen, quiet = now_seen, 0.0
            if quiet > self._limit() or self._called():
                self._ending.set()
                end = threading.Thread(target=self._end, args=(quiet,), daemon=True)
                end.start()
                end.join(DISK + self._farewell + LINGER)
                to_stderr(f"{self._self(quiet)}; nothing more could be found out: {self._run} does not answer")
                os._exit(HUNG)

    def _limit(self) -> float:
        slow = self._at == "save" or self._updates == 0
        return self.hang_after * (SLOW if slow else 1)

    def _called(self) -> bool:
        """Whether another rank has found that the run hangs. Its file is looked for as often as ours is written."""
        now = time.monotonic()
        if now - self._looked < min(self._period, self.hang_after / 4):
            return False
        self._looked = now
        return _read(self._run / "stacks" / "hang.json").get("start") == self._start

    def _end(self, quiet: float) -> None:
        """Stacks of all ranks that live, a line from one of them, and the end of the process."""
        folder = self._run / "stacks"
        folder.mkdir(exist_ok=True)
        first = self._call(folder / "hang.json")
        self._write()
        with (folder / f"rank{self.rank:05d}.txt").open("w", encoding="utf-8") as file:
            file.write(f"rank {self.rank} of {self.world}, process {os.getpid()} on {place.host()}: {self.doing()}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        until, missing = time.monotonic() + self._farewell, list(range(self.world))
        while time.monotonic() < until and (missing := [rank for rank in missing if self._owes_stacks(rank)]):
            time.sleep(max(0.1, len(missing) / RANKS_A_SECOND))
        if first:  # now that each that lives has said anew what it is at
            to_stderr(self._verdict([_read(_path(self._run, rank)) for rank in range(self.world)], quiet))
        else:
            time.sleep(LINGER)  # who is gone before the verdict would be blamed
        os._exit(HUNG)

    def _call(self, path: Path) -> bool:
        """Tells the others; whether we are the first to do so."""
        aside = path.with_name(f".hang-{self.rank}.json")
        aside.write_text(json.dumps({"start": self._start, "rank": self.rank, "time": time.time()}), encoding="utf-8")
        try:
            os.link(aside, path)  # fails where there is one, on NFS too
            return True
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            aside.replace(path)
            return True
        finally:
            aside.unlink(missing_ok=True)

    def _owes_stacks(self, rank: int) -> bool:
        """Whether it lives and has not written them; those of other starts were set aside, see _tidy."""
        path = self._run / "stacks" / f"rank{rank:05d}.txt"
        if path.exists() and path.stat().st_size > 0:
            return False
        return _silence(_read(_path(self._run, rank)), self._start, self._period) is None

    def _self(self, quiet: float) -> str:
        return f"tandem: error: rank {self.rank} made no progress for {quiet:.0f} s (log.hang_after), {self.doing()}"

    def _verdict(self, told: Sequence[dict[str, Any]], quiet: float) -> str:
        """On one line: who is to blame."""
        blamed = blame(told, start=self._start, period=self._period)
        where = f"stacks of all ranks are in {self._run / 'stacks'}"
        return shown(f"{self._self(quiet)}: {blamed}; {where}")


def blame(told: Sequence[dict[str, Any]], *, start: float, period: float) -> str:
    """What the heartbeats of all ranks say about who holds up the others. {}: there is none."""
    silent = {rank: why for rank, one in enumerate(told) if (why := _silence(one, start, period)) is not None}
    if silent:
        rank = next(iter(silent))
        return f"{_who(rank, told[rank])} {silent[rank]}{_more(len(silent) - 1)}"
    if len(told) == 1:
        return "it is the only rank"
    passed = [list(one["passed"]) for one in told]
    behind = [rank for rank, count in enumerate(passed) if count == min(passed)]
    if len(behind) == len(told):
        return f"no rank is behind: all are {DOING[told[0]['at']]}"
    one = told[behind[0]]
    seconds = max(0.0, float(one["time"]) - float(one["since"]))
    doing = f"is behind: {DOING[one['at']]} for {seconds:.0f} s, at {one['images']:,} images"
    return f"{_who(behind[0], one)} {doing}{_more(len(behind) - 1)}"


def _who(rank: int, one: dict[str, Any]) -> str:
    return f"rank {rank}" + (f" (process {one['pid']} on {one['host']})" if one else "")


def _more(count: int) -> str:
    return f", and {count} more" if count else ""


def _silence(one: dict[str, Any], start: float, period: float) -> str | None:
    """Why a rank counts as gone, or None: it gives signs of life."""
    if one.get("start") != start:
        return "never gave a sign of life"
    quiet = time.time() - float(one["time"])
    if one["host"] == place.host():
        try:
            state = Path(f"/proc/{one['pid']}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return "is gone: there is no such process any more" if Path("/proc/self").exists() else None
        if state in "Tt":
            return f"is stopped (SIGSTOP or a debugger), without a sign of life for {quiet:.0f} s"
        if state in "ZX":
            return "is gone: its process has ended"
    if quiet > 3 * period + PERIOD:
        return f"gives no sign of life for {quiet:.0f} s: its process is stuck or gone, or its machine is"
    return None


def _path(run: Path, rank: int) -> Path:
    return run / "heartbeats" / f"rank{rank:05d}.json"


def _read(path: Path) -> dict[str, Any]:
    """{} for what is not there or not ours."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _tidy(run: Path, world: int) -> None:
    """Of what earlier starts left the newest stacks stay, as stacks.before/, and the heartbeats of ranks that there are
    now."""
    if (run / "stacks").exists():
        shutil.rmtree(run / "stacks.before", ignore_errors=True)
        (run / "stacks").rename(run / "stacks.before")
    for path in (run / "heartbeats").glob("rank*.json"):
        with contextlib.suppress(ValueError):
            if int(path.stem.removeprefix("rank")) >= world:
                path.unlink(missing_ok=True)

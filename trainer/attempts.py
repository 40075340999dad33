"""Starts of a run and how they ended: what ends a crash loop, and what keeps a run that is done from being done again.

    attempts.jsonl       a line a start: time, job, restart, images (where it began), world, host, config (a digest),
                         and `code` once it ended as it should: 0, 2, 75, 130, 143
    crashes/rank*.json   what ended a rank last, if it could say so: its traceback
    requeue              asks whoever started the run to start it again; its text is why
    failed               why nobody should, before a person has looked
    finished             images, config, last line and figures of a run that is done

Rank 0 writes, inside the RunLock, but for crashes/.
"""

import hashlib
import json
import os
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from trainer import checkpoint
from trainer import config as configuration
from trainer.build import LOCAL
from trainer.config import Config
from trainer.durable import entries, flush, write_text
from trainer.errors import FAILED, INTERRUPTED, USER_MISTAKE, Ending, code_of
from trainer.parallel import place
from trainer.parallel.ranks import Ranks

ROW = 3
"""Starts in a row of one config, at the same images, that are a crash loop: those before did not end as they should."""


def refuse_failed(run: Path) -> None:
    """Ending where the run is marked: on every rank alike, before they meet."""
    path = run / "failed"
    if path.exists():
        reason = (path.read_text(encoding="utf-8").splitlines() or ["no reason given"])[0]
        raise Ending(f"run: {run} is marked failed: {reason}; read {path}, mend it, and start again without it", FAILED)


def finished(config: Config) -> str | None:
    """The last line of a run of this config that is done, or None. Asked by every rank, before they meet."""
    try:
        done = json.loads((config.run / "finished").read_text(encoding="utf-8"))
        images, line = int(done["images"]), str(done["line"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    whole = config.run / checkpoint.FOLDER / f"{images:012d}" / "manifest.json"
    again = config.checkpoint.resume in ("auto", "must")
    return line if again and whole.exists() and done.get("config") == _alike(config) else None


def conclude(config: Config, images: int, line: str, figures: Mapping[str, float]) -> None:
    """figures: of the last evaluation."""
    told = {"images": images, "config": _alike(config), "line": line, "figures": dict(figures)}
    _write(config.run / "finished", json.dumps(told, indent=1))


def ask_again(run: Path, reason: str) -> None:
    """The marker of a run that wants another start; its checkpoint must be committed."""
    _write(run / "requeue", reason)


class Attempt:
    """`with Attempt(config, ranks) as attempt:` one start, on every rank. Ending where it is one too many."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.run, self.ranks = config.run, ranks
        self.code: int | None = 0
        """What the process will return, where no error says otherwise."""
        self._path = self.run / "attempts.jsonl"
        self._digest = hashlib.sha256(json.dumps(_alike(config)).encode()).hexdigest()[:12]
        self._size = 0
        self._line: dict[str, Any] = {}
        self._restored = False

    def __enter__(self) -> "Attempt":
        self.ranks.together(self._begin)
        return self

    def restored(self, images: int) -> None:
        """Where the run really goes on: the newest checkpoint may have been damaged."""
        self._restored = True
        if self.ranks.rank == 0:
            (self.run / "finished").unlink(missing_ok=True)  # this one goes on
            if self._line["images"] != images:
                self._rewrite(images=images)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        code = self.code if error is None else INTERRUPTED if kind is KeyboardInterrupt else code_of(error)
        if error is not None and isinstance(error, Exception):
            self._crashed(error, code)
        if self.ranks.rank > 0:
            return
        if code == USER_MISTAKE and not self._restored:
            os.truncate(self._path, self._size)  # refused: it was no start
        elif error is None or code == USER_MISTAKE:
            self._rewrite(code=code)

    # ---------------------------------------------------------------- rank 0
    def _begin(self) -> None:
        self.run.mkdir(parents=True, exist_ok=True)
        (self.run / "requeue").unlink(missing_ok=True)  # nobody took it: we are the start that it asks for
        images = next((int(path.name) for path in reversed(_checkpoints(self.run))), 0)
        rows = [row for row in _rows(self._path) if "images" in row and "time" in row]
        before = [row for row in rows if not _ended_by_slurm(self.run, row)]
        self._line = {
            "time": time.time(),
            "job": place.job(),
            "restart": place.restart(),
            "images": images,
            "world": self.ranks.world,
            "host": place.host(),
            "config": self._digest,
        }
        self._append()
        last = before[1 - ROW :]
        same = [row["images"] == images and row.get("config") == self._digest and "code" not in row for row in last]
        if len(same) == ROW - 1 and all(same):
            self._rewrite(code=FAILED)  # so that the start after a person has looked is the first of a new row
            reason = f"{ROW} starts in a row at {images:,} images, and none came to the next checkpoint"
            _write(self.run / "failed", f"{reason}\n\n{self._last_crash(float(last[-1]['time']))}")
            raise Ending(
                f"crash loop: {reason}; the last error is in {self.run / 'failed'}; mend it, and start again without "
                "that file",
                FAILED,
            )

    def _append(self) -> None:
        with self._path.open("ab+") as file:
            self._size = file.tell()
            if self._size:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # the machine was lost while it wrote
                    file.write(b"\n")
                    self._size += 1
            file.write(f"{json.dumps(self._line)}\n".encode())
            file.flush()
            os.fsync(file.fileno())

    def _rewrite(self, **more: object) -> None:
        """The last line, with `more` in it."""
        self._line |= more
        os.truncate(self._path, self._size)
        self._append()

    def _last_crash(self, since: float) -> str:
        """What the rank that crashed first in the last start said."""
        found = []
        for path in entries(self.run / "crashes"):
            try:
                told = json.loads(path.read_text(encoding="utf-8"))
                found.append((float(told["time"]), f"rank {told['rank']} on {told['host']}:\n{told['text']}"))
            except (ValueError, KeyError, TypeError):
                continue
        late = sorted(one for one in found if one[0] >= since)
        return late[0][1] if late else "no rank left a traceback: killed from outside, or a machine was lost; see logs/"

    # ---------------------------------------------------------------- every rank
    def _crashed(self, error: Exception, code: int | None) -> None:
        told = {
            "time": time.time(),
            "rank": self.ranks.rank,
            "host": place.host(),
            "job": place.job(),
            "code": code,
            "text": "".join(traceback.format_exception(error)),
        }
        try:
            path = self.run / "crashes" / f"rank{self.ranks.rank:05d}.json"
            path.parent.mkdir(exist_ok=True)
            _write(path, json.dumps(told, indent=1))
        except OSError:
            return  # the error itself is reported, and may be that of a full disk


def _ended_by_slurm(run: Path, row: Mapping[str, Any]) -> bool:
    """Whether an earlier start of this job was ended from outside: it says nothing about the run. By the account of the
    batch script (launch.after), or because it gives none: it went with its node."""
    if row.get("job") is None or row["job"] != place.job() or not (run / "submit" / "job.json").exists():
        return False
    ends = [end for end in _rows(run / "submit" / "ends.jsonl") if end.get("raw") == row["job"]]
    mine = [end for end in ends if end.get("restart") == row.get("restart")]
    return not mine or bool(mine[-1].get("outside"))


def _alike(config: Config) -> dict[str, Any]:
    """The config without what each machine may have its own way."""
    flat = configuration.flatten(configuration.to_tree(config))
    return {key: value for key, value in flat.items() if not f"{key}.".startswith(tuple(f"{one}." for one in LOCAL))}


def _checkpoints(run: Path) -> list[Path]:
    return [path for path in entries(run / checkpoint.FOLDER) if checkpoint.FINAL.fullmatch(path.name)]


def _rows(path: Path) -> list[Mapping[str, Any]]:
    """The lines that can be read."""
    found: list[Mapping[str, Any]] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            found += [row] if isinstance(row, dict) else []
    return found


def _write(path: Path, text: str) -> None:
    """Atomically, and flushed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}")
    write_text(aside, f"{text}\n")
    aside.replace(path)
    flush(path.parent)

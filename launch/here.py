"""The cluster `local`: submitted runs on this machine, without SLURM, in processes that outlive the terminal.

One process watches over the runs of a submission: `python -m launch.here RUN/submit/queue.json`, in a session of its
own. It starts `tandem train` for so many of them at a time, starts a run again by the rules of launch/after.py, and
looks for RUN/submit/cancel. It writes RUN/submit/process.json (what trains now) and ends.jsonl (how starts ended).
"""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from launch import folders, local, process
from launch.after import DONE, End, Policy, Verdict, judge
from launch.cluster import LocalConfig
from launch.rank import STRAY
from trainer.errors import INTERRUPTED, one_line

LOOK = 0.2  # seconds between looks at the runs
PAUSE = 2.0  # seconds before a run is started again
MODULE = "import runpy, sys; sys.path[0] = sys.argv.pop(1); runpy.run_module('launch.here', None, '__main__', True)"
"""`python -m launch.here` of the folder in the first argument."""


@dataclass(frozen=True)
class LocalJob:
    """One run, or all of a sweep, as this machine is to train them. All paths are absolute."""

    cluster: LocalConfig
    run: Path
    """Folder of the run, or of the sweep."""
    folder: Path
    """Where it is submitted."""
    elements: tuple[Path, ...] = ()
    """Runs of a sweep, in their order."""
    at_once: int = 1
    """Runs of a sweep that train at the same time."""
    into: str = "submit"
    """Folder in the run's that holds what is submitted."""

    @property
    def submit(self) -> Path:
        return self.run / self.into

    @property
    def code(self) -> Path:
        return self.submit / "code"

    @property
    def processes(self) -> int:
        return self.cluster.processes or max(1, local.visible_gpus())

    def check(self) -> None:
        """Nothing that this machine could lack."""

    def script(self) -> str:
        """What would be started, for a person to read."""
        runs = self.elements or (self.run,)
        return "\n".join(shlex.join(["tandem", "train", *self.arguments(run)]) for run in runs)

    def arguments(self, run: Path) -> list[str]:
        return [str(run / "submit" / "config.yaml"), "--processes", str(self.processes)]

    def send(self) -> dict[str, Any]:
        """Starts the process that watches; for job.json: its name, and which process it is."""
        runs = self.elements or (self.run,)
        name = f"local-{time.time_ns() // 1_000_000}"
        queue = {
            "job": name,
            "folder": str(self.folder),
            "runs": list(map(str, runs)),
            "processes": self.processes,
            "requeues": self.cluster.requeues,
            "at_once": self.at_once,
        }
        folders.write_json(self.submit / "queue.json", queue)
        for run in runs:
            (run / "logs").mkdir(exist_ok=True)
        kept = {name: value for name, value in os.environ.items() if name not in STRAY}
        paths = [str(self.code), *(path for path in kept.get("PYTHONPATH", "").split(os.pathsep) if path)]
        variables = {
            **kept,
            **{name: str(value) for name, value in self.cluster.environment.items()},
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
        }
        with (self.submit / "queue.log").open("ab") as log:
            started = subprocess.Popen(
                [sys.executable, "-c", MODULE, str(self.code), str(self.submit / "queue.json")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=variables,
                start_new_session=True,
            )
        told = process.identity(started.pid)
        started.returncode = 0  # it is nobody's child once we have ended: no warning about one that still runs
        return {"kind": "local", "job": name, "process": told, "processes": self.processes}


# ---------------------------------------------------------------- the process that watches
@dataclass
class Watched:
    """A run that waits or trains."""

    run: Path
    slot: int = 0
    starts: int = 0
    not_before: float = 0.0
    child: "subprocess.Popen[bytes] | None" = None
    told: list[int] = field(default_factory=list)
    """Signals that it was sent for a cancel."""

    def word(self) -> str | None:
        """What `tandem cancel` left: save, at once."""
        return folders.first_line(self.run / "submit" / "cancel")


@dataclass
class Queue:
    job: str
    folder: Path
    processes: int
    requeues: int
    at_once: int
    waiting: deque[Watched]
    running: list[Watched] = field(default_factory=list)
    ended_by: list[int] = field(default_factory=list)
    """Signals that came to this process: the machine is shut down, most likely."""

    def work(self) -> None:
        while self.waiting or self.running:
            for one in list(self.running):
                with self._alone(one):
                    self._look_after(one)
            for one in [one for one in self.waiting if one.word() is not None or self.ended_by]:
                self.waiting.remove(one)
                reason = "cancelled" if one.starts else "cancelled before it began"
                with self._alone(one):
                    self._end(one, Verdict(INTERRUPTED, reason))
            free = self.at_once - len(self.running)
            for one in [one for one in self.waiting if time.monotonic() >= one.not_before][: max(0, free)]:
                self.waiting.remove(one)
                with self._alone(one):
                    self._start(one)
            time.sleep(LOOK)

    @contextlib.contextmanager
    def _alone(self, one: Watched) -> Iterator[None]:
        """What the system refuses of one run (its folder is gone, its disk is full) ends that run and no other."""
        try:
            yield
        except OSError as error:
            print(f"tandem: {one.run}: {one_line(error)}; it is given up", flush=True)
            if one.child is not None and one.child.poll() is None:
                one.child.terminate()
            self.running[:] = [other for other in self.running if other is not one]

    def _start(self, one: Watched) -> None:
        one.slot = min(set(range(self.at_once)) - {other.slot for other in self.running})
        one.starts += 1
        with contextlib.suppress(FileNotFoundError):
            (one.run / "requeue").unlink()
        words = ["train", str(one.run / "submit" / "config.yaml"), "--processes", str(self.processes)]
        log = one.run / "logs" / f"{self.job}_0.log"
        with log.open("ab") as file:
            begun = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"tandem: job {self.job}, start {one.starts}, {self.processes} ranks, {begun}\n".encode())
            file.flush()
            one.child = subprocess.Popen(
                [*local.python("launch.cli"), *words],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env={**os.environ, **self._share(one.slot)},
                start_new_session=True,
            )
        told = process.identity(one.child.pid) | {"time": time.time()}
        folders.write_json(one.run / "submit" / "process.json", told)
        self.running.append(one)

    def _share(self, slot: int) -> dict[str, str]:
        """Cores and GPUs of one of several runs at a time."""
        shared = local.thread_environment(processes=self.at_once * self.processes)
        gpus = local.visible_gpus()
        if self.at_once > 1 and gpus >= self.at_once * self.processes:
            listed = os.environ.get("CUDA_VISIBLE_DEVICES")
            names = [name.strip() for name in listed.split(",")] if listed else [str(number) for number in range(gpus)]
            shared["CUDA_VISIBLE_DEVICES"] = ",".join(names[slot * self.processes : (slot + 1) * self.processes])
        return shared

    def _look_after(self, one: Watched) -> None:
        assert one.child is not None
        code, word = one.child.poll(), one.word()
        if code is None:
            wanted = 2 if word == "at once" else 1 if word is not None or self.ended_by else 0
            if len(one.told) < wanted:
                one.child.send_signal(signal.SIGINT)  # saves; a second one ends it
                one.told.append(signal.SIGINT)
            return
        self.running.remove(one)
        marker = folders.first_line(one.run / "requeue")
        end = End(code if code >= 0 else 128 - code)
        told = "cancelled" if one.told and end.code != DONE else ""
        verdict = judge(one.run, end, marker=marker, told=told, left=None, policy=Policy(self.requeues, None, 0))
        self._end(one, verdict)
        if verdict.again is not None:
            one.not_before = time.monotonic() + PAUSE
            self.waiting.appendleft(one)

    def _end(self, one: Watched, verdict: Verdict) -> None:
        line = {"time": time.time(), "job": self.job, "restart": max(0, one.starts - 1), "code": verdict.code}
        line |= {"reason": verdict.reason, "again": verdict.again}
        with (one.run / "submit" / "ends.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        again = "; starts again" if verdict.again else ""
        with (one.run / "logs" / f"{self.job}.log").open("a", encoding="utf-8") as file:
            file.write(f"tandem: job {self.job}, start {one.starts}: {verdict.reason}{again}\n")


def main(argv: list[str]) -> int:
    given = folders.read_json(Path(argv[0]))
    queue = Queue(
        job=given["job"],
        folder=Path(given["folder"]),
        processes=given["processes"],
        requeues=given["requeues"],
        at_once=given["at_once"],
        waiting=deque(Watched(Path(run)) for run in given["runs"]),
    )

    def note(number: int, _frame: FrameType | None) -> None:
        queue.ended_by.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    queue.work()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

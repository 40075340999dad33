"""Peers in processes of their own, that take their turns when they are told to."""

import contextlib
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType

from tools.bench.data.peer import MODULES
from tools.bench.data.sets import Made


class Other(contextlib.AbstractContextManager["Other"]):
    """A running `tools.bench.data.peer`. ValueError with its last words where it ends too early."""

    def __init__(self, name: str, made: Made, batch: int, work: Path, *, decoder: str) -> None:
        self._name = name
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  closed at the end of the context
        argv = ["env", "DISABLE_VERSION_CHECK=1"]  # else litdata asks PyPI
        argv += [sys.executable, "-m", "tools.bench.data.peer", name, made.kind.field, str(batch)]
        self._process = subprocess.Popen(
            [*argv, str(made.folder), str(work), decoder],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True,
        )  # fmt: skip

    def turn(self, count: int) -> float:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{count}\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            self._process.wait()
            self._said.seek(0)
            last = self._said.read().decode(errors="replace").strip().splitlines()
            raise ValueError(f"{self._name}: its process ended: {last[-1] if last else 'it said nothing'}")
        return float(answer.removeprefix("@ "))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate(timeout=None if kind is None else 0.1)
        self._process.kill()
        self._process.wait()
        self._said.close()


def installed(name: str) -> bool:
    if importlib.util.find_spec(MODULES[name]) is not None:
        return True
    print(f"{name}: not installed, left out")
    return False

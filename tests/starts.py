"""Real starts of the trainer and of the `tandem` command in processes that tests may kill.

A fork server has imported torch once, so that a start costs tens of milliseconds and not seconds. A forked start has
its own process, signals, exit code, stdout and stderr; the ranks of one meet over gloo as those of torchrun do.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NoReturn

from trainer import signals
from trainer.errors import boundary

ROOT = Path(__file__).parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.starts_preload"])
SHORT = ("images=640", "log.every=64", "log.evaluate_images=64", "log.evaluate_every=0", "checkpoint.every=320")
"""Overrides that make a run of a shipped config ten updates."""
SMALL = {
    "kl_f8_256": (
        "batch=64",
        "precision=fp32",
        "data.path=data/fashion-mnist",
        "data.size=16",
        "data.channels=1",
        "method.autoencoder.width=32",
        "method.autoencoder.multipliers=[1, 1, 1, 1]",
        "method.autoencoder.blocks=1",
        "method.discriminator.width=8",
        "method.discriminator.layers=1",
        "method.discriminator_learns_from=128",
        "method.adversarial_from=256",
        "method.adversarial_ramp=128",
        "optim.ema_half_life=128",
    ),
}
"""Further ones, for shipped configs of networks and data that no test can have: the same parts, small, on the data that
the tests have."""
PATIENCE = 120.0  # seconds that a start may take before the test fails


def small(config: str) -> tuple[str, ...]:
    """What a shipped config, or the config of a run of one, needs so that a test can have it."""
    return next((overrides for name, overrides in SMALL.items() if name in config), ())


@dataclass
class Started:
    """The ranks of one start."""

    ranks: list[BaseProcess]
    logs: list[Path]

    def kill(self, number: int = signal.SIGKILL, *, only: int | None = None) -> None:
        """Sends a signal to all ranks, or to one."""
        for rank, process in enumerate(self.ranks):
            if process.pid is not None and only in (None, rank):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    def running(self) -> bool:
        return any(process.exitcode is None for process in self.ranks)

    def wait(self) -> "Ended":
        """Waits for all ranks; kills and fails after PATIENCE."""
        limit = time.monotonic() + PATIENCE
        for process in self.ranks:
            process.join(max(0.0, limit - time.monotonic()))
        hung = self.running()
        self.kill()
        for process in self.ranks:
            process.join()
        out, err = ("".join(log.with_suffix(kind).read_text() for log in self.logs) for kind in (".out", ".err"))
        assert not hung, f"still running after {PATIENCE} s:\n{out}\n{err}"
        return Ended([process.exitcode for process in self.ranks], out, err)


@dataclass
class Ended:
    codes: list[int | None]
    """Exit code of each rank; -9 for one that was killed."""
    out: str
    err: str

    @property
    def code(self) -> int | None:
        return self.codes[0]

    def ok(self) -> "Ended":
        assert set(self.codes) == {0}, f"exit codes {self.codes}\n{self.out}\n{self.err}"
        return self

    def refused(self, *said: str) -> str:
        """The one line of a mistake: exit code 2, no traceback, each of `said` in it."""
        assert self.code == 2, f"exit code {self.code}\n{self.out}\n{self.err}"
        lines = self.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("tandem: error: "), self.err
        assert all(word in lines[0] for word in said), f"{said} not in: {lines[0]}"
        return lines[0]


def train(logs: Path, *argv: str, world: int = 1) -> Started:
    """`python -m trainer argv` on `world` ranks; logs: a folder for what they print."""
    return _start(logs, _train, argv, world=world)


def each(
    logs: Path,
    *ranks: tuple[Sequence[str], Mapping[str, str]],
    before: Sequence[Callable[[], None]] = (),
) -> Started:
    """`python -m trainer argv` once for each (argv, environment variables) of `ranks`.

    before: what each of them calls first, in its process."""
    logs.mkdir(parents=True, exist_ok=True)
    processes, files = [], []
    for number, (argv, variables) in enumerate(ranks, len(list(logs.glob("*.out")))):
        log = logs / f"{number:03d}.log"
        first = before[len(files)] if before else None
        arguments = (list(argv), dict(variables), log, ROOT, first)
        process = CONTEXT.Process(target=_train, args=arguments, daemon=True)
        process.start()
        log.with_suffix(".out").touch()
        log.with_suffix(".err").touch()
        processes.append(process)
        files.append(log)
    return Started(processes, files)


def tandem(logs: Path, *argv: str, cwd: Path = ROOT) -> Ended:
    """The `tandem` command in a process of its own, to its end."""
    return _start(logs, _tandem, argv, cwd=cwd).wait()


def listing(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content: to see that nothing was written over."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@contextlib.contextmanager
def nothing_changes(folder: Path) -> Iterator[None]:
    """Fails where a file that lay in `folder` before is changed or gone afterwards; heartbeats live."""
    before = listing(folder)
    yield
    after = listing(folder)
    changed = [name for name, content in before.items() if after.get(name) != content and "heartbeats" not in name]
    assert not changed, f"written over: {changed}"


def _start(
    logs: Path, target: Callable[..., None], argv: tuple[str, ...], *, world: int = 1, cwd: Path = ROOT
) -> Started:
    logs.mkdir(parents=True, exist_ok=True)
    number = len(list(logs.glob("*.out")))
    shared: dict[str, str] = {}
    if world > 1:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        shared |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    processes, files = [], []
    for rank in range(world):
        log = logs / f"{number:03d}-{rank}.log"
        mine = shared | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {})
        process = CONTEXT.Process(target=target, args=(list(argv), mine, log, cwd), daemon=True)
        process.start()
        log.with_suffix(".out").touch()
        log.with_suffix(".err").touch()
        processes.append(process)
        files.append(log)
    return Started(processes, files)


# ---------------------------------------------------------------- in the started process
def _train(
    argv: list[str],
    variables: Mapping[str, str],
    log: Path,
    cwd: Path,
    before: Callable[[], None] | None = None,
) -> None:
    from trainer.__main__ import main

    if before is not None:
        before()
    _become(main, argv, variables, log, cwd)


def _tandem(argv: list[str], variables: Mapping[str, str], log: Path, cwd: Path) -> None:
    from launch import cli, local
    from trainer.__main__ import main

    def become_trainer(arguments: list[str]) -> NoReturn:
        """Instead of a new interpreter, which would import torch again; tests/test_readme.py starts one."""
        sys.stdout.flush()
        os._exit(boundary(main, arguments))

    local.become_trainer = become_trainer  # type: ignore[assignment]
    _become(cli.dispatch, argv, variables, log, cwd)


def _become(
    main: Callable[[list[str]], int], argv: list[str], variables: Mapping[str, str], log: Path, cwd: Path
) -> None:
    for descriptor, kind in ((1, ".out"), (2, ".err")):
        file = os.open(log.with_suffix(kind), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    signals.install()  # as trainer/__main__.py
    os.environ.update(variables)
    os.chdir(cwd)
    log.with_suffix(".ready").touch()
    code = boundary(main, argv)
    sys.stdout.flush()
    os._exit(code)  # a group that a failed rank leaves open may wait for its peers for minutes: see launch.worker

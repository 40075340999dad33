"""`tandem train`: one run on one or more processes of this machine, or of several that are each told so.

Starts its own processes instead of torchrun: the exit code and the one clear line of a worker reach the user as they
are, Ctrl-C reaches each worker once, and the port of the rendezvous is bound before anybody is told about it, so that
two runs started at the same moment neither collide nor join each other's group.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from launch.failures import failure_file, first_failure
from launch.machines import ALONE, Machines, add_arguments, chosen
from trainer import signals
from trainer.errors import ASKS_AGAIN, BUG, HUNG, INTERRUPTED, STOPS, TERMINATED, USER_MISTAKE, to_stderr

POLL = 0.05  # seconds between looks at the workers
SETTLE = 2.0  # seconds that the others get to fail by themselves and say why, after the first failure
GRACE = 5.0  # seconds between SIGTERM, or the second Ctrl-C, and SIGKILL
STOPPED = (INTERRUPTED, TERMINATED, ASKS_AGAIN)  # exit codes of a rank that stopped as asked
UNCAUSED = tuple(128 + number for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL))
"""Exit codes that no lost peer gives a rank: while we have sent nothing, such an end is the cause of the others'."""

HELP = """\
Train a config on this machine. What follows CONFIG are overrides of its keys: `tandem train CONFIG --help` lists them.
Without --processes: one process for each GPU, or one where there is none.
On several machines, give the same command on each of them, but for --machine.
"""
EXAMPLE = """\
examples:
  tandem train configs/vaegan_fashion.yaml --processes 2
  tandem train configs/vae_fashion.yaml optim.lr=2e-4 run=runs/vae_fast
  tandem train configs/vae_fashion.yaml --machines 2 --machine 0 --address 10.0.0.1 --port 29500

Ctrl-C once saves a checkpoint and stops (exit code 130); twice stops at once. The same command goes on from there.
"""


@dataclass
class Worker:
    """A started rank and when it was seen to end."""

    rank: int
    process: subprocess.Popen[bytes]
    code: int | None = None  # as a shell gives it: 128 + signal for a killed one


def visible_gpus() -> int:
    """The number of GPUs that a process started now would see, without importing torch."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return len([name for name in listed.split(",") if name.strip() not in ("", "-1")])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_environment(*, processes: int) -> dict[str, str]:
    """OpenMP's settings, where the user has set none: cores shared out, and no thread that waits by spinning."""
    wanted = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
    if processes > 1:
        wanted["OMP_NUM_THREADS"] = str(max(1, cores() // processes))
    return {name: value for name, value in wanted.items() if name not in os.environ}


def listen(port: int, machines: Machines = ALONE) -> socket.socket:
    """The socket that rank 0 will serve the rendezvous on, if it runs here. `port` 0 takes a free one. ValueError when
    it is taken."""
    if not 0 <= port <= 65535:
        raise ValueError(f"--port: {port} is no port; 1 to 65535, or leave it out for a free one")
    server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    if machines.number > 0:
        return server
    try:
        server.bind(("127.0.0.1" if machines.count == 1 else "", port))
    except OSError as error:
        server.close()
        raise ValueError(f"--port: {port} cannot be taken ({error.strerror}); without --port a free one is") from error
    server.listen(1024)
    return server


def environment(
    *, processes: int, server: socket.socket, failures: Path, port: int = 0, machines: Machines = ALONE
) -> dict[str, str]:
    """The environment that all ranks share: torch.distributed's variables, threads, and where to report a failure."""
    shared = {
        **os.environ,
        **thread_environment(processes=processes),
        "MASTER_ADDR": machines.address,
        "MASTER_PORT": str(port or server.getsockname()[1]),
        "WORLD_SIZE": str(machines.count * processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # every rank is a client of the store that launch.worker serves
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TANDEM_LAUNCHER": str(os.getpid()),
        "TANDEM_FAILURES": str(failures),
    }
    if sys.platform == "linux" and machines.count == 1:
        shared.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo would look up the host's name, which may lead nowhere
    return shared


def python(module: str) -> list[str]:
    """What begins the command line that runs `module` of the code that runs now.

    `python -m` looks into the current folder first, where a project may have a trainer.py or tools/ of its own; -P
    would forbid that, but for Python 3.10."""
    root = str(Path(__file__).resolve().parents[1])
    path = f"import sys; sys.path[:] = [p for p in sys.path if p]; {root!r} in sys.path or sys.path.insert(0, {root!r})"
    return [sys.executable, "-c", f"{path}; import runpy; runpy.run_module({module!r}, None, '__main__', True)"]


def start(command: Sequence[str], *, rank: int, local: int, shared: dict[str, str], server: socket.socket) -> Worker:
    """Starts one rank, in a session of its own, so that the terminal's Ctrl-C reaches it only through us."""
    variables = {**shared, "RANK": str(rank), "LOCAL_RANK": str(local)}
    inherited: tuple[int, ...] = ()
    if rank == 0:
        variables["TANDEM_STORE_FD"] = str(server.fileno())
        inherited = (server.fileno(),)
    return Worker(rank, subprocess.Popen(command, env=variables, pass_fds=inherited, start_new_session=True))


def send(workers: Sequence[Worker], number: int) -> None:
    for worker in workers:
        if worker.process.poll() is None:
            worker.process.send_signal(number)


@contextmanager
def forwarded_signals(workers: list[Worker]) -> Iterator[list[int]]:
    """While inside, SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 go to every worker: the first as often as it comes, the others
    once, whoever repeats them. Yields those that came."""
    came: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT or number not in came:
            send(workers, number)
        came.append(number)

    before = {number: signal.signal(number, forward) for number in STOPS}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def watch(workers: Sequence[Worker], came: Sequence[int]) -> Worker | None:
    """Waits for all workers; returns the one that failed first, if any.

    A rank that lost a killed peer may be seen to end before that peer is: the killed one is the one that failed.
    After a failure the others are ended in seconds. After one Ctrl-C they have all the time that saving takes: a rank
    that ends with 130, 143 or 75 then has done as asked, and with 75 whoever asked it. After a second Ctrl-C they are
    killed if they do not stop on their own.
    """
    failed: Worker | None = None
    deadlines: list[tuple[float, int]] = []
    sent = False
    while True:
        for worker in workers:
            code = worker.process.poll()
            if code is None or worker.code is not None:
                continue
            worker.code = code if code >= 0 else 128 - code
            as_asked = worker.code == ASKS_AGAIN or (came and worker.code in STOPPED)
            as_asked = as_asked or (came.count(signal.SIGINT) > 1 and worker.code == 128 + signal.SIGKILL)
            if worker.code and not as_asked and failed is None:
                failed = worker
                now = time.monotonic()
                deadlines = [(now + SETTLE, signal.SIGTERM), (now + SETTLE + GRACE, signal.SIGKILL)]
            elif failed and not (sent or as_asked) and worker.code in UNCAUSED and failed.code not in UNCAUSED:
                failed = worker
        if all(worker.code is not None for worker in workers):
            return failed
        if came.count(signal.SIGINT) > 1 and not deadlines:
            deadlines = [(time.monotonic() + GRACE, signal.SIGKILL)]
        if deadlines and time.monotonic() >= deadlines[0][0]:
            send(workers, deadlines[0][1])
            sent = True
            deadlines = deadlines[1:] or [(float("inf"), signal.SIGKILL)]
        time.sleep(POLL)


def explain(worker: Worker) -> str:
    """What to say of a worker that ended without a word: a signal, or an exit from inside a library."""
    assert worker.code is not None
    if worker.code <= 128:
        return f"tandem: error: rank {worker.rank} ended with exit code {worker.code}"
    name = signal.Signals(worker.code - 128).name
    hint = "; the system does that when memory runs out: fewer processes, a smaller batch" if name == "SIGKILL" else ""
    return f"tandem: error: rank {worker.rank} was killed by {name}{hint}"


def report(failed: Worker, failures: Path) -> int:
    """Prints the first failure of a run and returns its exit code."""
    assert failed.code is not None
    silent = not failure_file(failures, failed.rank).exists()
    if silent and failed.code == HUNG:  # has named the rank to blame itself
        return failed.code
    if silent and failed.code != USER_MISTAKE:
        to_stderr(explain(failed))
        return failed.code
    first = first_failure(failures)
    if first is None:  # a parser that exits with 2 has said why itself
        return failed.code
    to_stderr(first.text if first.code != BUG else f"rank {first.rank} failed first:\n{first.text}")
    return first.code


def launch(module: str, arguments: Sequence[str], *, processes: int, port: int = 0, machines: Machines = ALONE) -> int:
    """Runs `module`'s `main(arguments)` on `processes` ranks of this machine.

    Returns 0, the exit code of the rank that failed first (its message is the only one printed), or that of the signal
    that stopped the run: 130 Ctrl-C, 143 SIGTERM, 75 SIGUSR1 or SIGUSR2, after which the run asks to be started again.
    """
    command = [*python("launch.worker"), module, *arguments]
    workers: list[Worker] = []
    with tempfile.TemporaryDirectory(prefix="tandem-") as folder, listen(port, machines) as server:
        try:
            with forwarded_signals(workers) as came:
                failures = Path(folder)
                shared = environment(
                    processes=processes, server=server, failures=failures, port=port, machines=machines
                )
                signals.hold()  # one that comes now waits here until all can be told, and there for handlers
                try:
                    for local in range(processes):
                        rank = machines.number * processes + local
                        workers.append(start(command, rank=rank, local=local, shared=shared, server=server))
                finally:
                    signals.release()
                failed = watch(workers, came)
        finally:
            send(workers, signal.SIGKILL)
        if failed:
            return report(failed, Path(folder))
        codes = {worker.code for worker in workers}
        if ASKS_AGAIN in codes:
            return ASKS_AGAIN
        stops = [number for number in came if number in (signal.SIGINT, signal.SIGTERM)]
        return 128 + stops[0] if stops and codes != {0} else 0


def become_trainer(arguments: Sequence[str]) -> NoReturn:
    """Replaces this process by the trainer: with one rank there is nothing to launch."""
    os.environ.update(thread_environment(processes=1))
    sys.stdout.flush()
    signals.hold()
    os.execv(sys.executable, [*python("trainer"), *arguments])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="tandem train",
        description=HELP,
        epilog=EXAMPLE,
        usage="tandem train CONFIG [key=value ...] [--processes N] [--port PORT]\n"
        "         [--machines N --machine I --address HOST]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("--processes", type=int, metavar="N", help="ranks to start on this machine")
    parser.add_argument("--port", type=int, default=0, help="port of the rendezvous (default: a free one)")
    add_arguments(parser)
    options, rest = parser.parse_known_args(argv)
    if not rest or rest[0] in ("-h", "--help"):
        parser.print_help()
        return 0 if rest else 2
    processes = options.processes if options.processes is not None else max(1, visible_gpus())
    if processes < 1:
        raise ValueError(f"--processes: {processes} is not a number of processes; 1 is the least")
    machines = chosen(options)
    if processes * machines.count == 1 or {"-h", "--help"} & set(rest):
        become_trainer(rest)
    return launch("trainer.__main__", rest, processes=processes, port=options.port, machines=machines)

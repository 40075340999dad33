"""The local launcher with real processes and a real gloo group; a tiny module stands in for the trainer."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from launch import local

HERE = Path(__file__).resolve().parent  # of stand_in.py


@pytest.fixture
def begin(tmp_path: Path) -> "Iterator[Begin]":
    started = Begin(tmp_path)
    yield started
    for process in started.processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


class Begin:
    """Starts the launcher as a process of its own, as a shell would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[str]] = []

    def __call__(self, *arguments: str, processes: int = 2, grace: float = 1.0) -> "subprocess.Popen[str]":
        script = (
            "import sys; from launch import local; from trainer.errors import boundary;"
            f"local.SETTLE, local.GRACE = 1.0, {grace};"
            f"sys.exit(boundary(lambda argv: local.launch('stand_in', argv, processes={processes}), sys.argv[1:]))"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            env={**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parents[1]}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.processes.append(process)
        return process


def ready(process: "subprocess.Popen[str]", count: int = 2) -> list[int]:
    """Waits until all ranks say so; their process ids."""
    assert process.stdout is not None
    return [int(process.stdout.readline().split()[1]) for _ in range(count)]


def ended(process: "subprocess.Popen[str]", *, code: int, seconds: float = 60) -> tuple[str, str]:
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == code, err
    return out, err


def gone(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_accelerate_finds_every_rank(begin: Begin) -> None:
    out, _ = ended(begin("accelerated"), code=0)
    assert out == "world 2 MULTI_CPU\n"


def runs_at_the_same_moment(begin: Begin) -> None:
    pair = [begin("together"), begin("together")]
    said = [ended(process, code=0)[0] for process in pair]
    ports = [re.fullmatch(r"world 2 port (\d+)\n", out) for out in said]
    assert ports[0] and ports[1], said
    assert ports[0][1] != ports[1][1]


def test_two_runs_at_the_same_moment_do_not_meet_even_when_the_usual_port_is_taken(begin: Begin) -> None:
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with suppress(OSError):  # somebody else holds it, which is the case that is meant
            holder.bind(("127.0.0.1", 29500))
        runs_at_the_same_moment(begin)


@pytest.mark.slow
def test_two_runs_at_the_same_moment_do_not_meet_ten_times(begin: Begin) -> None:
    for _ in range(10):
        runs_at_the_same_moment(begin)


def test_a_mistake_that_all_ranks_find_is_one_line_and_code_2(begin: Begin) -> None:
    _, err = ended(begin("mistake_everywhere"), code=2)
    assert err == "tandem: error: optim.lrr: no such key; nearest: lr\n"


def test_a_mistake_that_one_rank_finds_is_not_buried_under_the_others_lost_connections(begin: Begin) -> None:
    _, err = ended(begin("mistake_on_one"), code=2)
    assert err == "tandem: error: shard 7 is cut short\n"


def test_a_rank_that_leaves_with_2_leaves_the_word_to_the_one_that_knows(begin: Begin) -> None:
    _, err = ended(begin("mistake_told_to_the_others"), code=2)
    assert err == "tandem: error: runs/a: another run is in this folder\n"


def test_a_bug_shows_its_rank_and_traceback_and_ends_the_others_in_seconds(begin: Begin) -> None:
    started = time.monotonic()
    _, err = ended(begin("bug_while_others_sleep"), code=1)
    assert time.monotonic() - started < 30
    assert err.startswith("rank 1 failed first:\nTraceback")
    assert err.endswith("KeyError: 'lost'\n")


def test_a_killed_rank_is_named_with_its_signal(begin: Begin) -> None:
    _, err = ended(begin("killed"), code=137)
    assert err.startswith("tandem: error: rank 1 was killed by SIGKILL")
    assert err.count("\n") == 1


def test_a_rank_that_lost_a_killed_peer_is_not_taken_for_the_one_that_failed() -> None:
    ends = ("raise SystemExit(1)", "import os; os.kill(os.getpid(), 9)", "raise SystemExit(1)")
    workers = [local.Worker(rank, subprocess.Popen([sys.executable, "-c", end])) for rank, end in enumerate(ends)]
    for worker in workers:
        os.waitid(os.P_PID, worker.process.pid, os.WEXITED | os.WNOWAIT)  # ended, all seen at the first look
    failed = local.watch(workers, [])
    assert failed is workers[1]
    assert failed.code == 137


def test_a_rank_that_ends_without_a_word_is_named_with_its_code(begin: Begin) -> None:
    assert ended(begin("exits_with_5"), code=5)[1] == "tandem: error: rank 1 ended with exit code 5\n"


def test_one_interrupt_reaches_each_rank_once_and_leaves_time_to_save(begin: Begin) -> None:
    process = begin("saves_when_interrupted", str(begin.folder), "2.5", grace=0.5)  # longer than any grace
    ready(process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole foreground group
    _, err = ended(process, code=130)
    assert err == ""
    assert (begin.folder / "saved").read_text() == "1"


def test_a_second_interrupt_stops_at_once(begin: Begin) -> None:
    process = begin("stops_at_the_second")
    ready(process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert ended(process, code=130, seconds=20) == ("", "")


def test_ranks_that_do_not_listen_to_two_interrupts_are_killed(begin: Begin) -> None:
    process = begin("deaf")
    pids = ready(process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    ended(process, code=130, seconds=20)
    assert all(map(gone, pids))


def test_no_rank_outlives_a_killed_launcher(begin: Begin) -> None:
    process = begin("works")
    pids = ready(process)
    process.kill()
    deadline = time.monotonic() + 20
    while not all(map(gone, pids)):
        assert time.monotonic() < deadline, "a rank is still there"
        time.sleep(0.05)


def test_a_port_that_is_taken_is_named_with_its_field() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port: {port} cannot be taken"):
            local.launch("stand_in", [], processes=2, port=port)


@pytest.mark.parametrize("number", ["0", "-3"])
def test_fewer_than_one_process_is_refused(number: str) -> None:
    with pytest.raises(ValueError, match=f"--processes: {number}"):
        local.main(["a.yaml", "--processes", number])


def test_threads_are_shared_out_unless_the_user_has_set_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(local, "cores", lambda: 8)
    waiting = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
    assert local.thread_environment(processes=1) == waiting
    assert local.thread_environment(processes=2) == {**waiting, "OMP_NUM_THREADS": "4"}
    assert local.thread_environment(processes=16)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert "OMP_NUM_THREADS" not in local.thread_environment(processes=2)


@pytest.mark.parametrize(("visible", "count"), [("0,1", 2), ("", 0), ("-1", 0), ("GPU-8f2a", 1)])
def test_gpus_are_counted_as_the_processes_will_see_them(
    visible: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert local.visible_gpus() == count


def test_help_shows_an_example() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "launch.cli", "train", "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    assert "tandem train configs/vaegan_fashion.yaml --processes 2" in ran.stdout

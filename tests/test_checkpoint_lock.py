"""Two runs never share a folder."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from trainer.runlock import RunLock

HOLD = """
import sys, time
from pathlib import Path
from trainer.runlock import RunLock
with RunLock(Path(sys.argv[1])):
    print("inside", flush=True)
    time.sleep(60)
"""
RACE = """
import sys, time
from pathlib import Path
from trainer import runlock
if sys.argv[2] == "no flock":
    import errno
    def refuse(descriptor, operation):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")
    runlock.fcntl.flock = refuse
print("ready", flush=True)
sys.stdin.readline()
try:
    with runlock.RunLock(Path(sys.argv[1])):
        print("inside", flush=True)
        sys.stdin.readline()
except ValueError as error:
    print(error, flush=True)
"""


def start(program: str, *arguments: str) -> "subprocess.Popen[str]":
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )


def line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def go(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def answers_of_six(folder: Path, kind: str) -> list[str]:
    """What six processes say that try to take the lock at once; who is inside stays until all have answered."""
    processes = [start(RACE, str(folder), kind) for _ in range(6)]
    try:
        assert [line(process) for process in processes] == ["ready"] * 6
        for process in processes:
            go(process)
        return [line(process) for process in processes]
    finally:
        for process in processes:
            process.communicate("\n")


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_a_second_run_is_refused_naming_the_first_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    with start(HOLD, str(tmp_path)) as holder:
        assert line(holder) == "inside"
        who = f"is in use by process {holder.pid} on {socket.gethostname()}"
        with pytest.raises(ValueError, match=who), RunLock(tmp_path):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with RunLock(tmp_path):
            pass


def test_the_lock_can_be_taken_again_after_it_was_given_up(tmp_path: Path) -> None:
    for _ in range(2):
        with (
            RunLock(tmp_path / "new" / "run"),
            pytest.raises(ValueError, match=f"process {os.getpid()}"),
            RunLock(tmp_path / "new" / "run"),
        ):
            pass
    with pytest.raises(RuntimeError, match="training failed"), RunLock(tmp_path):
        raise RuntimeError("training failed")
    with RunLock(tmp_path):
        pass


def test_an_unreadable_lock_file_still_locks(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        (tmp_path / ".lock").write_text("not json")
        with pytest.raises(ValueError, match="in use by another process"), RunLock(tmp_path):
            pass


@pytest.mark.parametrize("kind", ["flock", "no flock"])
def test_of_many_that_start_at_once_exactly_one_gets_in(tmp_path: Path, kind: str) -> None:
    answers = answers_of_six(tmp_path, kind)
    assert answers.count("inside") == 1
    assert sum("is in use by" in answer for answer in answers) == 5


def test_without_flock_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path, no_flock: None) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    (tmp_path / ".lock.holder").write_text(json.dumps({"host": socket.gethostname(), "pid": gone.pid}))
    with RunLock(tmp_path), pytest.raises(ValueError, match=f"process {os.getpid()} on"), RunLock(tmp_path):
        pass
    assert not (tmp_path / ".lock.holder").exists()


def test_without_flock_of_many_that_find_a_dead_processes_lock_exactly_one_gets_in(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    (tmp_path / ".lock.holder").write_text(json.dumps({"host": socket.gethostname(), "pid": gone.pid}))
    assert answers_of_six(tmp_path, "no flock").count("inside") == 1


def test_without_flock_the_lock_of_another_host_is_respected(tmp_path: Path, no_flock: None) -> None:
    holder = tmp_path / ".lock.holder"
    holder.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    with (
        pytest.raises(ValueError, match=rf"process 1 on elsewhere \(if it is gone, remove {holder}\)"),
        RunLock(tmp_path),
    ):
        pass
    assert holder.exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"), RunLock(tmp_path / "file" / "run"):
        pass


def test_a_start_after_another_waits_for_a_lock_that_is_about_to_go(tmp_path: Path) -> None:
    with start(HOLD, str(tmp_path)) as holder:
        assert line(holder) == "inside"
        began = time.monotonic()
        with pytest.raises(ValueError, match="in use by process"), RunLock(tmp_path, patience=0.3):
            pass
        assert 0.3 <= time.monotonic() - began < 5
        threading.Timer(0.5, holder.kill).start()
        with RunLock(tmp_path, patience=60):
            assert holder.wait() == -signal.SIGKILL

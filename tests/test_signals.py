"""Signals that ask a run to stop: of one process, of the command on two, under torchrun and under accelerate launch."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import starts
from tests.runs import IMAGES, curves, same, saved, tensors, write_config
from trainer import signals
from trainer.signals import Signals

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "trainer"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "-m", "trainer"]


# ---------------------------------------------------------------- what is noted
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_noted_and_nothing_else_happens(number: int, code: int) -> None:
    before = signal.getsignal(number)
    with Signals() as noted:
        assert noted.request == 0
        os.kill(os.getpid(), number)
        assert noted.request == code
    assert signal.getsignal(number) is before


def test_handlers_are_given_back_after_an_error_too() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError), Signals():
        raise RuntimeError
    assert signal.getsignal(signal.SIGINT) is before


def test_the_gravest_request_stays_and_a_notice_asks_for_another_start() -> None:
    with Signals() as noted:
        for number, code, name in (
            (signal.SIGTERM, 143, "TERM"),
            (signal.SIGINT, 143, "TERM"),
            (signal.SIGTERM, 143, "TERM"),
            (signal.SIGUSR1, 75, "USR1"),
            (signal.SIGTERM, 75, "USR1"),
            (signal.SIGUSR2, 75, "USR2"),
        ):
            os.kill(os.getpid(), number)
            assert (signals.exit_code(noted.request), signals.name(noted.request)) == (code, name)
        assert 0 < noted.seconds() < 10


LOOP = """
import sys, time
from trainer.signals import Signals
with Signals() as signals:
    print("ready", flush=True)
    while not signals.request:
        time.sleep(0.01)
    print("saving", flush=True)
    time.sleep(float(sys.argv[1]))
    print("saved", flush=True)
sys.exit(signals.request)
"""


def looping(*, save: float) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, str(save)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "saving\n"
    return process


def test_one_interrupt_saves_and_ends_with_130() -> None:
    process = looping(save=0.2)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "saved\n", "")


def test_a_second_interrupt_ends_at_once_without_the_save() -> None:
    process = looping(save=60)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "")
    assert time.monotonic() - began < 10


# ---------------------------------------------------------------- the command on two processes
def command(config: Path, *words: str) -> "subprocess.Popen[str]":
    argv = [sys.executable, "-m", "launch.cli", "train", str(config), "--processes", "2", *words]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def until(happened: Callable[[], object], process: "subprocess.Popen[str]") -> None:
    while not happened():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def attempts(run: Path) -> list[tuple[int, int | None]]:
    """(images, exit code) of each start."""
    rows = map(json.loads, (run / "attempts.jsonl").read_text().splitlines())
    return [(row["images"], row.get("code")) for row in rows]


def test_notices_save_ask_for_another_start_and_leave_the_losses_as_they_were(few: Path, tmp_path: Path) -> None:
    straight = write_config(tmp_path / "straight.yaml", "vaegan", data=few).with_suffix("")
    starts.train(tmp_path / "logs", f"{straight}.yaml", world=2).wait().ok()
    config, run = write_config(tmp_path / "run.yaml", "vaegan", data=few), tmp_path / "run"

    with command(config) as process:  # a notice and what follows it, to the command
        until(lambda: saved(run), process)
        process.send_signal(signal.SIGUSR2)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    first = saved(run)[-1]
    assert (process.returncode, err) == (75, ""), out
    assert out.splitlines()[-1] == (
        f"stopped at {first:,} images; saved {run}/checkpoints/{first:012d}; asks to be started again; the same "
        "command goes on from there"
    )
    assert (run / "requeue").read_text() == f"USR2 at {first:,} images\n"

    with command(config) as process:  # a notice to one rank that is not the first, in an evaluation if it can be
        beats = run / "heartbeats" / "rank00001.json"
        until(lambda: beats.exists() and json.loads(beats.read_text())["images"] > first, process)
        assert not (run / "requeue").exists()
        os.kill(children(process.pid)[1], signal.SIGUSR1)
        out, err = process.communicate(timeout=120)
    second = saved(run)[-1]
    assert (process.returncode, err) == (75, ""), out
    assert first < second < IMAGES
    assert (run / "requeue").read_text() == f"USR1 at {second:,} images\n"

    starts.train(tmp_path / "logs", str(config), world=2).wait().ok()
    assert attempts(run) == [(0, 75), (first, 75), (second, 0)]
    assert curves(run) == curves(straight)
    assert same(tensors(run), tensors(straight))

    ended = starts.train(tmp_path / "logs", str(config), world=2).wait().ok()  # requeued once too often
    assert ended.out.startswith("nothing to do: trained on 384 images") and ended.out.count("\n") == 1
    assert len(attempts(run)) == 3
    assert not (run / "requeue").exists()


# ---------------------------------------------------------------- one process
def test_a_notice_before_training_waits_for_it_and_asks_for_another_start(few: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", "vae", data=few)
    with signals_held():
        argv = [sys.executable, "-m", "trainer", str(config)]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        process.send_signal(signal.SIGUSR2)  # before its first line
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)  # in torch's imports
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (75, "")
    assert out == "stopped before anything was built; the same command begins again\n"
    assert (tmp_path / "run" / "requeue").read_text() == "USR2 at 0 images\n"
    assert attempts(tmp_path / "run") == [(0, 75)]


def signals_held() -> "Iterator[None]":
    import contextlib

    @contextlib.contextmanager
    def held() -> Iterator[None]:
        signals.hold()
        try:
            yield
        finally:
            signals.release()

    return held()


def test_a_termination_saves_only_where_the_last_save_fits_the_notice(few: Path, tmp_path: Path) -> None:
    config, run = write_config(tmp_path / "run.yaml", "vae", data=few), tmp_path / "run"
    words = (str(config), "checkpoint.every=480")
    started = starts.train(tmp_path / "logs", *words, "checkpoint.notice=0.001", "images=100_000")
    while started.running() and not saved(run):
        time.sleep(0.01)
    time.sleep(0.05)  # until the save is over
    started.kill(signal.SIGTERM)
    ended = started.wait()
    last = saved(run)[-1]
    assert (ended.code, ended.err) == (143, "")
    assert "images, unsaved: the last save took " in ended.out.splitlines()[-1]
    assert ended.out.splitlines()[-1].endswith(f"the same command goes on from {run}/checkpoints/{last:012d}")
    assert last % 480 == 0  # none but those of the schedule
    assert attempts(run) == [(0, 143)] and not (run / "requeue").exists()

    started = starts.train(tmp_path / "logs", *words, "checkpoint.notice=60", "images=100_000")
    while started.running() and saved(run)[-1] == last:
        time.sleep(0.01)
    started.kill(signal.SIGTERM)
    ended = started.wait()
    assert (ended.code, ended.err) == (143, "")
    assert f"saved {run}/checkpoints/{saved(run)[-1]:012d}" in ended.out.splitlines()[-1]
    assert not (run / "requeue").exists()


# ---------------------------------------------------------------- other launchers
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_other_launchers_save_on_a_termination_and_on_an_interrupt(
    number: int, launcher: list[str], few: Path, tmp_path: Path
) -> None:
    config, run = write_config(tmp_path / "run.yaml", "vae", data=few), tmp_path / "run"
    argv = [*launcher, str(config), "images=200_000"]
    process = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )
    until(lambda: saved(run), process)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    out, _ = process.communicate(timeout=120)
    limit = time.monotonic() + 60  # a launcher that is gone leaves the save to its ranks
    while (beat := json.loads((run / "heartbeats" / "rank00000.json").read_text()))["at"] != "end":
        assert time.monotonic() < limit, beat
        time.sleep(0.05)
    assert f"saved {run}/checkpoints/{saved(run)[-1]:012d}" in out
    assert not (run / "requeue").exists()

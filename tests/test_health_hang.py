"""A rank that hangs, is stopped or is killed: found by the others, named on one line, the stacks of all saved."""

import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import starts
from tests.runs import saved, write_config
from trainer.heartbeat import blame
from trainer.parallel import place

ROOT = Path(__file__).resolve().parents[1]


# ---------------------------------------------------------------- who is to blame
def beat(
    rank: int, *, passed: int, beats: int = 0, at: str = "step", quiet: float = 0.0, host: str = "elsewhere"
) -> dict[str, Any]:
    now = time.time()
    return {
        "rank": rank,
        "host": host,
        "pid": os.getpid(),
        "time": now - quiet,
        "start": 1.0,
        "images": 640,
        "at": at,
        "since": now - quiet - 100.0,
        "passed": [passed, beats],
    }


def test_the_rank_that_has_passed_less_often_is_behind() -> None:
    told = [beat(0, passed=9), beat(1, passed=9), beat(2, passed=8, at="data"), beat(3, passed=9)]
    found = blame(told, start=1.0, period=5.0)
    assert found == f"rank 2 (process {os.getpid()} on elsewhere) is behind: waiting for data for 100 s, at 640 images"
    told = [beat(0, passed=8, beats=20, at="evaluate"), beat(1, passed=8, beats=7, at="evaluate")]
    assert "rank 1 (" in blame(told, start=1.0, period=5.0)


def test_a_rank_without_a_sign_of_life_is_named_before_one_that_is_behind() -> None:
    told = [beat(0, passed=8), beat(1, passed=9, quiet=60.0), beat(2, passed=9, quiet=61.0)]
    found = blame(told, start=1.0, period=5.0)
    assert found.startswith("rank 1 ") and "no sign of life for 60 s" in found and found.endswith(", and 1 more")
    assert blame([beat(0, passed=8), {}], start=1.0, period=5.0) == "rank 1 never gave a sign of life"
    old = beat(1, passed=9) | {"start": 0.5}  # of an earlier start
    assert "rank 1 (process" in blame([beat(0, passed=8), old], start=1.0, period=5.0)


def test_a_process_of_this_machine_that_is_gone_is_said_to_be() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    told = [beat(0, passed=8), beat(1, passed=9, host=place.host()) | {"pid": gone.pid}]
    assert "is gone" in blame(told, start=1.0, period=5.0)


def test_where_all_have_come_as_far_nobody_is_blamed() -> None:
    told = [beat(0, passed=8), beat(1, passed=8)]
    assert blame(told, start=1.0, period=5.0) == "no rank is behind: all are in an update"
    assert blame(told[:1], start=1.0, period=5.0) == "it is the only rank"


# ---------------------------------------------------------------- two ranks
def read_sleeps(after: int) -> None:
    """From the batch `after` on, this process waits for ever for its next one."""
    from trainer.data import device

    read, count = device.Feed.fetch, [0]

    def fetch(feed: device.Feed) -> None:
        count[0] += 1
        if count[0] > after:
            time.sleep(1000)
        read(feed)

    device.Feed.fetch = fetch  # type: ignore[method-assign]


def nothing() -> None: ...


def each(folder: Path, config: Path, *words: str, before: Any) -> starts.Started:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": "2"}
    argv = [str(config), *words]
    ranks = [(argv, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    return starts.each(folder, *ranks, before=before)


def test_a_rank_that_hangs_in_the_data_is_named_and_all_stacks_are_saved(few: Path, tmp_path: Path) -> None:
    config, run = write_config(tmp_path / "run.yaml", "vae", data=few), tmp_path / "run"
    began = time.monotonic()
    started = each(tmp_path / "logs", config, "log.hang_after=4", before=[nothing, functools.partial(read_sleeps, 5)])
    ended = started.wait()
    assert ended.codes == [70, 70], ended
    assert time.monotonic() - began < 60
    lines = ended.err.splitlines()
    assert len(lines) == 1, ended.err  # of one of them, whichever was first
    assert re.match(r"tandem: error: rank [01] made no progress for \d+ s \(log.hang_after\), ", lines[0])
    assert re.search(r": rank 1 \(process \d+ on .+\) is behind: waiting for data for \d+ s, at \d+ images; ", lines[0])
    assert lines[0].endswith(f"stacks of all ranks are in {run}/stacks")
    stacks = [(run / "stacks" / f"rank{rank:05d}.txt").read_text() for rank in range(2)]
    assert "in fetch" in stacks[1] and "in _train" in stacks[0]
    assert json.loads((run / "attempts.jsonl").read_text()).keys() >= {
        "time",
        "job",
        "restart",
        "images",
        "world",
        "host",
    }

    starts.train(tmp_path / "logs", str(config), world=2).wait().ok()  # goes on, and keeps the evidence
    assert (run / "stacks.before" / "rank00001.txt").exists()


def test_a_stopped_rank_is_named_and_the_command_ends_with_70(few: Path, tmp_path: Path) -> None:
    config, run = write_config(tmp_path / "run.yaml", "vae", data=few), tmp_path / "run"
    argv = [sys.executable, "-m", "launch.cli", "train", str(config), "--processes", "2", "log.hang_after=3"]
    with subprocess.Popen(
        [*argv, "images=100_000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        while process.poll() is None and not saved(run):
            time.sleep(0.01)
        pids = [int(word) for word in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        os.kill(pids[1], signal.SIGSTOP)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 70
    assert f"rank 1 (process {pids[1]} on {place.host()}) is stopped (SIGSTOP or a debugger)" in err
    assert err.count("\n") == 1, err
    assert "Thread" in (run / "stacks" / "rank00000.txt").read_text()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_killed_rank_ends_its_peer_in_seconds_without_a_launcher(few: Path, tmp_path: Path) -> None:
    config, run = write_config(tmp_path / "run.yaml", "vae", data=few), tmp_path / "run"
    started = starts.train(tmp_path / "logs", str(config), "images=100_000", world=2)
    while started.running() and not saved(run):
        time.sleep(0.01)
    started.kill(only=1)
    began = time.monotonic()
    started.ranks[0].join(60)
    assert time.monotonic() - began < 20
    ended = started.wait()
    assert ended.codes == [1, -signal.SIGKILL]
    assert re.search("closed by peer|reset by peer|broken pipe", ended.err.lower()), ended


def test_a_slow_rank_that_comes_on_and_a_suspended_process_have_not_hung(few: Path, tmp_path: Path) -> None:
    config, run = write_config(tmp_path / "run.yaml", "vae", data=few), tmp_path / "run"
    started = starts.train(tmp_path / "logs", str(config), "log.hang_after=2", "images=2_000", "checkpoint.every=480")
    while started.running() and not saved(run):
        time.sleep(0.01)
    started.kill(signal.SIGSTOP)  # `scontrol suspend`
    time.sleep(5)
    started.kill(signal.SIGCONT)
    started.wait().ok()
    told = json.loads((run / "heartbeats" / "rank00000.json").read_text())
    assert (told["images"], told["total"], told["at"]) == (2000, 2000, "end")
    assert told["images_per_second"] > 0 and told["save_seconds"] > 0


@pytest.mark.parametrize("key", ["log.hang_after=-1", "checkpoint.notice=0"])
def test_bounds_of_the_keys(key: str, tmp_path: Path, few: Path) -> None:
    config = write_config(tmp_path / "run.yaml", "vae", data=few)
    starts.train(tmp_path / "logs", str(config), key).wait().refused(key.partition("=")[0])

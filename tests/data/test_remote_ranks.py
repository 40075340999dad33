"""Several processes of one machine: a shard is fetched once, also when the one that fetches it is killed."""

import hashlib
import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from tests.data.server import Fault, Server, serving, until
from trainer.data import ShardsConfig
from trainer.data.config import RemoteConfig
from trainer.data.index import Shard
from trainer.data.store import open_store

DATA = bytes(range(256)) * 2000
SHARD = Shard("0.tar", 3, len(DATA), hashlib.sha256(DATA).hexdigest(), "")


def fetch(url: str, cache: Path, here: Event) -> None:
    """One rank; its exit code is 0 when it read the shard's bytes."""
    config = ShardsConfig(path=url, size=8, remote=RemoteConfig(cache=cache, timeout=20))
    here.set()
    found = open_store(config, url, "train").open(SHARD)
    os._exit(0 if os.pread(found.fd, found.bytes + 1, 0) == DATA else 1)


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imports torch once
    return context


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as found:
        found.files["set/train/0.tar"] = DATA
        yield found


def start(processes: ForkServerContext, server: Server, cache: Path) -> ForkServerProcess:
    here = processes.Event()
    process = processes.Process(target=fetch, args=(server.url, cache, here))
    process.start()
    assert here.wait(60)
    return process


def ended(process: ForkServerProcess) -> int | None:
    process.join(60)
    code = process.exitcode
    process.kill()
    process.close()
    return code


def test_ranks_that_want_one_shard_at_once_fetch_each_byte_once(
    processes: ForkServerContext, server: Server, tmp_path: Path
) -> None:
    hold = Fault(hold=100_000)
    server.faults = [hold]
    ranks = [start(processes, server, tmp_path) for _ in range(4)]
    until(lambda: hold.times == 0)
    hold.released.set()
    assert [ended(rank) for rank in ranks] == [0, 0, 0, 0]
    assert [(asked.start, asked.sent) for asked in server.asked] == [(0, len(DATA))]


def test_a_rank_takes_over_from_one_that_was_killed(
    processes: ForkServerContext, server: Server, tmp_path: Path
) -> None:
    server.faults = [Fault(hold=100_000)]
    first = start(processes, server, tmp_path)
    until(lambda: any(path.stat().st_size == 100_000 for path in tmp_path.rglob("*.part")))
    second = start(processes, server, tmp_path)
    first.kill()
    assert ended(first) == -9
    assert ended(second) == 0
    assert [asked.start for asked in server.asked] == [0, 100_000]
    assert server.asked[1].sent == len(DATA) - 100_000

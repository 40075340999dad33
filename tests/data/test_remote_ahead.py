"""Shards are fetched before they are opened, and what goes wrong then is told when they are."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.served import SHARDS, cached, content, opened, read, unknown
from tests.data.server import Fault, Server, serving, until
from trainer.data.index import Shard


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as found:
        for number in range(4):
            found.files[f"set/train/{number}.tar"] = content(number)
        yield found


def test_shards_are_fetched_ahead_in_order(server: Server, tmp_path: Path) -> None:
    store = opened(server.url, tmp_path, ahead=1)
    store.prepare([SHARDS[2], SHARDS[3], SHARDS[0]])
    until(lambda: len(cached(tmp_path)) == 3 and not list(tmp_path.rglob("*.part")))
    begun = [asked.path[-5:] for asked in server.asked if asked.start == 0]
    assert begun == ["2.tar", "3.tar", "0.tar"]
    assert read(store.open(SHARDS[3])) == content(3)
    assert server.sent("3.tar") == len(content(3))
    store.close()


def test_what_is_no_longer_wanted_is_not_fetched(server: Server, tmp_path: Path) -> None:
    hold = Fault(on="0.tar", hold=1000)
    server.faults = [hold]
    store = opened(server.url, tmp_path, ahead=1, timeout=5)
    store.prepare(SHARDS[:3])
    until(lambda: hold.times == 0)
    store.prepare(SHARDS[3:])
    hold.released.set()
    until(lambda: len(cached(tmp_path)) == 2 and not list(tmp_path.rglob("*.part")))
    assert {asked.path[-5:] for asked in server.asked} == {"0.tar", "3.tar"}
    store.close()


def test_opening_a_shard_that_is_under_way_waits_for_it(server: Server, tmp_path: Path) -> None:
    hold = Fault(on="0.tar", hold=1000)
    server.faults = [hold]
    store = opened(server.url, tmp_path, timeout=5)
    store.prepare(SHARDS[:1])
    until(lambda: hold.times == 0)
    threading.Timer(0.2, hold.released.set).start()
    assert read(store.open(SHARDS[0])) == content(0)
    assert server.sent("0.tar") == len(content(0))
    store.close()


def test_shards_without_an_index_are_fetched_ahead_once(server: Server, tmp_path: Path) -> None:
    hold = Fault(on="0.tar", hold=1000)
    server.faults = [hold]
    store = opened(server.url, tmp_path, timeout=5)
    store.prepare([unknown("0.tar"), unknown("1.tar")])
    until(lambda: hold.times == 0)
    threading.Timer(0.2, hold.released.set).start()
    assert read(store.open(unknown("0.tar"))) == content(0)
    assert read(store.open(unknown("1.tar"))) == content(1)
    assert server.sent("0.tar") == server.sent("1.tar") == len(content(0))
    assert not list(tmp_path.rglob("*.part"))
    store.close()


def test_no_ahead_fetches_nothing_before_it_is_opened(server: Server, tmp_path: Path) -> None:
    store = opened(server.url, tmp_path, ahead=0)
    before = threading.active_count()
    store.prepare(SHARDS)
    assert threading.active_count() == before
    assert read(store.open(SHARDS[0])) == content(0)
    assert [asked.path for asked in server.asked if not asked.path.endswith("0.tar")] == []


def test_what_fails_ahead_is_raised_when_the_shard_is_opened(server: Server, tmp_path: Path) -> None:
    server.faults = [Fault(on="0.tar", status=403, times=2)]
    store = opened(server.url, tmp_path, ahead=1)
    store.prepare(SHARDS[:2])
    until(lambda: any(name.startswith("1.") and name.endswith("tar") for name in cached(tmp_path)))
    with pytest.raises(ValueError, match=r"0\.tar: is refused, or not there \(403"):
        store.open(SHARDS[0])
    assert read(store.open(SHARDS[0])) == content(0)  # the server has thought better of it
    store.close()


def test_a_store_that_is_closed_ends_what_is_under_way(server: Server, tmp_path: Path) -> None:
    hold = Fault(on="0.tar", hold=1000)
    server.faults = [hold]
    store = opened(server.url, tmp_path, timeout=5)
    before = set(threading.enumerate())  # stores of other tests may still be at work

    def fetching() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "fetch" and thread not in before]

    store.prepare(SHARDS)
    until(lambda: hold.times == 0)
    assert fetching()
    store.close()
    hold.released.set()
    until(lambda: not fetching())
    with pytest.raises(OSError, match=r"the stream was closed while a shard was fetched"):
        store.open(Shard("9.tar", 1, 9, "0" * 64, ""))

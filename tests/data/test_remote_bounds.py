"""What a source may cost: bytes on the disk, and pauses while it fails."""

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.served import SHARDS, content, opened, read, unknown
from tests.data.server import Fault, Server, serving, until
from trainer.data import fetched, remote

SIZE = len(content(0))


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as found:
        for number in range(6):
            found.files[f"set/train/{number}.tar"] = content(number)
        yield found


def on_disk(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())


@pytest.mark.parametrize("unstated", [True, False])
@pytest.mark.parametrize("name", ["index.json", "0.idx.npy"])
def test_no_index_is_without_end(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unstated: bool, name: str
) -> None:
    monkeypatch.setattr(fetched, "_SMALL", 1 << 20)
    monkeypatch.setattr(remote, "BLOCK", 1 << 16)
    server.files["set/train/index.json"] = b"{}"
    server.files[f"set/train/{name}"] = bytes(8 << 20)
    server.faults = [Fault(on=name, unstated=True, times=99)] if unstated else []
    store = opened(server.url, tmp_path)
    with pytest.raises(ValueError, match=rf"^http://[^ ]*/{name}: is larger than 1,048,576 bytes, which no index is"):
        store.file(name)
    assert len(server.of(name)) == 1  # asked once: it does not pass
    assert on_disk(tmp_path) <= 2  # index.json, where that is not the large one


@pytest.mark.parametrize("unstated", [True, False])
def test_shards_of_unknown_size_keep_to_the_bound_of_the_cache(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unstated: bool
) -> None:
    monkeypatch.setattr(fetched, "_STEP", 1 << 14)
    limit = int(2.5 * SIZE)
    server.faults = [Fault(on=".tar", unstated=True, times=99)] if unstated else []
    store = opened(server.url, tmp_path, cache_gb=limit / 1e9)
    for number in range(6):
        store.prepare([unknown(f"{number}.tar")])
        assert read(store.open(unknown(f"{number}.tar"))) == content(number)
        assert on_disk(tmp_path) <= limit
    store.close()


def test_a_shard_of_unknown_size_that_the_cache_cannot_hold_is_named_before_it_is_there(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetched, "_STEP", 1 << 14)
    monkeypatch.setattr(remote, "BLOCK", 1 << 14)
    store = opened(server.url, tmp_path, cache_gb=SIZE / 2 / 1e9)
    with pytest.raises(ValueError, match=r"^data\.remote\.cache_gb: .*two windows of shards"):
        store.open(unknown("0.tar"))
    assert on_disk(tmp_path) <= SIZE / 2


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of each pause between tries; none is waited for."""
    found: list[float] = []

    class Impatient(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            if timeout is None:
                return super().wait()
            found.append(timeout)
            return self.is_set()

    monkeypatch.setattr(fetched.threading, "Event", Impatient)
    return found


def test_pauses_double_to_a_minute_and_spread(server: Server, tmp_path: Path, pauses: list[float]) -> None:
    server.faults = [Fault(on="0.tar", status=503, times=99)]
    store = opened(server.url, tmp_path, timeout=60, retries=9)
    random.seed(0)
    with pytest.raises(OSError, match="10 times in a row"):
        store.open(SHARDS[0])
    steps = [min(2.0**number, 60.0) for number in range(9)]  # s: the first is a 60th of data.remote.timeout
    spread = [pause / step for pause, step in zip(pauses, steps, strict=True)]
    assert all(0.5 <= share <= 1.5 for share in spread), pauses
    assert max(spread) - min(spread) > 0.1  # ranks that failed together do not come back together


def test_a_server_that_asks_for_time_gets_it(server: Server, tmp_path: Path, pauses: list[float]) -> None:
    server.faults = [Fault(on="0.tar", status=429, retry_after=7), Fault(on="0.tar", status=503, retry_after=9999)]
    assert read(opened(server.url, tmp_path, timeout=0.6).open(SHARDS[0])) == content(0)
    assert pauses == [7.0, 60.0]  # a minute at most


@pytest.mark.parametrize("name", ["index.json", "0.tar"])
def test_a_server_that_drips_is_given_up(server: Server, tmp_path: Path, name: str) -> None:
    server.files["set/train/index.json"] = bytes(4096)
    server.faults = [Fault(on=name, drip=0.05, times=99)]
    store = opened(server.url, tmp_path, timeout=0.3, retries=1)
    with pytest.raises(OSError, match=rf"{name}: gave \d+ bytes in 0\.3 s, fewer than 65,536, 2 times in a row"):
        store.open(SHARDS[0]) if name == "0.tar" else store.file(name)


def test_a_slow_server_that_brings_enough_is_waited_for(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetched, "_LEAST", 4)
    server.files["set/train/index.json"] = bytes(40)
    server.faults = [Fault(on="index.json", drip=0.03, times=99)]
    store = opened(server.url, tmp_path, timeout=0.4, retries=0)
    assert store.file("index.json").stat().st_size == 40  # longer than three times the time-out
    assert len(server.of("index.json")) == 1


def test_who_waits_for_a_shard_can_say_how_much_is_there(server: Server, tmp_path: Path) -> None:
    hold = Fault(on="0.tar", hold=70_000)
    server.faults = [hold]
    store = opened(server.url, tmp_path, timeout=60)
    assert store.progress(SHARDS[0]) == "0 of 200,000 bytes"
    store.prepare([SHARDS[0]])
    until(lambda: store.progress(SHARDS[0]) == "70,000 of 200,000 bytes")
    hold.released.set()
    assert read(store.open(SHARDS[0])) == content(0)
    store.close()


def test_a_list_of_files_is_not_without_end(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_LISTING", 1 << 20)
    server.faults = [Fault(on="train/", endless=True, times=99)]
    with pytest.raises(ValueError, match=r"^http://.*/set/train/: its list of files is larger than 1,048,576 bytes"):
        opened(server.url, tmp_path, timeout=60).shards()
    assert len(server.of("train/")) == 1


def test_links_of_a_page_that_lead_elsewhere_are_no_shards(server: Server, tmp_path: Path) -> None:
    page = (
        b'<A class="x" HREF=\'1.tar\'>1</a> <a href="./2.tar">2</a> <a href=/set/train/3.tar?C=M>3</a>'
        b'<a href="../other/4.tar">4</a> <a href="http://elsewhere/set/train/5.tar">5</a> <a href="/6.tar">6</a>'
        b'<a href="%C3%A9&amp;%20a.tar">7</a> <a href="sub/8.tar">8</a> <a href="._1.tar">9</a> <a href="x.json">x</a>'
    )
    server.files["set/train/"] = page
    assert opened(server.url, tmp_path).shards() == ["1.tar", "2.tar", "3.tar", "\u00e9& a.tar"]

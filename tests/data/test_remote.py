"""Shards behind a URL, from a real server that misbehaves: fetched whole, verified, or named."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.served import SHARDS, cached, content, opened, read, shard_of
from tests.data.server import Fault, Server, serving
from trainer.data import remote
from trainer.data.store import Store

BLOCK = 1 << 16  # bytes of a request here


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BLOCK", BLOCK)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as found:
        for number in range(4):
            found.files[f"set/train/{number}.tar"] = content(number)
        yield found


@pytest.fixture
def store(server: Server, tmp_path: Path) -> Iterator[Store]:
    found = opened(server.url, tmp_path)
    yield found
    found.close()


def test_a_shard_is_fetched_once_in_ranges_and_kept(server: Server, store: Store, tmp_path: Path) -> None:
    assert read(store.open(SHARDS[1])) == content(1)
    assert [asked.start for asked in server.of("1.tar")] == [0, BLOCK, 2 * BLOCK, 3 * BLOCK]
    assert read(store.open(SHARDS[1])) == content(1)
    assert read(opened(server.url, tmp_path).open(SHARDS[1])) == content(1)
    assert server.sent("1.tar") == len(content(1))
    assert store.name == f"{server.url}/train"


def test_ranges_of_compressed_answers_are_not_asked_for(server: Server, store: Store) -> None:
    store.open(SHARDS[0])
    assert {asked.headers["Accept-Encoding"] for asked in server.of("0.tar")} == {"identity"}


def test_small_files_belong_to_the_index_that_names_them(server: Server, tmp_path: Path) -> None:
    server.files |= {"set/train/index.json": b'{"a": 1}', "set/train/0.idx.npy": b"first"}
    first = opened(server.url, tmp_path)
    assert json.loads(first.file("index.json").read_text()) == {"a": 1}
    assert first.file("0.idx.npy").read_bytes() == b"first"
    assert first.file("0.idx.npy").read_bytes() == b"first"
    assert len(server.of("0.idx.npy")) == len(server.of("index.json")) == 1
    server.files |= {"set/train/index.json": b'{"a": 2}', "set/train/0.idx.npy": b"second"}
    assert first.file("0.idx.npy").read_bytes() == b"first"
    second = opened(server.url, tmp_path)
    assert second.file("0.idx.npy").read_bytes() == b"second"
    with pytest.raises(FileNotFoundError, match=r"/set/train/none\.npy: is not there"):
        second.file("none.npy")
    assert not list(tmp_path.rglob("*.part"))


def test_an_index_that_changes_while_it_is_fetched_is_named(server: Server, store: Store) -> None:
    server.files["set/train/index.json"] = bytes(100_000)

    def change(path: str) -> None:
        if server.of("index.json"):
            server.files["set/train/index.json"] = bytes(99_999)

    server.before = change
    with pytest.raises(OSError, match=r"index\.json: has 99,999 bytes, .*it changed while it was fetched; start again"):
        store.file("index.json")


def test_an_index_that_was_removed_from_the_cache_is_fetched_again(server: Server, store: Store) -> None:
    server.files["set/train/index.json"] = b"{}"
    store.file("index.json").unlink()
    assert store.file("index.json").read_bytes() == b"{}"


def test_a_set_without_an_index_says_so(store: Store) -> None:
    with pytest.raises(FileNotFoundError, match=r"index\.json: is not there"):
        store.file("index.json")


def test_a_server_without_ranges_sends_a_shard_once(server: Server, store: Store) -> None:
    server.faults = [Fault(on=".tar", whole=True, times=99)]
    assert read(store.open(SHARDS[0])) == content(0)
    assert len(server.of("0.tar")) == 1


def test_a_server_that_states_no_length_is_read_to_the_end(server: Server, store: Store) -> None:
    server.faults = [Fault(unstated=True, times=99)]
    server.files["set/train/index.json"] = b"{}"
    assert read(store.open(SHARDS[0])) == content(0)
    assert store.file("index.json").read_bytes() == b"{}"


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=503, times=2), Fault(status=500, times=2), Fault(status=429, retry_after=0, times=2),
        Fault(other_range=True, times=2), Fault(cut=0, times=2), Fault(stall=0, times=2),
        Fault(mute=True, times=2),
    ],
    ids=["503", "500", "429", "other range", "cut", "stalled", "mute"],
)  # fmt: skip
def test_a_request_that_fails_is_made_again(server: Server, store: Store, fault: Fault) -> None:
    server.faults = [fault]
    assert read(store.open(SHARDS[0])) == content(0)
    assert fault.times == 0
    assert server.sent("0.tar") == len(content(0)) or fault.other_range


@pytest.mark.parametrize("fault", [Fault(cut=50_000), Fault(stall=50_000)], ids=["cut", "stalled"])
def test_a_broken_download_goes_on_where_it_broke(server: Server, store: Store, fault: Fault) -> None:
    server.faults = [fault]
    assert read(store.open(SHARDS[0])) == content(0)
    assert [asked.start for asked in server.of("0.tar")][:2] == [0, 50_000]
    assert server.sent("0.tar") == len(content(0))


def test_a_line_that_breaks_all_the_time_but_brings_bytes_is_good_enough(server: Server, tmp_path: Path) -> None:
    data = content(9, 1_000_000)
    server.files["set/train/9.tar"] = data
    server.faults = [Fault(cut=BLOCK, whole=True, times=1), Fault(cut=70_000, times=99)]
    remote.BLOCK = 1 << 20
    found = opened(server.url, tmp_path, retries=1).open(shard_of("9.tar", data))
    assert read(found) == data
    assert server.sent("9.tar") == len(data)


def test_a_server_that_stays_away_is_named(server: Server, store: Store, tmp_path: Path) -> None:
    server.faults = [Fault(on="0.tar", status=503, times=99)]
    with pytest.raises(OSError, match=r"/set/train/0\.tar: answered 503 Service Unavailable, 3 times in a row; see wh"):
        store.open(SHARDS[0])
    assert len(server.of("0.tar")) == 3
    server.faults = [Fault(on="0.tar", stall=10, times=99)]
    with pytest.raises(OSError, match=r"0\.tar: gave no byte for 0\.4 s, 3 times"):
        store.open(SHARDS[0])
    server.faults = []
    assert read(store.open(SHARDS[0])) == content(0)


def test_a_server_that_cannot_be_reached_is_named(server: Server, tmp_path: Path) -> None:
    with serving() as other:
        url = other.url
    with pytest.raises(OSError, match=r"/set/train/0\.tar: failed \(ClientConnectorError: .*\), 2 times in a row"):
        opened(url, tmp_path, retries=1).open(SHARDS[0])


def test_what_was_fetched_is_kept_for_the_next_run(server: Server, tmp_path: Path) -> None:
    server.faults = [Fault(cut=50_000), Fault(status=503, times=99)]
    with pytest.raises(OSError, match="503"):
        opened(server.url, tmp_path).open(SHARDS[0])
    server.faults = []
    assert read(opened(server.url, tmp_path).open(SHARDS[0])) == content(0)
    assert server.sent("0.tar") == len(content(0))


def test_a_begun_download_of_another_shard_is_not_gone_on_with(server: Server, tmp_path: Path) -> None:
    server.faults = [Fault(cut=50_000), Fault(status=503, times=99)]
    with pytest.raises(OSError, match="503"):
        opened(server.url, tmp_path).open(SHARDS[0])
    server.faults = []
    renewed = content(77)
    server.files["set/train/0.tar"] = renewed
    assert read(opened(server.url, tmp_path).open(shard_of("0.tar", renewed))) == renewed
    assert server.of("0.tar")[-4].start == 0


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (content(5), r"has the sha256 [0-9a-f]{16}\.\.\., its index says"),
        (content(0) + b"x", r"has 200,001 bytes, its index says 200,000"),
        (content(0)[:-1], r"has 199,999 bytes, its index says 200,000"),
    ],
    ids=["bytes", "longer", "shorter"],
)
def test_a_shard_that_changed_is_named_after_a_second_download(
    server: Server, store: Store, tmp_path: Path, other: bytes, words: str
) -> None:
    server.files["set/train/0.tar"] = other
    with pytest.raises(ValueError, match=rf"/set/train/0\.tar: {words}.*changed since its index was made; copy"):
        store.open(SHARDS[0])
    assert sum(asked.start == 0 for asked in server.of("0.tar")) == 2
    assert cached(tmp_path) == []


def test_a_shard_that_shrank_while_it_was_fetched_is_named(server: Server, tmp_path: Path) -> None:
    server.faults = [Fault(cut=50_000), Fault(status=503, times=99)]
    with pytest.raises(OSError, match="503"):
        opened(server.url, tmp_path).open(SHARDS[0])
    server.faults = []
    server.files["set/train/0.tar"] = b"short"
    with pytest.raises(ValueError, match=r"0\.tar: has 5 bytes, its index says 200,000.*changed since"):
        opened(server.url, tmp_path).open(SHARDS[0])


def test_a_download_that_was_spoilt_once_is_made_again(server: Server, store: Store) -> None:
    server.files["set/train/0.tar"] = content(5)
    seen: list[str] = []

    def heal(path: str) -> None:
        seen.append(path)
        if len(seen) > 4:
            server.files["set/train/0.tar"] = content(0)

    server.before = heal
    assert read(store.open(SHARDS[0])) == content(0)


def test_a_server_that_lies_about_the_length_is_asked_again(server: Server, store: Store) -> None:
    server.faults = [Fault(longer=100)]
    assert read(store.open(SHARDS[0])) == content(0)
    server.faults = [Fault(longer=100, times=99)]
    with pytest.raises(ValueError, match=r"1\.tar: has 200,100 bytes, its index says 200,000"):
        store.open(SHARDS[1])

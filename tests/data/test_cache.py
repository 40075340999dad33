"""The folder of fetched shards: bounded, shared, never mixed up; and its errors."""

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.server import until
from trainer import durable
from trainer.data.cache import Cache
from trainer.data.config import RemoteConfig
from trainer.data.fetched import Fetched
from trainer.data.growing import Part
from trainer.data.index import Shard

KB = 1000


class Given:
    """A source that gives `NUMBER.tar`: bytes of that number."""

    def __init__(self, sizes: dict[str, int], *, key: str = "given") -> None:
        self.name, self.key, self.sizes = "given://set/train", key, sizes
        self.fetched: Counter[str] = Counter()

    def names(self) -> list[str]:
        return list(self.sizes)

    def data(self, name: str) -> bytes:
        return (name.encode() * self.sizes[name])[: self.sizes[name]]

    def more(self, name: str, part: Part) -> bool:
        self.fetched[name] += 1
        part.write(self.data(name)[part.bytes :])
        return True

    def shard(self, number: int) -> Shard:
        name = f"{number}.tar"
        return Shard(name, 1, self.sizes[name], hashlib.sha256(self.data(name)).hexdigest(), "")


def given_sizes(*sizes: int) -> Given:
    return Given({f"{number}.tar": size for number, size in enumerate(sizes)})


def store_of(source: Given, cache: Path, *, kb: float = 1000, **options: Any) -> Fetched:
    return Fetched(source, RemoteConfig(cache=cache, cache_gb=kb / 1e6, timeout=0.3, **options))


def numbers(cache: Path) -> list[int]:
    return sorted(int(path.name.partition(".")[0]) for path in cache.rglob("*.tar"))


def test_the_shard_that_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    source = given_sizes(*[100 * KB] * 4)
    store = store_of(source, tmp_path, kb=350)
    for number in (0, 1, 2, 0, 3):
        store.open(source.shard(number)).close()
    assert numbers(tmp_path) == [0, 2, 3]


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=6),
    asked=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    limit=st.integers(40, 120),
)
def test_the_cache_stays_within_its_bound_and_gives_the_right_bytes(
    sizes: list[int], asked: list[int], limit: int
) -> None:
    source = given_sizes(*(size * KB for size in sizes))
    kept: list[int] = []  # the reference: used longest ago first
    with tempfile.TemporaryDirectory() as folder:
        store = store_of(source, Path(folder), kb=limit)
        for number in (number % len(sizes) for number in asked):
            found = store.open(source.shard(number))
            assert os.pread(found.fd, found.bytes + 1, 0) == source.data(f"{number}.tar")
            found.close()
            kept = [*(other for other in kept if other != number), number]
            while sum(sizes[other] for other in kept) > limit:
                kept.pop(0)
            assert numbers(Path(folder)) == sorted(kept)


def test_an_open_shard_is_kept_whoever_opened_it(tmp_path: Path) -> None:
    source = given_sizes(*[100 * KB] * 3)
    found = store_of(source, tmp_path, kb=250).open(source.shard(0))
    other = store_of(source, tmp_path, kb=250)
    for number in (1, 2):
        other.open(source.shard(number)).close()
    assert numbers(tmp_path) == [0, 2]
    found.close()
    other.open(source.shard(1)).close()
    assert numbers(tmp_path) == [1, 2]


def test_readers_keep_what_they_opened_when_its_file_must_go(tmp_path: Path) -> None:
    source = given_sizes(*[100 * KB] * 4)
    store = store_of(source, tmp_path, kb=250)
    found = [store.open(source.shard(number)) for number in range(4)]
    assert numbers(tmp_path) == [2, 3]
    for number, shard in enumerate(found):
        assert os.pread(shard.fd, shard.bytes, 0) == source.data(f"{number}.tar")


def test_a_bound_below_a_shard_is_named_and_nothing_removed(tmp_path: Path) -> None:
    source = given_sizes(10 * KB, 100 * KB)
    store = store_of(source, tmp_path, kb=50)
    store.open(source.shard(0)).close()
    with pytest.raises(ValueError, match=r"^data\.remote\.cache_gb: 5e-05 cannot hold the shards in use and 1\.\w+"):
        store.open(source.shard(1))
    assert numbers(tmp_path) == [0]


def test_the_window_in_use_is_kept(tmp_path: Path) -> None:
    source = given_sizes(*[100 * KB] * 5)
    store = store_of(source, tmp_path, kb=350, ahead=1)
    store.prepare([source.shard(number) for number in (0, 1, 2)])
    until(lambda: numbers(tmp_path) == [0, 1, 2])
    other = store_of(source, tmp_path, kb=350, ahead=1)
    other.prepare([source.shard(3)])  # of another rank, say: the oldest goes
    until(lambda: numbers(tmp_path) == [1, 2, 3])
    store.prepare([source.shard(number) for number in (2, 3, 4)])
    until(lambda: numbers(tmp_path) == [2, 3, 4])
    store.prepare([source.shard(number) for number in (2, 3, 4, 0)])  # more than there is room for
    time.sleep(0.3)
    assert numbers(tmp_path) == [2, 3, 4]
    other.close()
    store.close()


def test_a_shard_that_is_needed_now_takes_the_room_of_those_that_are_only_prepared(tmp_path: Path) -> None:
    source = given_sizes(*[100 * KB] * 5)
    store = store_of(source, tmp_path, kb=350, ahead=1)
    store.prepare([source.shard(number) for number in (0, 1, 2)])
    until(lambda: numbers(tmp_path) == [0, 1, 2])
    found = store.open(source.shard(3))
    assert os.pread(found.fd, found.bytes + 1, 0) == source.data("3.tar")
    assert len(numbers(tmp_path)) == 3
    store.close()


def test_a_shard_that_is_needed_now_waits_for_room_that_others_fetch_into(tmp_path: Path) -> None:
    source = given_sizes(*[100 * KB] * 3)
    store = store_of(source, tmp_path, kb=150)
    cache = store._cache  # type: ignore[attr-defined]
    part = cache.claim(cache.path("1.tar", "1" * 64), 100 * KB, stopped=lambda: False, patience=9)
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(store.open(source.shard(0)).bytes))
    thread.start()
    time.sleep(0.3)
    assert not found
    part.close(remove=True)
    thread.join(30)
    assert found == [100 * KB]


def test_shards_of_two_sources_and_of_two_indexes_are_not_mixed(tmp_path: Path) -> None:
    first = Given({"0.tar": 100})
    second = Given({"0.tar": 100}, key="another")
    renewed = Given({"0.tar": 101})
    for source in (first, second, renewed):
        found = store_of(source, tmp_path).open(source.shard(0))
        assert os.pread(found.fd, 200, 0) == source.data("0.tar")
        assert source.fetched == {"0.tar": 1}
    assert numbers(tmp_path) == [0, 0, 0]


def test_a_shard_that_was_cut_in_the_cache_is_fetched_again(tmp_path: Path) -> None:
    source = given_sizes(1000)
    store = store_of(source, tmp_path)
    store.open(source.shard(0)).close()
    os.truncate(next(tmp_path.rglob("*.tar")), 10)
    assert store.open(source.shard(0)).bytes == 1000
    assert source.fetched == {"0.tar": 2}


def test_a_begun_shard_counts_with_the_bytes_that_it_will_have(tmp_path: Path) -> None:
    source = given_sizes(*[100 * KB] * 3)
    store = store_of(source, tmp_path, kb=350)
    for number in (0, 1):
        store.open(source.shard(number)).close()
    cache = Cache(tmp_path, "another", limit=350 * KB)
    part = cache.claim(cache.path("big.tar", "0" * 64), 200 * KB, stopped=lambda: False, patience=1)
    assert part is not None
    part.write(b"x")
    store.open(source.shard(2)).close()
    assert numbers(tmp_path) == [2]
    part.close()


def test_a_file_that_nobody_fetches_any_more_makes_room(tmp_path: Path) -> None:
    cache = Cache(tmp_path, "another", limit=KB)
    part = cache.claim(cache.path("old.tar", "0" * 64), 200 * KB, stopped=lambda: False, patience=1)
    assert part is not None
    part.write(b"x")
    part.close()
    source = given_sizes(100 * KB)
    store_of(source, tmp_path, kb=250).open(source.shard(0)).close()
    assert not list(tmp_path.rglob("*.part"))


def test_what_somebody_else_put_there_is_removed_in_its_turn(tmp_path: Path) -> None:
    source = given_sizes(*[100 * KB] * 2)
    store = store_of(source, tmp_path, kb=250)
    store.open(source.shard(0)).close()
    for name in ("notes.part", "x.y.part", ".part"):
        (tmp_path / "remote" / name).write_bytes(bytes(60 * KB))
    store.open(source.shard(1)).close()
    assert numbers(tmp_path) == [1]


def test_a_process_that_is_stopped_while_it_fetches_is_named(tmp_path: Path) -> None:
    cache = Cache(tmp_path, "set", limit=KB)
    path = cache.path("0.tar", "0" * 64)
    part = cache.claim(path, 10, stopped=lambda: False, patience=1)
    assert part is not None
    with pytest.raises(
        TimeoutError, match=r"0\.0{16}\.tar\.10\.part: another process fetches it and got nothing for 0"
    ):
        cache.claim(path, 10, stopped=lambda: False, patience=0.1)
    part.close()


@pytest.mark.parametrize("name", ["../x.tar", "a/b.tar", ".hidden.tar", ""])
def test_names_of_an_index_do_not_leave_the_cache(name: str, tmp_path: Path) -> None:
    store = store_of(given_sizes(1), tmp_path)
    with pytest.raises(ValueError, match="is no name of a file of a set"):
        store.open(Shard(name, 1, 1, "0" * 64, ""))
    with pytest.raises(ValueError, match="is no name of a file of a set"):
        store.file(name)


class Trouble(NamedTuple):
    words: str
    make: Callable[[Path, pytest.MonkeyPatch], Path]
    """Brings it about and returns the cache's folder."""


def _is_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (folder / "file").touch()
    return folder / "file"


def _fills_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    return folder


def _is_full(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    usage = shutil.disk_usage(folder)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    return folder


def _has_no_locks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def none(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    return folder


@pytest.mark.parametrize(
    "trouble",
    [
        Trouble(r"file/remote cannot be used \(Not a directory\); name another folder", _is_a_file),
        Trouble(r"remote/.* cannot be used \(No space left on device\); .* or free its disk", _fills_up),
        Trouble(r"remote has 1e-08 GB free, 0\..*\.tar\.1000\.part needs 1e-06; free some or name", _is_full),
        Trouble(r"remote is on a disk without file locks; name another", _has_no_locks),
    ],
    ids=lambda trouble: trouble.make.__name__,
)
def test_a_folder_that_cannot_be_used_is_named_with_its_key(
    trouble: Trouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = given_sizes(1000)
    store = store_of(source, trouble.make(tmp_path, monkeypatch))
    with pytest.raises(ValueError, match=rf"^data\.remote\.cache: {tmp_path}/?{trouble.words}"):
        store.open(source.shard(0))


def test_a_disk_smaller_than_the_bound_is_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = given_sizes(*[100 * KB] * 3)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        shutil,
        "disk_usage",
        lambda path: usage._replace(free=250 * KB - sum(p.stat().st_size for p in tmp_path.rglob("*.tar"))),
    )
    store = store_of(source, tmp_path)
    for number in (0, 1, 2):
        store.open(source.shard(number)).close()
    assert numbers(tmp_path) == [1, 2]


def test_the_bound_holds_while_others_finish_their_files(tmp_path: Path) -> None:
    """A file that gets its name in the moment in which another one's room is made neither goes uncounted nor counts as
    removed: ten stores (as many processes) fetch all at once into room for a third."""
    source = given_sizes(*[KB] * 120)
    stores = [store_of(source, tmp_path, kb=40) for _ in range(10)]

    def fetch(number: int) -> None:
        stores[number % 10].open(source.shard(number)).close()

    for numbers_now in (range(60), range(60, 90), range(90, 120)):
        with ThreadPoolExecutor(10) as pool:
            list(pool.map(fetch, numbers_now))
        assert 30 <= len(numbers(tmp_path)) <= 40


def test_a_shard_that_was_written_to_in_the_cache_is_fetched_again(tmp_path: Path) -> None:
    source = given_sizes(*[100 * KB] * 2)
    store = store_of(source, tmp_path, kb=1000)
    store.open(source.shard(0)).close()
    (path,) = tmp_path.rglob("0.*.tar")
    path.write_bytes(bytes(100 * KB))
    found = store.open(source.shard(0))
    assert os.pread(found.fd, found.bytes + 1, 0) == source.data("0.tar")


def test_a_shard_of_the_cache_is_compared_only_where_its_time_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = given_sizes(*[100 * KB] * 2)
    store_of(source, tmp_path, kb=1000).open(source.shard(0)).close()
    (path,) = tmp_path.rglob("0.*.tar")
    compared: list[Path] = []
    sha256 = durable.sha256
    monkeypatch.setattr(durable, "sha256", lambda path: compared.append(path) or sha256(path))  # type: ignore[func-returns-value]
    for touched in (False, True, False):  # copied with the cache, say: the same bytes at another time
        if touched:
            os.utime(path)
        store = store_of(source, tmp_path, kb=1000)
        store.open(source.shard(0)).close()
        store.open(source.shard(0)).close()
    assert compared == [path]

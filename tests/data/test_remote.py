"""Shards behind a URL, from a real server that misbehaves: fetched whole, verified, or named."""

import base64
import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from tests.data.server import Fault, Server, serving, until
from trainer.data import ShardsConfig, remote
from trainer.data.config import RemoteConfig
from trainer.data.index import Shard
from trainer.data.store import OpenShard, Store, open_store

BLOCK = 1 << 16  # bytes of a request here
SECRET = "s3cr3tT0ken"


def content(number: int, size: int = 200_000) -> bytes:
    return np.random.default_rng(number).bytes(size)


def shard_of(name: str, data: bytes) -> Shard:
    return Shard(name, 3, len(data), hashlib.sha256(data).hexdigest(), "")


def unknown(name: str) -> Shard:
    return Shard(name, 0, 0, "", "")


def read(found: OpenShard) -> bytes:
    return os.pread(found.fd, found.bytes + 1, 0)


SHARDS = [shard_of(f"{number}.tar", content(number)) for number in range(4)]


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


def opened(url: str, cache: Path, **options: Any) -> Store:
    settings: dict[str, Any] = {"cache": cache, "timeout": 0.4, "retries": 2} | options
    return open_store(ShardsConfig(path=url, size=8, remote=RemoteConfig(**settings)), url, "train")


def cached(cache: Path) -> list[str]:
    """Names of whole and of begun shards in the cache."""
    return sorted(path.name for path in cache.rglob("*.tar*"))


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
    ],
    ids=["503", "500", "429", "other range", "cut", "stalled"],
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


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (404, r"is missing \(3 samples, 200,000 bytes\); copy it again"),
        (401, r"is refused, or not there \(401 Unauthorized\); credentials are given to fsspec"),
        (403, r"is refused, or not there \(403 Forbidden\); credentials are given to fsspec"),
        (400, r"cannot be had, the server answered 400 Bad Request"),
    ],
)
def test_a_refusal_is_named_at_once(server: Server, store: Store, status: int, words: str) -> None:
    server.faults = [Fault(status=status, times=99)]
    with pytest.raises(ValueError, match=rf"^http://127.0.0.1:\d+/set/train/0\.tar: {words}"):
        store.open(SHARDS[0])
    assert len(server.of("0.tar")) == 1


def test_credentials_come_from_fsspec_and_are_in_no_message(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server.authorization = f"Bearer {SECRET}"
    said: list[str] = []

    def refused(**options: Any) -> None:
        store = opened(server.url, tmp_path / "none", **options)
        for ask in (lambda: store.open(SHARDS[0]), lambda: store.file("index.json"), store.shards):
            with pytest.raises((ValueError, OSError)) as caught:
                ask()
            said.extend([str(caught.value), repr(caught.value), repr(store), store.name])

    refused()
    assert "401 Unauthorized" in said[0]
    assert "~/.config/fsspec" in said[0]
    monkeypatch.setitem(fsspec.config.conf, "http", {"headers": {"Authorization": f"Bearer {SECRET}"}})
    store = opened(server.url, tmp_path)
    assert read(store.open(SHARDS[0])) == content(0)
    server.authorization = f"Bearer {SECRET}, but another"
    server.refusal = 403
    refused()
    # a signed URL, as object stores redirect to
    signed = f"{server.url}/elsewhere.tar?X-Amz-Signature={SECRET}"
    for fault in (Fault(status=403, times=99), Fault(status=500, times=99), Fault(cut=0, times=99)):
        server.faults = [Fault(on="train/0.tar", redirect=signed, times=99), fault]
        refused()
    assert SECRET not in " ".join(said) + caplog.text


def test_credentials_come_from_netrc(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login user password {SECRET}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    server.authorization = "Basic " + base64.b64encode(f"user:{SECRET}".encode()).decode()
    assert read(opened(server.url, tmp_path).open(SHARDS[0])) == content(0)


@pytest.mark.parametrize(
    "url",
    [
        f"https://user:{SECRET}@host/set", f"https://{SECRET}@host/set", f"sftp://user:{SECRET}@host/set",
        f"https://host/set?X-Amz-Signature={SECRET}", f"s3://bucket/set?token={SECRET}", f"https://host/set#{SECRET}",
        f"https://user:{SECRET}@host/set?sig={SECRET}",
    ],
)  # fmt: skip
def test_a_credential_in_a_url_is_refused_and_not_repeated(url: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.path: \w+://(host|bucket)/set has .*~/\.config/fsspec") as caught:
        opened(url, tmp_path)
    assert SECRET not in str(caught.value) + repr(caught.value)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://bucket/set", r"s3:// needs a package that is not installed: `pip install s3fs`"),
        ("gs://bucket/set", r"gs:// needs a package that is not installed: `pip install gcsfs`"),
        ("teapot://bucket/set", r"teapot://bucket/set/train: .*not known"),
        ("file:///data/set", r"without file://"),
        ("simplecache::https://host/set", r"use no ::"),
    ],
)
def test_a_url_that_cannot_be_opened_says_what_to_do(url: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^data\.path: {url}.*{words}" if "known" not in words else words) as caught:
        opened(url, tmp_path)
    assert "\n" not in str(caught.value)


def test_http_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(protocol: str) -> None:
        raise ImportError("HTTPFileSystem requires aiohttp")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(ValueError, match=r"https:// needs a package .*`pip install aiohttp`"):
        opened("https://host/set", tmp_path)


def test_shards_without_an_index_are_listed_and_fetched(server: Server, store: Store, tmp_path: Path) -> None:
    server.files["set/train/notes.txt"] = b""
    assert store.shards() == [f"{number}.tar" for number in range(4)]
    assert read(store.open(unknown("2.tar"))) == content(2)
    assert read(store.open(unknown("2.tar"))) == content(2)
    assert read(store.open(SHARDS[2])) == content(2)  # now that its digest is known
    assert server.sent("2.tar") == len(content(2))
    assert len(cached(tmp_path)) == 1


def test_shards_that_cannot_be_listed_need_an_index(server: Server, store: Store) -> None:
    server.listing = False
    with pytest.raises(ValueError, match=r"^data\.path: http.*/set/train has no index.json.*`tandem data index`"):
        store.shards()


def test_any_file_system_of_fsspec_is_a_source(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    data = content(3, 500_000)
    memory.pipe({"/bucket/train/3.tar": data, "/bucket/train/index.json": b"{}", "/bucket/train/a.txt": b""})
    try:
        store = opened("memory://bucket", tmp_path)
        assert store.shards() == ["3.tar"]
        assert store.file("index.json").read_bytes() == b"{}"
        assert read(store.open(shard_of("3.tar", data))) == data
        with pytest.raises(FileNotFoundError, match="is not there"):
            store.file("0.idx.npy")
        with pytest.raises(ValueError, match=r"memory://bucket/train/4\.tar: is missing"):
            store.open(Shard("4.tar", 3, 9, "0" * 64, ""))
        memory.pipe("/bucket/train/3.tar", data[:-1] + b"?")
        with pytest.raises(ValueError, match=r"3\.tar: has the sha256 .*changed since"):
            opened("memory://bucket", tmp_path / "other").open(shard_of("3.tar", data))
        memory.pipe("/bucket/train/3.tar", data[:-1])
        with pytest.raises(ValueError, match=r"3\.tar: has 499,999 bytes, its index says 500,000"):
            opened("memory://bucket", tmp_path / "other").open(shard_of("3.tar", data))
        assert read(opened("memory://bucket", tmp_path / "third").open(unknown("3.tar"))) == data[:-1]
    finally:
        memory.rm("/bucket", recursive=True)


def test_a_file_system_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened("memory://bucket", tmp_path, timeout=0.1, retries=1)
    end = threading.Event()
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "info", lambda *_: end.wait() and {})
    with pytest.raises(OSError, match=r"0\.tar: gave no byte for 0\.1 s, 2 times in a row"):
        store.open(SHARDS[0])
    end.set()


def test_shards_are_fetched_ahead_in_order(server: Server, tmp_path: Path) -> None:
    store = opened(server.url, tmp_path, ahead=1)
    store.prepare(SHARDS[2:])
    store.prepare(SHARDS[:1])
    until(lambda: len(cached(tmp_path)) == 3 and not list(tmp_path.rglob("*.part")))
    begun = [asked.path[-5:] for asked in server.asked if asked.start == 0]
    assert begun == ["2.tar", "3.tar", "0.tar"]
    assert read(store.open(SHARDS[3])) == content(3)
    assert server.sent("3.tar") == len(content(3))
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
    before = threading.active_count()
    store.prepare(SHARDS)
    until(lambda: hold.times == 0)
    store.close()
    hold.released.set()
    until(lambda: not [thread for thread in threading.enumerate() if thread.name == "fetch"])
    assert threading.active_count() <= before + 8  # the server's
    with pytest.raises(OSError, match="was closed"):
        store.open(Shard("9.tar", 1, 9, "0" * 64, ""))


def test_folders_need_no_fsspec() -> None:
    import subprocess
    import sys

    code = (
        "import sys\nfrom trainer.data.store import open_store\nfrom trainer.data import ShardsConfig\n"
        "open_store(ShardsConfig(path='x', size=8), 'x', 'train')\n"
        "assert 'aiohttp' not in sys.modules and 'trainer.data.remote' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

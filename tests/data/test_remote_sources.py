"""What may stand in a URL: any file system, no credentials; and what is refused says what to do."""

import base64
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tests.data.served import SHARDS, cached, content, opened, read, shard_of, unknown
from tests.data.server import Fault, Server, serving
from trainer.data import remote
from trainer.data.index import Shard
from trainer.data.store import Store

SECRET = "s3cr3tT0ken"


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
        ("http://", r"names no host or bucket"),
        ("https:///set", r"names no host or bucket"),
        ("s3://", r"names no host or bucket"),
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


def test_any_file_system_of_fsspec_is_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BLOCK", 1 << 16)
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


def test_a_slow_line_is_asked_for_less_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    data = content(3, 1 << 20)
    memory.pipe("/slow/train/3.tar", data)
    asked: list[int] = []
    over = threading.Event()

    def slow(self: object, path: str, start: int, end: int) -> bytes:
        asked.append(end - start)
        if asked[-1] > 300_000:
            over.wait()
        return data[start:end]

    monkeypatch.setattr(type(memory), "cat_file", slow)
    monkeypatch.setattr(remote, "BLOCK", 1 << 20)
    try:
        found = opened("memory://slow", tmp_path, timeout=0.2).open(shard_of("3.tar", data))
        assert read(found) == data
    finally:
        over.set()
        memory.rm("/slow", recursive=True)
    assert asked == [1 << 20, 1 << 19, *[1 << 18] * 4]


def test_folders_need_no_fsspec() -> None:
    code = (
        "import sys\nfrom trainer.data.store import open_store\nfrom trainer.data import ShardsConfig\n"
        "open_store(ShardsConfig(path='x', size=8), 'x', 'train')\n"
        "assert 'aiohttp' not in sys.modules and 'trainer.data.remote' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

"""Shards in a folder: opened whole or named, read ahead."""

import itertools
import os
import threading
from pathlib import Path

import pytest

from tests.data.conftest import npy, numbered, write_tar
from trainer.data import ShardsConfig
from trainer.data import index as indices
from trainer.data.index import Shard
from trainer.data.store import Local, OpenShard, Store, is_folder, open_store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "set" / "train").mkdir(parents=True)
    for number in range(3):
        (tmp_path / "set" / "train" / f"{number}.tar").write_bytes(bytes([number]) * (300_000 + number))
    return tmp_path / "set"


def local(folder: Path) -> Store:
    return open_store(ShardsConfig(path=folder, size=8), folder, "train")


def shard(number: int, *, size: int | None = None, sha256: str = "0" * 64) -> Shard:
    return Shard(f"{number}.tar", 4, 300_000 + number if size is None else size, sha256, "")


def test_a_folder_gives_its_shards_and_small_files(folder: Path) -> None:
    (folder / "train" / "index.json").write_text("{}")
    store = local(folder)
    assert isinstance(store, Local)
    assert store.name == str(folder / "train")
    assert store.shards() == ["0.tar", "1.tar", "2.tar"]
    assert store.file("index.json").read_text() == "{}"
    with pytest.raises(FileNotFoundError, match="other"):
        store.file("other.json")
    found = store.open(shard(1))
    assert found.bytes == 300_001
    assert os.pread(found.fd, 4, 299_999) == b"\1\1"


def test_an_open_shard_outlives_its_store_and_its_name(folder: Path) -> None:
    store = local(folder)
    found = store.open(shard(2))
    store.close()
    (folder / "train" / "2.tar").unlink()
    assert os.pread(found.fd, 1, 0) == b"\2"


def test_a_shard_is_closed_with_its_last_reference(folder: Path) -> None:
    found = local(folder).open(shard(0))
    number = found.fd
    del found
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_a_closed_shard_leaves_the_next_file_open(folder: Path) -> None:
    found = local(folder).open(shard(0))
    found.close()
    other = OpenShard("other", os.open(folder / "train" / "1.tar", os.O_RDONLY))
    found.close()
    del found
    assert os.pread(other.fd, 1, 0) == b"\1"


def test_a_missing_shard_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"train/7\.tar: is missing \(4 samples, 300,007 bytes\); copy it again"):
        local(folder).open(shard(7))


def test_a_shard_of_another_size_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"1\.tar: has 300,001 bytes, its index says 299,999; .*tandem data index"):
        local(folder).open(shard(1, size=299_999))


def test_a_shard_without_an_index_is_opened_as_it_is(folder: Path) -> None:
    assert local(folder).open(shard(1, size=0, sha256="")).bytes == 300_001


def test_every_byte_of_prepared_shards_is_read_ahead(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A call for a whole file reads no more than the disk's readahead window, so what counts is that all is asked for.
    asked: dict[str, set[range]] = {}
    done = threading.Event()

    def advise(file: int, start: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        asked.setdefault(Path(f"/proc/self/fd/{file}").readlink().name, set()).add(range(start, start + length))
        if start + length >= 300_002 and len(asked) == 2:
            done.set()

    monkeypatch.setattr(os, "posix_fadvise", advise)
    store = local(folder)
    store.prepare([shard(0), shard(9), shard(2)])  # 9 is missing, and no matter before it is opened
    assert done.wait(10)
    store.close()
    for name, size in (("0.tar", 300_000), ("2.tar", 300_002)):
        covered = sorted((part.start, part.stop) for part in asked[name])
        assert covered[0][0] == 0
        assert covered[-1][1] >= size
        assert all(end == start for (_, end), (start, _) in itertools.pairwise(covered))
        assert max(len(part) for part in asked[name]) <= 128 << 10


def test_a_store_that_is_closed_has_no_thread_left(folder: Path) -> None:
    before = threading.active_count()
    store = local(folder)
    store.prepare([shard(0)])
    store.close()
    store.close()
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("path", "folder"),
    [("data/set", True), ("/data/a:b", True), (Path("x"), True), ("s3://b/x", False), ("pipe:cat {name}", False)],
)
def test_a_url_and_a_program_are_no_folder(path: str | Path, folder: bool) -> None:
    assert is_folder(path) is folder


# ------------------------------------------------------------------ what is no shard
def plain_set(path: Path) -> Path:
    write_tar(path / "train" / "0.tar", [("0.npy", npy(numbered(0, (2, 2, 1))))])
    return path


def first_use(path: Path) -> indices.Index:
    return indices.load(ShardsConfig(path=path, size=2), "train")


@pytest.mark.parametrize("kind", ["a pipe or a device", "a folder"])
@pytest.mark.parametrize("link", [False, True])
def test_what_is_no_file_is_named_and_never_waited_for(tmp_path: Path, kind: str, link: bool) -> None:
    path = plain_set(tmp_path / "set")
    place = tmp_path / "elsewhere" if link else path / "train" / "z.tar"
    place.mkdir() if kind == "a folder" else os.mkfifo(place)
    if link:
        (path / "train" / "z.tar").symlink_to(place)
    with pytest.raises(ValueError, match=rf"^{path}/train/z\.tar: is {kind}, no file; take it away"):
        first_use(path)
    store = Local(path / "train")
    store.prepare([Shard("z.tar", 1, 0, "", "")])
    store.close()  # the thread that reads ahead does not wait either


def test_hidden_files_are_no_shards(tmp_path: Path) -> None:
    path = plain_set(tmp_path / "set")
    for name in ("._0.tar", ".tar", ".0.tar.x.tar"):  # the first comes with every copy from a Mac
        (path / "train" / name).write_bytes(b"\0\5\x16\7" + bytes(200))
    for _ in range(2):
        assert [shard.name for shard in first_use(path).shards] == ["0.tar"]


@pytest.mark.parametrize("name", [b"a\nb.tar", b"\xff\xfe.tar", b"a\x1b[31m.tar", b"x" * 197 + b".tar"])
def test_a_name_that_an_index_cannot_hold_is_refused_before_the_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: bytes
) -> None:
    path = plain_set(tmp_path / "set")
    monkeypatch.setattr(Local, "open", lambda *_: pytest.fail("scanned"))
    (path / "train" / "0.tar").rename(path / "train" / os.fsdecode(name))
    with pytest.raises(ValueError, match=r"name for a shard.*; rename it$") as caught:
        first_use(path)
    assert str(caught.value).isprintable() and "data index" not in str(caught.value)


@pytest.mark.parametrize("name", ["a b \u00e9.tar", "x" * 196 + ".tar", "a.b.tar", "-.tar", "%41?#.tar"])
def test_any_other_name_is_read(tmp_path: Path, name: str) -> None:
    path = plain_set(tmp_path / "set")
    (path / "train" / "0.tar").rename(path / "train" / name)
    for _ in range(2):
        assert [shard.name for shard in first_use(path).shards] == [name]


def test_a_file_where_a_set_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "set").write_text("")
    with pytest.raises(ValueError, match=r"^data\.path: \S+/set is a file; name the folder"):
        first_use(tmp_path / "set")

"""Shards that are not those of their index any more: named before the first step, and not looked at twice."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer import durable
from trainer.data import ShardsConfig
from trainer.data import index as indices
from trainer.data.config import RemoteConfig
from trainer.data.index import Index

Write = Callable[..., Path]


def load(path: Path, **options: object) -> Index:
    remote = RemoteConfig(cache=path / "cache")
    return indices.load(ShardsConfig(path=path, size=2, remote=remote, **options), "train")  # type: ignore[arg-type]


@pytest.fixture
def made(tmp_path: Path, write_set: Write) -> Path:
    """A set whose shards are a minute older than its tables."""
    write_set(tmp_path / "set", [3, 2, 4])
    load(tmp_path / "set")
    for path in (tmp_path / "set" / "train").glob("*.tar"):
        written(path, time.time() - 60)
    time.sleep(0.02)  # a tick of the file system's clock: its tables are later than they
    for path in (tmp_path / "set" / "train").glob("*.npy"):
        os.utime(path)
    return tmp_path / "set"


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose sha256 was taken."""
    names: list[str] = []
    sha256 = durable.sha256

    def noted(path: Path) -> str:
        names.append(path.name)
        return sha256(path)

    monkeypatch.setattr(durable, "sha256", noted)
    return names


def written(path: Path, when: float) -> None:
    os.utime(path, (when, when))


def flip(path: Path, at: int = 700) -> None:
    """A byte of the file changes; its size does not."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_shards_that_nobody_touched_are_not_read(made: Path, compared: list[str]) -> None:
    assert load(made).samples == 9
    assert compared == []


def test_a_shard_that_changed_in_place_is_named(made: Path, compared: list[str]) -> None:
    flip(made / "train" / "0001.tar")
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"0001\.tar: its bytes changed .* renew the index with `tandem data index`"
        ):
            load(made)
    assert compared == ["0001.tar"] * 2


def test_a_shard_that_changed_and_kept_its_time_is_named(made: Path) -> None:
    shard = made / "train" / "0001.tar"
    flip(shard)
    written(shard, time.time() - 10**8)  # as cp -p, rsync -t and tar -x leave it
    with pytest.raises(ValueError, match=r"0001\.tar: its bytes changed"):
        load(made)


def test_every_shard_that_changed_is_counted(made: Path) -> None:
    for number in range(3):
        flip(made / "train" / f"000{number}.tar")
    with pytest.raises(ValueError, match=r"0000\.tar.*\n.*0001\.tar.*\n.*0002\.tar"):
        load(made)


def test_a_shard_that_was_written_again_with_the_same_bytes_is_compared_once(made: Path, compared: list[str]) -> None:
    for name in ("0000.tar", "0002.tar"):
        written(made / "train" / name, time.time())
    for _ in range(3):
        assert load(made).samples == 9
    assert sorted(compared) == ["0000.tar", "0002.tar"]


def test_of_many_processes_one_compares(made: Path, compared: list[str]) -> None:
    for path in (made / "train").glob("*.tar"):
        written(path, time.time())
    threads = [threading.Thread(target=load, args=(made,)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(compared) == ["0000.tar", "0001.tar", "0002.tar"]


def test_a_shard_from_the_future_is_compared_once(made: Path, compared: list[str]) -> None:
    written(made / "train" / "0000.tar", time.time() + 86_400)
    for _ in range(3):
        load(made)
    assert compared == ["0000.tar"]
    flip(made / "train" / "0000.tar")
    written(made / "train" / "0000.tar", time.time() + 2 * 86_400)
    with pytest.raises(ValueError, match=r"0000\.tar: its bytes changed"):
        load(made)


def test_verify_size_compares_sizes_only(made: Path, compared: list[str]) -> None:
    flip(made / "train" / "0001.tar")
    assert load(made, verify="size").samples == 9
    assert compared == []
    (made / "train" / "0001.tar").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"0001\.tar: expected 2 samples in 10,240 bytes, found 0 bytes \(about 0 samples\)"
    ):
        load(made, verify="size")


def test_a_changed_size_is_named_with_what_is_there(made: Path) -> None:
    path = made / "train" / "0002.tar"
    whole = path.read_bytes()
    for size, what in ((3 * 2048, r"about 3 samples"), (3 * 2048 - 100, "about 3 samples"), (700, "about 1 samples")):
        path.write_bytes(whole[:size])
        with pytest.raises(
            ValueError, match=rf"0002\.tar: expected 4 samples in {len(whole):,} bytes, found .*{what}\)"
        ):
            load(made)
    path.write_bytes(whole + bytes(512))
    with pytest.raises(ValueError, match=r"found 10,752 bytes \(4 samples\); copy the shard again, or renew the index"):
        load(made)
    path.write_bytes(b"x" * 600)
    with pytest.raises(ValueError, match=r"found 600 bytes \(not a whole tar\)"):
        load(made)


def test_missing_shards_are_named_and_counted(made: Path) -> None:
    for path in (made / "train").glob("*.tar"):
        path.unlink()
    with pytest.raises(ValueError, match=r"0000\.tar: is missing \(3 samples, \S+ bytes\); copy it again\n"):
        load(made)


def test_more_faults_than_fit_are_counted(tmp_path: Path, write_set: Write) -> None:
    made = write_set(tmp_path, [1] * 6)
    load(made)
    for path in (made / "train").glob("*.tar"):
        path.unlink()
    with pytest.raises(ValueError, match=r"0002\.tar: is missing .*\nand 3 more$"):
        load(made)


def test_a_cache_that_cannot_be_made_costs_only_the_lock(made: Path) -> None:
    written(made / "train" / "0000.tar", time.time())
    (made / "file").write_text("")
    config = ShardsConfig(path=made, size=2, remote=RemoteConfig(cache=made / "file"))
    assert indices.load(config, "train").samples == 9


def test_damaged_marks_are_no_marks(made: Path, compared: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "utime", refused)
    now = time.time_ns()
    (made / "train" / "0000.tar").write_bytes((made / "train" / "0000.tar").read_bytes())
    assert (made / "train" / "0000.tar").stat().st_mtime_ns >= now - 10**9
    for _ in range(2):
        load(made)
    assert compared == ["0000.tar"]
    (marks,) = (made / "cache").rglob("checked.json")
    for text in ("[", "[]", '{"0000.tar": 3}'):
        marks.write_text(text)
        load(made)
    assert compared == ["0000.tar"] * 4
    flip(made / "train" / "0000.tar")
    with pytest.raises(ValueError, match=r"0000\.tar: its bytes changed"):
        load(made)


# ------------------------------------------------------------------ links, as of Hugging Face's cache, DVC, git-annex
@pytest.fixture
def linked(made: Path) -> Path:
    """The set, its shards now links into STORE."""
    (made / "store").mkdir()
    for path in sorted((made / "train").glob("*.tar")):
        path.rename(made / "store" / path.name)
        path.symlink_to(made / "store" / path.name)
    time.sleep(0.02)
    for path in (made / "train").glob("*.npy"):
        os.utime(path)
    return made


def other_version(path: Path) -> Path:
    """A file of the same size, as old and with other bytes."""
    found = path.with_name(f"other-{path.name}")
    found.write_bytes(path.read_bytes())
    flip(found)
    written(found, time.time() - 10**8)
    return found


def lead(link: Path, to: Path) -> None:
    """As ln -sfn does it."""
    link.unlink()
    link.symlink_to(to)


def test_links_that_nobody_touched_are_not_read(linked: Path, compared: list[str]) -> None:
    assert load(linked).samples == 9
    assert compared == []


def test_a_link_that_leads_to_another_older_shard_is_named(linked: Path, compared: list[str]) -> None:
    other = other_version(linked / "store" / "0001.tar")
    time.sleep(0.02)
    for path in (linked / "train").glob("*.npy"):
        os.utime(path)  # later than the other file
    time.sleep(0.02)
    lead(linked / "train" / "0001.tar", other)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"0001\.tar: its bytes changed"):
            load(linked)
    assert compared == ["0001.tar"] * 2


def test_a_link_that_leads_to_the_same_bytes_is_compared_once(linked: Path, compared: list[str]) -> None:
    lead(linked / "train" / "0001.tar", linked / "store" / "0001.tar")
    for _ in range(3):
        load(linked)
    assert compared == ["0001.tar"]


def test_a_folder_that_is_another_one_now_is_named_where_the_index_lies_in_the_cache(
    tmp_path: Path, write_set: Write, monkeypatch: pytest.MonkeyPatch, compared: list[str]
) -> None:
    for name in ("old", "new"):
        write_set(tmp_path / name, [3, 2])
    flip(tmp_path / "new" / "train" / "0001.tar")
    monkeypatch.setattr(os, "access", lambda *_: False)  # folders of somebody else
    current = tmp_path / "set"
    current.symlink_to(tmp_path / "old")
    remote = RemoteConfig(cache=tmp_path / "cache")
    config = ShardsConfig(path=current, size=2, remote=remote)
    time.sleep(0.02)
    indices.load(config, "train")
    for path in (tmp_path / "cache").rglob("*.npy"):
        os.utime(path)
    assert indices.load(config, "train").samples == 5 and compared == []
    time.sleep(0.02)
    lead(current, tmp_path / "new")
    with pytest.raises(ValueError, match=r"0001\.tar: its bytes changed"):
        indices.load(config, "train")
    lead(current, tmp_path / "old")
    indices.load(config, "train")
    compared.clear()
    assert indices.load(config, "train").samples == 5 and compared == []


def test_a_pipe_in_the_place_of_a_shard_is_named(made: Path) -> None:
    (made / "train" / "0001.tar").unlink()
    os.mkfifo(made / "train" / "0001.tar")
    with pytest.raises(ValueError, match=r"0001\.tar: expected 2 samples .* found 0 bytes \(not a whole tar\)"):
        load(made)

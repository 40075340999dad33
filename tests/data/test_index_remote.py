"""The index of shards behind a URL."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.data.server import Fault, Server, serving
from trainer.data import MixtureConfig, ShardsConfig, part
from trainer.data import index as indices
from trainer.data.config import RemoteConfig, SetConfig
from trainer.data.index import Index

Write = Callable[..., Path]


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as found:
        yield found


def serve(server: Server, made: Path) -> None:
    server.files = {f"set/{path.relative_to(made)}": path.read_bytes() for path in made.rglob("*") if path.is_file()}


def config(server: Server, cache: Path, **options: object) -> ShardsConfig:
    remote = RemoteConfig(cache=cache, timeout=0.5, retries=1)
    return ShardsConfig(path=server.url, size=2, remote=remote, **options)  # type: ignore[arg-type]


def load(server: Server, cache: Path, split: str = "train", **options: object) -> Index:
    return indices.load(config(server, cache, **options), split)


def asked(server: Server, name: str) -> int:
    return len([one for one in server.of(name) if one.status in (200, 206)])


def test_an_index_at_the_source_is_taken_with_tables_when_they_are_needed(
    server: Server, tmp_path: Path, write_set: Write
) -> None:
    local = indices.load(ShardsConfig(path=write_set(tmp_path / "set", [3, 2]), size=2), "train")
    serve(server, tmp_path / "set")
    index = load(server, tmp_path / "cache")
    assert index.fingerprint == local.fingerprint
    assert asked(server, ".npy") == asked(server, ".tar") == 0
    samples = np.array([4, 3])
    assert (index.rows(samples) == local.rows(samples)).all()
    assert (asked(server, "0000.idx.npy"), asked(server, "0001.idx.npy"), asked(server, ".tar")) == (0, 1, 0)
    assert index.where(4) == f"{server.url}/train/0001.tar: 000004"
    index.close()


def test_a_table_of_another_index_is_refused(server: Server, tmp_path: Path, write_set: Write) -> None:
    indices.load(ShardsConfig(path=write_set(tmp_path / "set", [3, 2]), size=2), "train")
    serve(server, tmp_path / "set")
    server.files["set/train/0001.idx.npy"] = server.files["set/train/0000.idx.npy"]
    index = load(server, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"0001\.idx\.npy: does not belong to index\.json"):
        index.table(1)
    del server.files["set/train/0000.idx.npy"]
    with pytest.raises(
        ValueError, match=r"^http\S+/train/0000\.idx\.npy: is missing; copy it again, or run `tandem data"
    ):
        index.table(0)


def test_shards_without_an_index_are_fetched_and_indexed_once(server: Server, tmp_path: Path, write_set: Write) -> None:
    write_set(tmp_path / "set", [3, 2])
    write_set(tmp_path / "set", [4], split="test")
    serve(server, tmp_path / "set")
    index, test = load(server, tmp_path / "cache"), load(server, tmp_path / "cache", "test")
    assert (index.samples, test.samples) == (5, 4)
    assert index.classes == test.classes == ("0", "1", "2")
    again = load(server, tmp_path / "cache")
    assert again.fingerprint == index.fingerprint
    for name in ("train/0000.tar", "train/0001.tar", "test/0000.tar"):
        assert server.sent(name) == len(server.files[f"set/{name}"])
    assert again.where(4).endswith("0001.tar: 000004")
    here = indices.load(ShardsConfig(path=tmp_path / "set", size=2), "train")
    assert (again.rows(np.arange(5)) == here.rows(np.arange(5))).all()


def test_a_set_with_one_split_is_indexed_too(server: Server, tmp_path: Path, write_set: Write) -> None:
    serve(server, write_set(tmp_path / "set", [3]))
    assert load(server, tmp_path / "cache").samples == 3
    with pytest.raises(ValueError, match=r"test has no index\.json and lists no \.tar files"):
        load(server, tmp_path / "cache", "test")


def test_shards_that_came_later_are_named(server: Server, tmp_path: Path, write_set: Write) -> None:
    serve(server, write_set(tmp_path / "set", [3]))
    load(server, tmp_path / "cache")
    server.files["set/train/0001.tar"] = server.files["set/train/0000.tar"]
    with pytest.raises(
        ValueError, match=r"its index does not name \(1, such as 0001\.tar\); run `tandem data index http"
    ):
        load(server, tmp_path / "cache")
    (found,) = part.renew(config(server, tmp_path / "cache"), server.url)
    assert found.contents.samples == load(server, tmp_path / "cache").samples == 6


def test_a_shard_that_cannot_be_fetched_ends_the_scan_by_name(server: Server, tmp_path: Path, write_set: Write) -> None:
    serve(server, write_set(tmp_path / "set", [3, 2]))
    server.faults.append(Fault(on="0001.tar", times=100, status=500))
    with pytest.raises(OSError, match=r"/train/0001\.tar: .*500"):
        load(server, tmp_path / "cache")
    server.faults.clear()
    assert load(server, tmp_path / "cache").samples == 5


def test_a_folder_and_a_url_are_joined(server: Server, tmp_path: Path, write_set: Write) -> None:
    here, there = write_set(tmp_path / "here", [2]), write_set(tmp_path / "there", [1, 3])
    serve(server, there)
    sets = (SetConfig(path=here), SetConfig(path=server.url))
    remote = RemoteConfig(cache=tmp_path / "cache", timeout=0.5)
    index = indices.load(MixtureConfig(sets=sets, size=2, remote=remote), "train")
    assert (index.sets, index.set_samples, index.classes) == (
        (1, 2),
        (2, 4),
        ("here/0", "here/1", "set/0", "set/1", "set/2"),
    )
    assert index.store(0).name == f"{here}/train"
    assert index.store(2).name == f"{server.url}/train"

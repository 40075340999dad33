"""Several sets as one index."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.data.conftest import npy, numbered
from trainer.data import MixtureConfig, ShardsConfig
from trainer.data import index as indices
from trainer.data.config import SetConfig
from trainer.data.index import Index
from trainer.data.joined import short

Tar = Callable[[Path, Sequence[tuple[str, bytes]]], Path]
IMAGE = npy(numbered(7, (2, 3, 1)))


@pytest.fixture
def a_set(tmp_path: Path, tar_of: Tar) -> Callable[..., Path]:
    """a_set(name, *shards, field=): shards are lists of classes, None for none."""

    def write(name: str, *shards: Sequence[str | None], field: str = "npy", image: bytes = IMAGE) -> Path:
        for number, classes in enumerate(shards):
            members: list[tuple[str, bytes]] = []
            for place, of in enumerate(classes):
                members.append((f"{name.replace('/', '_')}{place}.{field}", image))
                members += [(f"{name.replace('/', '_')}{place}.cls", of.encode())] if of is not None else []
            tar_of(tmp_path / name / "train" / f"{number}.tar", members)
        return tmp_path / name

    return write


def load(*paths: Path, label: str = "cls") -> Index:
    sets = tuple(SetConfig(path=path) for path in paths)
    return indices.load(MixtureConfig(sets=sets, size=2, label=label), "train")


def labels(index: Index) -> list[str | None]:
    numbers = index.rows(np.arange(index.samples))["label"].tolist()
    return [index.classes[number] if number >= 0 else None for number in numbers]


def test_sets_stand_one_after_the_other(a_set: Callable[..., Path]) -> None:
    one, two = a_set("one", ["0", "1"], ["1"]), a_set("two", ["1", "0", "0"])
    three = a_set("three", ["0", "1"], ["1"])
    index = load(one, two, three)
    assert (index.samples, index.sets, index.set_samples) == (9, (2, 1, 2), (3, 3, 3))
    assert index.starts.tolist() == [0, 2, 3, 6, 8, 9]
    assert [index.store(shard).name for shard in range(5)] == [
        f"{path}/train" for path in (one, one, two, three, three)
    ]
    assert index.where(3) == f"{two}/train/0.tar: two0"
    assert labels(index) == ["0", "1", "1", "1", "0", "0", "0", "1", "1"]
    samples = np.array([8, 0, 4])
    assert (index.rows(samples) == np.concatenate([index.table(s) for s in range(5)])[samples]).all()


def test_sets_of_one_list_of_classes_share_it(a_set: Callable[..., Path]) -> None:
    bare = a_set("three", [None])
    indices.load(ShardsConfig(path=bare, size=2), "train")
    index = load(a_set("one", ["cat", "dog"]), a_set("two", ["dog", "cat"]), bare)
    assert index.classes == ("cat", "dog")
    assert labels(index) == ["cat", "dog", "dog", "cat", None]


def test_other_lists_stand_beside_each_other_under_their_sets_names(a_set: Callable[..., Path]) -> None:
    index = load(a_set("one", ["dog", "cat"]), a_set("two", ["dog", None, "emu"]))
    assert index.classes == ("one/cat", "one/dog", "two/dog", "two/emu")
    assert labels(index) == ["one/dog", "one/cat", "two/dog", None, "two/emu"]
    assert not index.table(1).flags.writeable


def test_sets_of_one_name_are_told_apart_by_their_folders(a_set: Callable[..., Path]) -> None:
    index = load(a_set("a/faces", ["0"]), a_set("b/faces", ["0", "1"]))
    assert index.classes == ("a/faces/0", "b/faces/0", "b/faces/1")


@pytest.mark.parametrize(
    ("names", "titles"),
    [
        (["data/a", "data/b/"], ["a", "b"]),
        (["x/a", "y/a", "c"], ["x/a", "y/a", "c"]),
        (["s3://bucket/a", "a"], ["bucket/a", "a"]),
        (["a", "a"], ["a#0", "a#1"]),
        (["/", "/"], ["#0", "#1"]),
    ],
)
def test_titles_are_as_short_as_they_can_be(names: list[str], titles: list[str]) -> None:
    assert short(names) == titles


def test_fields_and_sizes_are_of_all_sets(a_set: Callable[..., Path]) -> None:
    wide = npy(numbered(3, (4, 6, 3)))
    index = load(a_set("one", ["0"], field="b.npy"), a_set("two", ["0"], field="a.npy", image=wide))
    assert index.fields == ("a.npy", "b.npy")
    assert [index.fields[n] for n in index.rows(np.arange(2))["field"].tolist()] == ["b.npy", "a.npy"]
    assert [str(span) for span in (index.height, index.width, index.channels)] == ["2 to 4", "3 to 6", "1 to 3"]


def test_the_fingerprint_is_of_all_sets_in_their_order(a_set: Callable[..., Path]) -> None:
    one, two = a_set("one", ["0"]), a_set("two", ["0", "0"])
    alone = indices.load(ShardsConfig(path=one, size=2, label="cls"), "train")
    prints = [alone.fingerprint, load(one, two).fingerprint, load(two, one).fingerprint]
    assert len(set(prints)) == 3
    assert load(one, two).fingerprint == prints[1]


def test_the_report_is_of_each_set(a_set: Callable[..., Path], tmp_path: Path) -> None:
    assert load(a_set("one", ["0"]), a_set("two", ["0"])).report == {
        str(tmp_path / "one"): {},
        str(tmp_path / "two"): {},
    }


def test_a_set_of_a_mixture_is_named_when_it_is_wrong(a_set: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^data\.path: \S+/gone does not exist"):
        load(a_set("one", ["0"]), tmp_path / "gone")

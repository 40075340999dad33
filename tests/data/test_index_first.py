"""Shards of any maker at their first use: where the index lies, who builds it, which classes it gives."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import webdataset

from tests.data.conftest import npy, numbered
from trainer import durable
from trainer.data import ShardsConfig, Stream, build
from trainer.data import index as indices
from trainer.data.config import RemoteConfig
from trainer.data.index import Index

Tar = Callable[[Path, Sequence[tuple[str, bytes]]], Path]
Write = Callable[..., Path]
IMAGE = npy(numbered(7, (2, 3, 1)))


def load(path: Path, split: str = "train", *, cache: Path | None = None, **options: object) -> Index:
    remote = RemoteConfig(cache=cache or path / "nowhere")
    return indices.load(ShardsConfig(path=path, size=2, remote=remote, **options), split)  # type: ignore[arg-type]


def labels(index: Index) -> list[str | None]:
    found = index.rows(np.arange(index.samples))["label"].tolist()
    return [index.classes[number] if number >= 0 else None for number in found]


def texts(path: Path, values: Sequence[str], tar_of: Tar) -> Path:
    return tar_of(
        path, [(f"{n}.{f}", d) for n, text in enumerate(values) for f, d in (("npy", IMAGE), ("cls", text.encode()))]
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------ where it lies
def test_the_index_is_written_beside_the_shards_and_built_once(tmp_path: Path, write_set: Write) -> None:
    made = write_set(tmp_path / "set", [3, 2])
    index = load(made)
    assert names(made / "train") == ["0000.idx.npy", "0000.tar", "0001.idx.npy", "0001.tar", "index.json"]
    before = (made / "train" / "index.json").stat()
    again = load(made)
    assert again.fingerprint == index.fingerprint
    assert (made / "train" / "index.json").stat().st_ino == before.st_ino
    assert not (tmp_path / "set" / "nowhere" / "remote").exists()


def test_samples_keep_the_order_of_the_tar(tmp_path: Path, tar_of: Tar) -> None:
    tar_of(tmp_path / "train" / "b.tar", [("z.npy", IMAGE), ("a.npy", IMAGE)])
    tar_of(tmp_path / "train" / "a.tar", [("m.npy", IMAGE)])
    index = load(tmp_path)
    assert [index.where(sample).rpartition("/")[2] for sample in range(3)] == ["a.tar: m", "b.tar: z", "b.tar: a"]


@pytest.mark.parametrize("compress", [False, True])
def test_shards_of_webdatasets_shard_writer_are_read(tmp_path: Path, compress: bool) -> None:
    (tmp_path / "train").mkdir()
    name = f"s-%03d.tar{'.gz' if compress else ''}"
    with webdataset.ShardWriter(str(tmp_path / "train" / name), maxcount=2, verbose=0) as writer:
        for number in range(5):
            writer.write({"__key__": f"v1/k{number}", "npy": numbered(number, (2, 3, 1)), "cls": number, "txt": "a"})
    if compress:
        with pytest.raises(ValueError, match=r"holds no index\.json and no \.tar files; unpack .*s-000\.tar\.gz"):
            load(tmp_path)
        return
    index = load(tmp_path)
    assert [shard.samples for shard in index.shards] == [2, 2, 1]
    assert labels(index) == ["0", "1", "2", "3", "4"]


def test_a_folder_packed_by_tar_is_read_with_folders_in_its_names(tmp_path: Path) -> None:
    for number in range(12):
        folder = tmp_path / "in" / f"f{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.npy").write_bytes(npy(numbered(number, (2, 3, 1))))
        (folder / f"{number}.cls").write_text(f"{number % 2}\n")
    (tmp_path / "set" / "train").mkdir(parents=True)
    command = ["tar", "--sort=name", "-C", tmp_path / "in", "-cf", tmp_path / "set" / "train" / "a.tar", "."]
    subprocess.run(command, check=True)
    index = load(tmp_path / "set")
    assert labels(index) == ["0"] * 6 + ["1"] * 6
    assert index.where(0).endswith("a.tar: f0/0")


@pytest.fixture
def locked_out() -> Iterator[Path]:
    """A folder for which this process has no right to write, and none that gives it any."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder
        folder.chmod(0o755)


def as_nobody(work: Callable[[], None], folder: Path) -> None:
    """Runs it without the right to write in `folder`/set/train; as another user where this one is root."""
    for path in (folder / "set", folder / "set" / "train"):
        path.chmod(0o555)
    if os.getuid() == 0:
        (folder / "cache").mkdir(exist_ok=True)
        (folder / "cache").chmod(0o777)
        os.setresuid(65_534, 65_534, 0)
    try:
        work()
    finally:
        if os.getresuid()[2] == 0:
            os.setresuid(0, 0, 0)
        for path in (folder / "set", folder / "set" / "train"):
            path.chmod(0o755)


def test_a_folder_that_cannot_be_written_has_its_index_in_the_cache(locked_out: Path, write_set: Write) -> None:
    made = write_set(locked_out / "set", [3, 2])
    seen: list[Index] = []

    def work() -> None:
        for image in ("auto", "auto", "npy"):
            seen.append(load(made, cache=locked_out / "cache", image=image))
            assert labels(seen[-1]) == ["0", "1", "2", "0", "1"]

    as_nobody(work, locked_out)
    assert names(made / "train") == ["0000.tar", "0001.tar"]
    assert len(list((locked_out / "cache" / "index").rglob("index.json"))) == 2  # one for each choice of fields


def test_a_cache_that_cannot_hold_the_index_of_such_a_folder_is_named_by_its_key(
    tmp_path: Path, write_set: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = write_set(tmp_path / "set", [3])
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match=r"^data\.remote\.cache: \S+ cannot be used \(Not a directory\); name another"):
        load(made, cache=tmp_path / "file")


def test_shards_of_a_folder_that_cannot_be_written_are_compared_once(
    locked_out: Path, write_set: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = write_set(locked_out / "set", [3, 2])
    load(made)
    for path in sorted((made / "train").glob("*.tar")):
        os.utime(path)  # as after a copy in the order of the alphabet
    compared: list[str] = []
    sha256 = durable.sha256
    monkeypatch.setattr("trainer.durable.sha256", lambda path: compared.append(path.name) or sha256(path))

    def work() -> None:
        for _ in range(2):
            load(made, cache=locked_out / "cache")
        assert compared == ["0000.tar", "0001.tar"]

    as_nobody(work, locked_out)


# ------------------------------------------------------------------ who builds it
def test_of_many_that_come_first_one_builds(tmp_path: Path, write_set: Write) -> None:
    made = write_set(tmp_path / "set", [4] * 3)
    found: list[tuple[int, str]] = []

    def one() -> None:
        index = load(made, cache=tmp_path / "cache")
        found.append(((made / "train" / "index.json").stat().st_ino, index.fingerprint))

    threads = [threading.Thread(target=one) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len(set(found)) == 1


def test_builders_on_machines_without_a_common_lock_do_not_meet(tmp_path: Path, write_set: Write) -> None:
    made = write_set(tmp_path / "set", [4] * 8)
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda n=n: found.append(load(made, cache=tmp_path / str(n)).fingerprint))  # type: ignore[misc]
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert not [name for name in names(made / "train") if name.startswith(".")]


def test_what_a_killed_process_left_goes_with_the_next_index_and_nothing_else_does(
    tmp_path: Path, write_set: Write
) -> None:
    made = write_set(tmp_path / "set", [2])
    begun = (
        "import sys, time, pathlib; from trainer.data import build\n"
        "with build._drafts(pathlib.Path(sys.argv[1])):\n    print('begun', flush=True); time.sleep(600)"
    )
    argv = [sys.executable, "-c", begun, str(made / "train")]
    others = [subprocess.Popen(argv, stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for other in others:
            assert other.stdout is not None and other.stdout.readline() == b"begun\n"
        others[0].kill()
        others[0].wait()
        load(made)
        assert len(list((made / "train").glob(f"{build.DRAFTS}*"))) == 1  # of the one that is at work
    finally:
        for other in others:
            other.kill()
            other.communicate()


def test_a_shard_that_is_refused_leaves_nothing_behind(tmp_path: Path, tar_of: Tar) -> None:
    tar_of(tmp_path / "train" / "a.tar", [("0.npy", IMAGE)])
    tar_of(tmp_path / "train" / "b.tar", [("0.npy", IMAGE), ("0.pkl", b"x")])
    with pytest.raises(ValueError, match=r"b\.tar: key 0 holds pkl"):
        load(tmp_path)
    assert names(tmp_path / "train") == ["a.tar", "b.tar"]


# ------------------------------------------------------------------ classes
def test_both_splits_have_one_list_of_classes(tmp_path: Path, tar_of: Tar) -> None:
    texts(tmp_path / "train" / "a.tar", ["emu", "cat"], tar_of)
    texts(tmp_path / "train" / "b.tar", ["dog", "cat"], tar_of)
    texts(tmp_path / "test" / "a.tar", ["dog", "ant"], tar_of)
    test = load(tmp_path, "test", label="cls")
    train = load(tmp_path, label="cls")
    assert train.classes == test.classes == ("ant", "cat", "dog", "emu")
    assert (labels(train), labels(test)) == (["emu", "cat", "dog", "cat"], ["dog", "ant"])


def test_a_split_that_comes_later_takes_the_classes_that_are_there(tmp_path: Path, tar_of: Tar) -> None:
    texts(tmp_path / "train" / "a.tar", ["5", "9"], tar_of)
    load(tmp_path)
    texts(tmp_path / "test" / "a.tar", ["3"], tar_of)
    assert load(tmp_path, "test").classes == load(tmp_path).classes == tuple("0123456789")


def test_a_split_that_comes_later_with_a_new_class_is_refused(tmp_path: Path, tar_of: Tar) -> None:
    texts(tmp_path / "train" / "a.tar", ["cat", "dog"], tar_of)
    load(tmp_path, label="cls")
    texts(tmp_path / "test" / "a.tar", ["dog", "emu"], tar_of)
    with pytest.raises(ValueError, match=r"test: class emu is none of the 2 of .* again with `tandem data index`"):
        load(tmp_path, "test", label="cls")


def test_text_in_one_shard_and_numbers_in_another_are_refused(tmp_path: Path, tar_of: Tar) -> None:
    texts(tmp_path / "train" / "a.tar", ["cat"], tar_of)
    texts(tmp_path / "train" / "b.tar", ["3"], tar_of)
    with pytest.raises(ValueError, match=r"^data\.label: cls is text in some shards and a number in others"):
        load(tmp_path, label="cls")


def test_a_label_that_no_sample_has_is_named(tmp_path: Path, write_set: Write) -> None:
    made = write_set(tmp_path, [2])
    with pytest.raises(ValueError, match=r"^data\.label: no sample of \S+ has json:species"):
        load(made, label="json:species")


def test_samples_without_a_text_keep_no_class(tmp_path: Path, tar_of: Tar) -> None:
    members = [("0.npy", IMAGE), ("1.npy", IMAGE), ("1.cls", b"cat")]
    tar_of(tmp_path / "train" / "a.tar", members)
    assert labels(load(tmp_path, label="cls")) == [None, "cat"]


# ------------------------------------------------------------------ another choice of fields, other shards
def test_another_choice_of_fields_than_the_index_has_is_refused(tmp_path: Path, tar_of: Tar) -> None:
    members = [("0.left.npy", IMAGE), ("0.right.npy", IMAGE), ("0.cls", b"1"), ("0.txt", b"cat")]
    tar_of(tmp_path / "train" / "a.tar", members)
    load(tmp_path, image="left.npy", label="cls")
    assert load(tmp_path).fields == ("left.npy",)
    assert load(tmp_path, image="LEFT.npy", label="cls").samples == 1
    with pytest.raises(ValueError, match=r"^data\.image: right\.npy is no field of .*--image right\.npy`, or set"):
        load(tmp_path, image="right.npy")
    with pytest.raises(
        ValueError, match=r"^data\.label: the labels of .* from cls; .*--label txt`, or set data\.label"
    ):
        load(tmp_path, label="txt")


def test_one_of_two_fields_cannot_be_chosen_of_an_index_that_took_both(tmp_path: Path, tar_of: Tar) -> None:
    tar_of(tmp_path / "train" / "a.tar", [("0.npy", IMAGE), ("1.a.npy", IMAGE)])
    assert load(tmp_path).fields == ("a.npy", "npy")
    with pytest.raises(ValueError, match=r"^data\.image: npy is no field of all samples of .*found: a\.npy, npy"):
        load(tmp_path, image="npy")


def test_shards_that_came_after_the_index_are_named(tmp_path: Path, write_set: Write, tar_of: Tar) -> None:
    made = write_set(tmp_path, [2, 2])
    load(made)
    tar_of(made / "train" / "0002.tar", [("0.npy", IMAGE)])
    with pytest.raises(
        ValueError, match=r"holds shards that its index does not name \(1, such as 0002\.tar\); run `tandem"
    ):
        load(made)


def test_a_stream_reads_what_was_just_indexed(
    tmp_path: Path, write_set: Write, number_of: Callable[..., list[int]]
) -> None:
    made = write_set(tmp_path, [3, 2])
    stream = Stream(ShardsConfig(path=made, size=(2, 3), channels=1), split="train", batch=1, rank=0, world=1, seed=0)
    assert number_of(stream.first(5).data) == list(range(5))
    stream.close()

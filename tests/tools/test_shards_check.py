"""`tandem data verify`: every fault of a set is named, and a whole one is said to be whole."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset

from tests.data.conftest import npy, write_tar
from tests.data.server import Server, serving
from tools.shards import check, index, make
from tools.shards import pack as packing
from trainer.data import ShardsConfig, table
from trainer.data import index as indices


def images(folder: Path, count: int, split: str = "train") -> Path:
    """FOLDER/SPLIT/*.tar of three samples each, noise as .npy; without an index."""
    for start in range(0, count, 3):
        members = []
        for number in range(start, min(start + 3, count)):
            pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
            members += [(f"{number:03d}.npy", npy(pixels)), (f"{number:03d}.cls", b"%d" % (number % 2))]
        write_tar(folder / split / f"{split}-{start // 3:05d}.tar", members)
    return folder


@pytest.fixture
def made(tmp_path: Path) -> Path:
    images(tmp_path / "out", 12)
    assert index.main([str(tmp_path / "out")]) == 0
    return tmp_path / "out"


def flip(path: Path, at: int = 700) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def load(path: Path) -> indices.Index:
    return indices.load(ShardsConfig(path=path, size=8), "train")


def test_a_whole_set_passes(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images(made, 2, split="test")
    assert index.main([str(made)]) == 0
    assert check.main([str(made)]) == 0
    assert check.main([str(made), "--deep"]) == 0
    said = capsys.readouterr().out
    assert (
        f"{made}/train: 12 samples in 4 shards, 40,960 bytes, 16 x 16 x 3: sizes, counts and digests are right" in said
    )
    assert f"{made}/test: 2 samples in 1 shard, 10,240 bytes, 16 x 16 x 3: every image decodes" in said


def test_what_make_writes_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    for number in range(12):
        path = tmp_path / "in" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    words = ["folder", str(tmp_path / "in"), str(tmp_path / "out"), "--val-fraction", "0", "--shard-size", "10KB"]
    assert make.main(words) == 0
    assert check.main([str(tmp_path / "out"), "--deep"]) == 0
    assert "12 samples in 6 shards" in capsys.readouterr().out
    tables = {path.name: path.read_bytes() for path in (tmp_path / "out" / "train").glob("*.npy")}
    assert len(tables) == 6
    assert index.main([str(tmp_path / "out")]) == 0  # a scan finds what the maker noted
    assert {path.name: path.read_bytes() for path in (tmp_path / "out" / "train").glob("*.npy")} == tables


def test_a_cut_shard_is_named_with_what_was_expected_and_what_is_there(made: Path) -> None:
    path = made / "train" / "train-00001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    pattern = rf"train-00001\.tar: expected 3 samples in {len(whole):,} bytes, found {len(whole) // 2:,} bytes"
    for call in (lambda: check.main([str(made)]), lambda: load(made)):
        with pytest.raises(ValueError, match=pattern):
            call()


def test_a_missing_shard_is_named(made: Path) -> None:
    (made / "train" / "train-00002.tar").unlink()
    with pytest.raises(ValueError, match=r"train-00002\.tar: is missing \(3 samples"):
        check.main([str(made)])


def test_a_changed_byte_is_found_and_every_damaged_shard_is_named(made: Path) -> None:
    for number in (0, 3):
        flip(made / "train" / f"train-{number:05d}.tar")
    with pytest.raises(ValueError, match=r"train-00000\.tar: its bytes changed") as caught:
        check.main([str(made)])
    assert "train-00003.tar: its bytes changed" in str(caught.value)


def test_a_shard_that_lost_samples_and_kept_its_size_is_named_with_both_counts(made: Path) -> None:
    path = made / "train" / "train-00001.tar"
    data = path.read_bytes()
    path.write_bytes(data[: int(load(made).table(1)["end"][1])].ljust(len(data), b"\0"))
    with pytest.raises(ValueError, match=r"train-00001\.tar: expected 3 samples, found 2; copy the shard again"):
        check.main([str(made)])


def test_faults_of_all_splits_are_named_and_counted(made: Path) -> None:
    images(made, 12, split="test")
    assert index.main([str(made)]) == 0
    for split in ("train", "test"):
        for number in range(4):
            flip(made / split / f"{split}-{number:05d}.tar")
    with pytest.raises(ValueError, match=r"test-00000\.tar(.*\n)+.*train-00000\.tar.*\nand 3 more faults$"):
        check.main([str(made)])


def test_tables_of_another_set_are_refused(made: Path) -> None:
    for number in (1, 3):
        flip(made / "train" / f"train-{number:05d}.idx.npy", at=300)
    with pytest.raises(
        ValueError, match=r"train-00001\.idx\.npy: does not belong to index\.json.*train-00003\.idx\.npy: "
    ):
        check.main([str(made)])


def test_deep_checking_finds_a_table_that_places_samples_wrongly(made: Path) -> None:
    """With the right digests: a maker's mistake."""
    content = json.loads((made / "train" / "index.json").read_text())
    path = made / "train" / "train-00002.idx.npy"
    rows = np.load(path)
    rows["size"][1] -= 1
    path.write_bytes(table.encode(rows))
    content["shards"][2]["table"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (made / "train" / "index.json").write_text(json.dumps(content))
    assert check.main([str(made)]) == 0
    with pytest.raises(
        ValueError, match=r"train-00002\.tar: its table places samples elsewhere than they are; run `tandem"
    ):
        check.main([str(made), "--deep"])


def relabel(path: Path, change: int) -> None:
    """Of the first split every label, with the right digests."""
    content = json.loads((path / "index.json").read_text())
    for shard in content["shards"]:
        place = path / f"{Path(shard['name']).stem}.idx.npy"
        rows = np.load(place)
        rows["label"] = (rows["label"] + change) % len(content["classes"])
        place.write_bytes(table.encode(rows))
        shard["table"] = hashlib.sha256(place.read_bytes()).hexdigest()
    (path / "index.json").write_text(json.dumps(content))


@pytest.mark.parametrize("label", ["cls", "json:kind"])
def test_deep_checking_compares_the_labels(tmp_path: Path, label: str) -> None:
    write_tar(tmp_path / "train" / "a.tar", [
        (f"{number}.{field}", data)
        for number in range(4)
        for field, data in {
            "npy": npy(np.zeros((4, 4, 3), np.uint8)), "cls": b"%d" % (number % 2),
            "json": json.dumps({"kind": "owl" if number % 2 else "emu"}).encode(),
        }.items()
    ])  # fmt: skip
    assert index.main([str(tmp_path), "--label", label]) == 0
    assert check.main([str(tmp_path), "--deep"]) == 0
    relabel(tmp_path / "train", 1)
    with pytest.raises(ValueError, match=r"a\.tar: 0: its table has another class or field.*\(4 samples\)"):
        check.main([str(tmp_path), "--deep"])


def test_splits_of_different_classes_are_a_fault(made: Path) -> None:
    images(made, 6, split="test")
    assert index.main([str(made)]) == 0
    content = json.loads((made / "test" / "index.json").read_text())
    (made / "test" / "index.json").write_text(json.dumps({**content, "classes": ["emu", "owl"]}))
    with pytest.raises(ValueError, match=rf"^{made}/train: has other classes than the other splits; run `tandem data"):
        check.main([str(made)])


def test_the_size_of_images_that_no_header_tells_is_not_shown(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads((made / "train" / "index.json").read_text())
    content["image"].update(height=None, width=None, channels=None)
    (made / "train" / "index.json").write_text(json.dumps(content))
    assert check.main([str(made)]) == 0
    assert f"{made}/train: 12 samples in 4 shards, 40,960 bytes: sizes, counts" in capsys.readouterr().out


def test_deep_checking_decodes_foreign_shards(tmp_path: Path) -> None:
    (tmp_path / "set" / "train").mkdir(parents=True)
    with webdataset.TarWriter(str(tmp_path / "set" / "train" / "a.tar")) as writer:
        writer.write({"__key__": "good", "npy": np.zeros((4, 4, 3), np.uint8)})
        writer.write({"__key__": "evil", "npy": b"\x93NUMPY what"})
    assert check.main([str(tmp_path / "set")]) == 0
    with pytest.raises(ValueError, match=r"a\.tar: evil: is no \.npy"):
        check.main([str(tmp_path / "set"), "--deep"])


def test_checking_nothing_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "gone"):
        with pytest.raises(ValueError, match=r"tandem data make"):
            check.main([str(path)])


def test_a_set_that_is_being_made_is_said_to_be_unfinished(made: Path) -> None:
    (made / packing.UNFINISHED).mkdir()
    for call in (check.main, index.main):
        with pytest.raises(ValueError, match="is unfinished; run the `tandem data make` command"):
            call([str(made)])


@pytest.fixture
def server(made: Path) -> Iterator[Server]:
    with serving() as found:
        found.files = {f"set/{path.relative_to(made)}": path.read_bytes() for path in made.rglob("*") if path.is_file()}
        yield found


def test_shards_behind_a_url_are_fetched_and_verified(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # the cache is in its folder .cache
    assert check.main([server.url, "--deep"]) == 0
    assert f"{server.url}/train: 12 samples in 4 shards" in capsys.readouterr().out
    server.files["set/train/train-00001.tar"] = server.files["set/train/train-00000.tar"]
    (kept,) = (tmp_path / ".cache").rglob("train-00001.*.tar")
    kept.unlink()
    with pytest.raises(ValueError, match=r"train-00001\.tar: has the sha256"):
        check.main([server.url])


@pytest.mark.parametrize("verb", ["verify", "check"])
def test_the_help_shows_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        check.main(["--help"])
    assert f"  tandem data {verb} data/faces" in capsys.readouterr().out

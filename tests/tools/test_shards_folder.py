"""`tandem data make folder`: any folder of images becomes shards, or says why not."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from webdataset import tariterators

from tools.shards import folder, pack
from tools.shards.make import main
from trainer.data import ShardsConfig, Stream
from trainer.data import index as indices
from trainer.data.decode import decode

ROOT = Path(__file__).resolve().parents[2]


def picture(path: Path, colour: object = (10, 200, 30), size: tuple[int, int] = (8, 8), **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = "L" if isinstance(colour, int) else "RGB"
    Image.new(mode, size, colour).save(path, **options)  # type: ignore[arg-type]
    return path


def noisy(path: Path, seed: int, size: tuple[int, int] = (80, 72), **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def make(source: Path, dest: Path, *options: str) -> int:
    return main(["folder", str(source), str(dest), "--val-fraction", "0", *options])


def samples(folder: Path) -> Iterator[dict[str, object]]:
    """What webdataset's own reader sees. (`WebDataset(paths)` is the same, but leaves its files to the collector.)"""
    for path in sorted(folder.glob("*.tar")):
        with path.open("rb") as file:
            members = tariterators.tar_file_expander([{"url": str(path), "stream": file}])
            yield from tariterators.group_by_keys(members)


def by_path(folder: Path) -> dict[str, dict[str, object]]:
    return {json.loads(sample["json"])["path"]: sample for sample in samples(folder)}  # type: ignore[arg-type]


def content(folder: Path) -> dict[str, object]:
    return json.loads((folder / "index.json").read_text())


def every_byte(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ------------------------------------------------------------------ names, classes, links
def test_dots_in_names_and_folders_make_no_sample_disappear(tmp_path: Path) -> None:
    for name in ("a.b.png", "a.c.png", "train/v1.0/0001.png", "22.05.png"):
        picture(tmp_path / "in" / name)
    assert make(tmp_path / "in", tmp_path / "out") == 0
    found = by_path(tmp_path / "out" / "train")
    assert sorted(found) == ["22.05.png", "a.b.png", "a.c.png", "train/v1.0/0001.png"]
    assert all("." not in str(sample["__key__"]) for sample in found.values())


def test_classes_are_in_natural_order_and_hidden_folders_are_mentioned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("1", "2", "10", ".ipynb_checkpoints"):
        picture(tmp_path / "in" / name / "x.png")
    picture(tmp_path / "in" / "2" / ".hidden.png")
    assert make(tmp_path / "in", tmp_path / "out") == 0
    assert content(tmp_path / "out" / "train")["classes"] == ["1", "2", "10"]
    labels = {path: int(sample["cls"]) for path, sample in by_path(tmp_path / "out" / "train").items()}  # type: ignore[call-overload]
    assert labels == {"1/x.png": 0, "2/x.png": 1, "10/x.png": 2}
    assert "skipped 2 hidden files and folders: .ipynb_checkpoints, 2/.hidden.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["b", "a10", "a9", "A1"], ["A1", "a9", "a10", "b"]),
        (["100", "20", "3"], ["3", "20", "100"]),
        (["²", "2", "x2", "x²"], ["2", "x2", "x²", "²"]),
        (["01", "1", "001"], ["001", "01", "1"]),
    ],
)
def test_the_natural_order_is_total(names: list[str], expected: list[str]) -> None:
    assert sorted(names, key=folder.natural) == expected


def test_the_same_name_twice_and_upper_case_extensions(tmp_path: Path) -> None:
    for number, name in enumerate(("cat/001.JPG", "dog/001.jpg", "dog/002.jpeg")):
        picture(tmp_path / "in" / name, (80 * number, 0, 0), format="JPEG")
    assert make(tmp_path / "in", tmp_path / "out") == 0
    found = by_path(tmp_path / "out" / "train")
    assert {path: sample["cls"] for path, sample in found.items()} == {
        "cat/001.JPG": b"0", "dog/001.jpg": b"1", "dog/002.jpeg": b"1",
    }  # fmt: skip
    assert len({sample["__key__"] for sample in found.values()}) == 3


def test_images_beside_the_class_folders_have_no_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "in" / "a" / "x.png")
    picture(tmp_path / "in" / "top.png")
    make(tmp_path / "in", tmp_path / "out")
    assert "cls" not in by_path(tmp_path / "out" / "train")["top.png"]
    assert "1 image lies beside the class folders" in capsys.readouterr().out


def test_links_are_followed_inside_the_folder_only(tmp_path: Path) -> None:
    source = tmp_path / "in"
    picture(source / "a" / "x.png")
    outside = picture(tmp_path / "secret.png")
    (source / "a" / "inside.png").symlink_to("x.png")
    (source / "a" / "outside.png").symlink_to(outside)
    (source / "a" / "circle.png").symlink_to("circle.png")
    (source / "a" / "nowhere.png").symlink_to("gone.png")
    (source / "loop").symlink_to(source)
    assert make(source, tmp_path / "out") == 0
    assert sorted(by_path(tmp_path / "out" / "train")) == ["a/inside.png", "a/x.png"]
    report = content(tmp_path / "out" / "train")["report"]
    assert report["links"] == ["a/circle.png", "a/nowhere.png", "a/outside.png", "loop"]  # type: ignore[index]


def test_a_name_that_is_no_utf8_is_packed(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "plain.png")
    (tmp_path / "in" / "plain.png").rename(tmp_path / "in" / os.fsdecode(b"caf\xe9.png"))
    assert make(tmp_path / "in", tmp_path / "out") == 0
    (path,) = by_path(tmp_path / "out" / "train")
    assert os.fsencode(path) == b"caf\xe9.png"


def test_names_cannot_steer_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = os.fsdecode(b"bad\xfe\n\x1b]0;title\x07")
    picture(tmp_path / "in" / "über" / f"{evil}.png")
    (tmp_path / "in" / f"{evil}.jpg").touch()
    (tmp_path / "in" / f".{evil}").touch()
    assert make(tmp_path / "in", tmp_path / "out", "--max-bad", "0.5") == 0
    said = capsys.readouterr().out
    assert r"left out: train: bad\udcfe\n\x1b]0;title\x07.jpg: is empty" in said
    assert all(line.isprintable() for line in said.split("\n"))
    with pytest.raises(ValueError, match="nothing is overwritten"):
        make(tmp_path / "in", tmp_path / "out", "--size", "4")


@pytest.mark.parametrize("name", ["esc\x1b[31m", "two\nlines", os.fsdecode(b"\xfe"), "\u202e"])
def test_a_folder_that_is_no_name_of_a_class_is_refused(tmp_path: Path, name: str) -> None:
    picture(tmp_path / "in" / name / "x.png")
    with pytest.raises(ValueError, match="is no name of a class; give it one of plain signs") as caught:
        make(tmp_path / "in", tmp_path / "out")
    assert str(caught.value).isprintable()
    assert not (tmp_path / "out").exists()


def test_a_fifo_is_not_read(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "x.png")
    os.mkfifo(tmp_path / "in" / "pipe.png")
    assert make(tmp_path / "in", tmp_path / "out") == 0
    assert list(by_path(tmp_path / "out" / "train")) == ["x.png"]


# ------------------------------------------------------------------ pixels
def test_small_images_are_stored_as_they_are_and_the_trainer_reads_them(tmp_path: Path) -> None:
    for number in range(5):
        noisy(tmp_path / "in" / f"{number}.png", number, size=(20, 16))
    assert make(tmp_path / "in", tmp_path / "out") == 0
    for path, sample in by_path(tmp_path / "out" / "train").items():
        expected = np.asarray(Image.open(tmp_path / "in" / path))
        assert np.array_equal(np.load(io.BytesIO(sample["npy"]), allow_pickle=False), expected)  # type: ignore[arg-type]
    config = ShardsConfig(path=tmp_path / "out", size=(16, 20))
    batch = Stream(config, split="train", batch=5, rank=0, world=1, seed=0).first(5)
    assert batch.data.shape == (5, 16, 20, 3)


def test_a_photograph_is_kept_byte_for_byte_unless_something_must_change(tmp_path: Path) -> None:
    kept = noisy(tmp_path / "in" / "kept.jpg", 1, quality=83)
    exif = Image.Exif()
    exif[274] = 6
    noisy(tmp_path / "in" / "turned.jpg", 2, quality=83, exif=exif)
    assert make(tmp_path / "in", tmp_path / "out") == 0
    found = by_path(tmp_path / "out" / "train")
    assert found["kept.jpg"]["jpg"] == kept.read_bytes()
    turned = found["turned.jpg"]["jpg"]
    assert b"Exif" not in turned  # type: ignore[operator]
    assert decode(turned, "jpg", channels=3, max_pixels=10**6).shape == (80, 72, 3)  # type: ignore[arg-type]
    assert content(tmp_path / "out" / "train")["report"]["converted"] == {"turned as EXIF says": 1}  # type: ignore[index]


@pytest.mark.parametrize(("form", "field"), [("png", "png"), ("webp", "webp"), ("npy", "npy")])
def test_lossless_formats_keep_every_pixel(tmp_path: Path, form: str, field: str) -> None:
    noisy(tmp_path / "in" / "x.png", 3)
    assert make(tmp_path / "in", tmp_path / "out", "--format", form) == 0
    data = by_path(tmp_path / "out" / "train")["x.png"][field]
    found = decode(data, field, channels=3, max_pixels=10**6)  # type: ignore[arg-type]
    assert np.array_equal(found, np.asarray(Image.open(tmp_path / "in" / "x.png")))


def test_size_makes_the_set_uniform_and_without_it_the_trainer_refuses(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "wide.png", size=(40, 20))
    picture(tmp_path / "in" / "high.png", size=(16, 30))
    make(tmp_path / "in", tmp_path / "as_is")
    make(tmp_path / "in", tmp_path / "sized", "--size", "12x10")
    assert content(tmp_path / "as_is" / "train")["image"] == {
        "height": [20, 30], "width": [16, 40], "channels": [3, 3], "fields": ["npy"],
    }  # fmt: skip
    with pytest.raises(ValueError, match="different sizes"):
        Stream(ShardsConfig(path=tmp_path / "as_is", size=20), split="train", batch=1, rank=0, world=1, seed=0)
    config = ShardsConfig(path=tmp_path / "sized", size=(12, 10))
    assert Stream(config, split="train", batch=2, rank=0, world=1, seed=0).samples == 2


def test_sizes_are_recorded_over_all_shards(tmp_path: Path) -> None:
    for number in range(6):
        picture(tmp_path / "in" / f"{number}.png", size=(10 + number, 20 - number))
    make(tmp_path / "in", tmp_path / "out", "--shard-size", "1KB")
    found = indices.load(ShardsConfig(path=tmp_path / "out", size=8), "train")
    assert len(found.shards) == 6
    assert (found.height, found.width) == ((15, 20), (10, 15))


def test_channels_can_be_forced(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "grey.png", 77)
    picture(tmp_path / "in" / "red.png", (255, 0, 0))
    make(tmp_path / "in", tmp_path / "mixed")
    make(tmp_path / "in", tmp_path / "grey", "--channels", "1")
    assert content(tmp_path / "mixed" / "train")["image"]["channels"] == [1, 3]  # type: ignore[index]
    config = ShardsConfig(path=tmp_path / "grey", size=8, channels=1)
    batch = Stream(config, split="train", batch=1, rank=0, world=1, seed=0).first(2)
    assert sorted(batch.data[:, 0, 0, 0].tolist()) == [76, 77]  # 0.299 * 255
    colour = ShardsConfig(path=tmp_path / "mixed", size=8, channels=3)
    assert Stream(colour, split="train", batch=1, rank=0, world=1, seed=0).first(2).data.shape == (2, 8, 8, 3)


def test_16_bit_is_reduced_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    ramp = (np.arange(256) * 257).astype(np.uint16)[None].repeat(4, 0)
    Image.fromarray(ramp).save(tmp_path / "in" / "x.png")
    make(tmp_path / "in", tmp_path / "out", "--format", "npy")
    found = decode(by_path(tmp_path / "out" / "train")["x.png"]["npy"], "npy", channels=1, max_pixels=10**6)  # type: ignore[arg-type]
    assert np.array_equal(found[0, :, 0], np.arange(256))
    assert "1 image reduced from 16 to 8 bit" in capsys.readouterr().out


# ------------------------------------------------------------------ bad files
def bad_folder(source: Path, good: int) -> Path:
    for number in range(good):
        picture(source / f"{number:03d}.png", (number, 0, 0))
    whole = noisy(source / "cut.jpg", 1).read_bytes()
    (source / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (source / "empty.png").touch()
    (source / "text.png").write_text("this is no image\n" * 20)
    Image.new("1", (20_000, 20_000)).save(source / "bomb.png")
    return source


def test_bad_images_are_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = bad_folder(tmp_path / "in", good=8)
    assert make(source, tmp_path / "out", "--max-bad", "0.5", "--workers", "3") == 0
    said = capsys.readouterr().out
    assert "left out: train: bomb.png: has 20000 x 20000 pixels, at most 64,000,000 are allowed" in said
    assert "left out: train: cut.jpg: cannot be decoded wholly (image file is truncated" in said
    assert "left out: train: empty.png: is empty" in said
    assert "left out: train: text.png: is no image of a known format" in said
    assert len(by_path(tmp_path / "out" / "train")) == 8
    assert "packed 8 train images, 4 left out; 0 classes;" in said
    assert len(content(tmp_path / "out" / "train")["report"]["left_out"]) == 4  # type: ignore[index]


def test_an_image_that_its_format_cannot_hold_is_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(tmp_path / "in" / "x.png")
    picture(tmp_path / "in" / "wide.png", size=(20_000, 2))
    assert make(tmp_path / "in", tmp_path / "out", "--format", "webp", "--max-bad", "0.5") == 0
    assert "left out: train: wide.png: has 20000 x 2 pixels, webp holds 16,383 a side" in capsys.readouterr().out


def test_too_many_bad_images_are_an_error_and_a_higher_share_finishes_the_set(tmp_path: Path) -> None:
    source = bad_folder(tmp_path / "in", good=8)
    with pytest.raises(ValueError, match=r"4 of 12 images \(33\.3%\) are bad, more than --max-bad 0\.01; the first: "):
        make(source, tmp_path / "out")
    assert not (tmp_path / "out" / "train" / "index.json").exists()
    with pytest.raises(ValueError, match="unfinished"):
        indices.load(ShardsConfig(path=tmp_path / "out", size=8), "train")
    assert make(source, tmp_path / "out", "--max-bad", "0.4") == 0
    assert indices.load(ShardsConfig(path=tmp_path / "out", size=8), "train").samples == 8


def test_a_folder_of_bad_images_only_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.png").write_text("no")
    with pytest.raises(ValueError, match=r"no image of the train split can be used \(of 1\); the first: train: x\.png"):
        make(tmp_path / "in", tmp_path / "out", "--max-bad", "0.99")


def test_an_image_field_that_the_set_does_not_have_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "x.png")
    make(tmp_path / "in", tmp_path / "out")
    assert indices.load(ShardsConfig(path=tmp_path / "out", size=8, image="npy"), "train").samples == 1
    with pytest.raises(ValueError, match=r"^data\.image: png is no field of .*train \(found: npy\)"):
        indices.load(ShardsConfig(path=tmp_path / "out", size=8, image="png"), "train")


def test_a_terminal_shows_a_bar_and_a_pipe_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        picture(tmp_path / "in" / f"{number}.png")
    make(tmp_path / "in", tmp_path / "piped")
    assert capsys.readouterr().err == ""
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "tools.shards.make", "folder", str(tmp_path / "in"), str(tmp_path / "shown")]
    environment = {**os.environ, "TERM": "xterm"}
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=theirs, env=environment, check=True)
    said = os.read(ours, 100_000).decode()
    os.close(ours)
    os.close(theirs)
    assert "packing" in said
    assert "3/3" in said


@pytest.mark.parametrize("kind", ["empty", "no images", "missing", "file"])
def test_a_source_without_images_is_an_error_and_makes_nothing(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "in"
    if kind != "missing":
        source.mkdir()
    if kind == "no images":
        (source / "notes.txt").write_text("x")
    if kind == "file":
        source = picture(tmp_path / "in" / "x.png")
    match = {"missing": "does not exist", "file": "is no folder"}.get(kind, "holds no images")
    with pytest.raises(ValueError, match=match):
        make(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dest_inside_the_source_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "x.png")
    with pytest.raises(ValueError, match="lies inside"):
        make(tmp_path / "in", tmp_path / "in" / "out")


# ------------------------------------------------------------------ splits and order
def test_the_holdout_is_chosen_by_name_and_is_never_trained_on(tmp_path: Path) -> None:
    for number in range(60):
        picture(tmp_path / "in" / f"{number % 3}" / f"{number}.png", (number, 0, 0), size=(4, 4))
    main(["folder", str(tmp_path / "in"), str(tmp_path / "out"), "--val-fraction", "0.25"])
    train, test = (set(by_path(tmp_path / "out" / split)) for split in ("train", "test"))
    assert not train & test
    assert len(train | test) == 60
    assert 5 <= len(test) <= 26  # 15 expected, three standard deviations of 3.4
    picture(tmp_path / "in" / "0" / "new.png", size=(4, 4))
    main(["folder", str(tmp_path / "in"), str(tmp_path / "more"), "--val-fraction", "0.25"])
    assert set(by_path(tmp_path / "more" / "test")) - {"0/new.png"} == test  # images do not change sides


def test_a_small_folder_has_a_test_image_too(tmp_path: Path) -> None:
    for number in range(2):
        picture(tmp_path / "in" / f"{number}.png")
    main(["folder", str(tmp_path / "in"), str(tmp_path / "out")])
    assert [len(by_path(tmp_path / "out" / split)) for split in ("train", "test")] == [1, 1]


def test_a_test_folder_shares_the_classes_of_the_training_folder(tmp_path: Path) -> None:
    for name in ("train/1/a.png", "train/10/b.png", "val/10/c.png", "val/2/d.png"):
        picture(tmp_path / "in" / name)
    main(["folder", str(tmp_path / "in"), str(tmp_path / "out"), "--splits", "train,val"])
    for split in ("train", "test"):
        assert content(tmp_path / "out" / split)["classes"] == ["1", "2", "10"]
    assert {p: s["cls"] for p, s in by_path(tmp_path / "out" / "test").items()} == {
        "val/10/c.png": b"2", "val/2/d.png": b"1",
    }  # fmt: skip
    with pytest.raises(ValueError, match="--splits names gone, which is no folder"):
        main(["folder", str(tmp_path / "in"), str(tmp_path / "x"), "--splits", "train,gone"])


def test_samples_are_shuffled_when_packed_and_the_seed_decides(tmp_path: Path) -> None:
    for number in range(40):
        picture(tmp_path / "in" / f"{number // 20}" / f"{number:02d}.png", size=(4, 4))
    orders = []
    for name, options in {"a": (), "b": ("--workers", "4"), "c": ("--seed", "1")}.items():
        make(tmp_path / "in", tmp_path / name, *options)
        orders.append([json.loads(s["json"])["path"] for s in samples(tmp_path / name / "train")])  # type: ignore[arg-type]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])
    assert 3 < sum(path.startswith("0/") for path in orders[0][:20]) < 17  # 10 of 20 expected, deviation 1.6


# ------------------------------------------------------------------ interruption
def test_a_finished_set_is_never_written_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "in" / "x.png")
    make(tmp_path / "in", tmp_path / "out")
    before = every_byte(tmp_path / "out")
    assert make(tmp_path / "in", tmp_path / "out") == 0
    assert "already complete" in capsys.readouterr().out
    with pytest.raises(ValueError, match="nothing is overwritten"):
        make(tmp_path / "in", tmp_path / "out", "--size", "4")
    picture(tmp_path / "in" / "y.png")
    with pytest.raises(ValueError, match="nothing is overwritten"):
        make(tmp_path / "in", tmp_path / "out")
    assert every_byte(tmp_path / "out") == before


def test_a_folder_with_something_else_in_it_is_not_touched(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "x.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not empty and not a set of shards"):
        make(tmp_path / "in", tmp_path / "out")
    assert every_byte(tmp_path / "out") == {"thesis.txt": b"years of work"}


@pytest.mark.parametrize("calls", [1, 3, 11, 22])
def test_an_interrupted_set_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], calls: int
) -> None:
    for number in range(24):
        noisy(tmp_path / "in" / f"{number}.png", number, size=(16, 16))
    (tmp_path / "in" / "bad.png").write_text("no")
    options = ("--shard-size", "10KB", "--max-bad", "0.1", "--workers", "1")
    make(tmp_path / "in", tmp_path / "whole", *options)
    real, count = folder.Encode._pack, iter(range(1, 1000))

    def interrupted(self: folder.Encode, key: str, data: bytes, found: folder.Found) -> pack.Packed:
        if next(count) == calls:
            raise KeyboardInterrupt
        return real(self, key, data, found)

    monkeypatch.setattr(folder.Encode, "_pack", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "in", tmp_path / "out", *options)
    assert "interrupted; the same command goes on from here" in capsys.readouterr().err
    monkeypatch.setattr(folder.Encode, "_pack", real)
    with pytest.raises(ValueError, match=r"^data\.path: .* is unfinished; run the `tandem data make` command"):
        indices.load(ShardsConfig(path=tmp_path / "out", size=8), "train")
    with pytest.raises(ValueError, match="begun from other files or with other options"):
        make(tmp_path / "in", tmp_path / "out", *options, "--seed", "5")
    assert make(tmp_path / "in", tmp_path / "out", *options) == 0
    assert every_byte(tmp_path / "out") == every_byte(tmp_path / "whole")
    assert len(list((tmp_path / "out" / "train").glob("*.tar"))) > 3


def test_a_killed_maker_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    for number in range(60):
        noisy(tmp_path / "in" / f"{number}.png", number, size=(200, 200))
    options = ["--val-fraction", "0", "--shard-size", "0.3MB", "--workers", "2", "--format", "png"]
    command = [
        sys.executable,
        "-m",
        "tools.shards.make",
        "folder",
        str(tmp_path / "in"),
        str(tmp_path / "out"),
        *options,
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "out" / "train").glob("*.tar"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert (tmp_path / "out" / indices.UNFINISHED).exists()
    for dest in ("out", "whole"):
        assert main(["folder", str(tmp_path / "in"), str(tmp_path / dest), *options]) == 0
    assert every_byte(tmp_path / "out") == every_byte(tmp_path / "whole")


def test_two_makers_do_not_work_on_one_set(tmp_path: Path) -> None:
    plan = pack.Plan(splits={"train": [1]}, classes=(), options={})
    with pack._workplace(tmp_path / "out", plan), pytest.raises(ValueError, match="another `tandem data make`"):
        pack._workplace(tmp_path / "out", plan).__enter__()


# ------------------------------------------------------------------ command line
@pytest.mark.parametrize("words", [["make"], ["make", "fashion-mnist"], ["make", "folder"]])
def test_each_help_shows_an_example(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([*words[1:], "--help"])
    said = capsys.readouterr().out
    assert left.value.code == 0
    assert "example" in said
    assert f"tandem data {' '.join(words)}" in said


@pytest.mark.parametrize(
    "options",
    [
        ["--size", "0"], ["--size", "1x2x3"], ["--size", "big"], ["--val-fraction", "1"], ["--workers", "0"],
        ["--max-bad", "-1"], ["--background", "1,2"], ["--background", "1,2,300"], ["--range", "1,0"],
        ["--shard-size", "64"], ["--shard-size", "0MB"], ["--splits", "train"], ["--max-megapixels", "-1"],
        ["--max-megapixels", "inf"], ["--shard-size", "64B"], ["--size", "16385"],
        ["--size", "9" * 30], ["--workers", "9" * 30], ["--seed", "9" * 30],
    ],
)  # fmt: skip
def test_a_bad_option_is_named(tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["folder", str(tmp_path), str(tmp_path / "out"), *options])
    assert left.value.code == 2
    assert options[0] in capsys.readouterr().err

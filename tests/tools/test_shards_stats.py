"""`tandem data stats`: the figures of real and of planted sets, and what it warns of."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import chi2_contingency

from tests import starts
from tests.tools.pictures import Pixels, encoded, enlarged, holds, leaves, write_set
from tools.shards import classes, stats
from tools.shards.make import main as make
from tools.shards.measure import Moments
from tools.shards.sheet import CELL, fit
from tools.shards.walk import Chunk, spread, walk
from trainer.data import ShardsConfig, index

Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Ask:
    """ask(folder, *options): what `--json -` prints."""

    def run(folder: Path, *options: str) -> dict[str, Any]:
        capsys.readouterr()
        assert stats.main([str(folder), "--json", "-", *options]) == 0
        found = json.loads(capsys.readouterr().out)
        assert isinstance(found, dict)
        return found

    return run


@pytest.fixture(scope="module")
def pictures() -> list[Pixels]:
    return leaves(np.random.default_rng(5), 48, 60)


def test_fashion_mnist_has_the_figures_that_are_known(fashion: Path, ask: Ask) -> None:
    found = ask(fashion, "--split", "train")
    train = found["splits"]["train"]
    assert (train["samples"], train["looked_at"], train["bad"]["count"]) == (60_000, 60_000, 0)
    assert train["mean"] == pytest.approx([0.2860], abs=5e-5) and train["std"] == pytest.approx([0.3530], abs=5e-5)
    assert [one["samples"] for one in train["classes"]["counts"]] == [6_000] * 10
    assert 0.8 < train["classes"]["order"] < 1.2
    assert found["copies"]["exact"]["groups"] == 0  # not one; but dozens of shirts differ by next to nothing
    assert 40 < found["copies"]["near"]["pairs"] < 120
    assert train["grids"] == {} and found["warnings"] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["emoji", "--style", "google"],
        ["emoji", "--style", "twitter"],
        ["emoji", "--style", "pairs"],
        ["faces-drawn", "--count", "1200"],
        ["faces-drawn", "--count", "800", "--size", "128"],
        ["faces-drawn", "--count", "600", "--size", "48", "--style", "personas"],
        ["faces-drawn", "--count", "600", "--style", "notionists"],
        ["photos", "--count", "1200", "--size", "64"],
        ["photos", "--count", "400"],
    ],
    ids=" ".join,
)
def test_no_set_of_ours_is_accused_of_a_grid(words: list[str], tmp_path: Path, ask: Ask) -> None:
    assert make([*words[:1], str(tmp_path / "set"), *words[1:]]) == 0
    found = ask(tmp_path / "set")
    assert not any("grid" in text for text in found["warnings"])
    # photographs came as JPEG of good quality, and show it where they are unscaled
    wanted = {"8"} if words[0] == "photos" else set()
    assert all(set(split["grids"] or {}) <= wanted for split in found["splits"].values())


def test_copies_are_named_within_and_between_splits(pictures: list[Pixels], tmp_path: Path, ask: Ask) -> None:
    brighter = np.clip(pictures[5].astype(int) + 3, 0, 255).astype(np.uint8)
    train = [*pictures[:40], pictures[3], brighter]
    labels = [0] * 40 + [1, 0]
    write_set(tmp_path, train, labels=labels, shard=15)
    write_set(tmp_path, [*pictures[40:], pictures[7]], labels=[1] * 21, split="test")
    found = ask(tmp_path)
    exact, near = found["copies"]["exact"], found["copies"]["near"]
    assert (exact["groups"], exact["copies"], exact["labels_differ"]) == (2, 2, 2)
    assert exact["across_splits"] == {"test": 1, "train": 1}
    across, within = ([(one["split"], one["where"].rpartition("/")[2]) for one in group] for group in exact["named"])
    assert across == [("train", "train-00000.tar: 00007"), ("test", "test-00000.tar: 00020")]
    assert within == [("train", "train-00000.tar: 00003"), ("train", "train-00002.tar: 00040")]
    assert (near["pairs"], near["across_splits"], near["complete"]) == (1, 0, True)
    assert [one["sample"] for one in near["named"][0]["samples"]] == [5, 41]
    text = "\n".join(found["warnings"])
    assert "1 of train, 1 of test stand in another split too" in text
    assert "2 groups of equal images with different labels" in text
    alone = ask(tmp_path, "--split", "train")
    assert alone["copies"]["exact"]["across_splits"] == {} and alone["copies"]["exact"]["groups"] == 1


def test_what_was_done_when_the_set_was_made_is_told_once(
    pictures: list[Pixels], tmp_path: Path, ask: Ask, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, picture in enumerate(pictures[:12]):
        path = tmp_path / "in" / ("train" if number < 8 else "val") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).convert("RGBA").save(path)
    (tmp_path / "in" / "train" / "empty.png").touch()
    folder = tmp_path / "out"
    assert make(["folder", str(tmp_path / "in"), str(folder), "--splits", "train,val", "--max-bad", "0.5"]) == 0
    found = ask(folder)
    assert found["made"] == [{"splits": ["train", "test"], "report": found["made"][0]["report"]}]
    assert "made" not in found["splits"]["test"]
    assert stats.main([str(folder)]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "converted" in line or "left out" in line]
    assert told == [
        "made: converted: 12 images: transparency laid on the background",
        "made: left out: 1 file: train: train/empty.png: is empty",
    ]


def test_counts_of_one_are_in_the_singular(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (40, 40, 3), np.uint8)
    near = np.clip(image + 1.0, 0, 255).astype(np.uint8)
    flat = np.full((40, 40, 3), 7, np.uint8)
    labels = [0, 0, 0, 1, *[0] * 300]
    others = list(generator.integers(0, 256, (300, 8, 8, 3), np.uint8))
    folder = write_set(tmp_path / "set", [image, image, near, flat, *others], labels=labels)
    assert stats.main([str(folder)]) == 0
    said = capsys.readouterr().out
    assert "in 1 shard," in said and "of one colour: 1 image\n" in said and "exact: 1 copy of 1 image\n" in said
    assert "near: 1 pair\n" in said and "classes: 2, the smallest has 1 sample, the largest 303" in said
    assert "warning: train: 1 image is of one colour" in said and "warning: 1 image is an exact copy" in said
    assert "the classes are uneven: the smallest has 1 sample, the largest 303" in said
    assert "class 1: 1 (0.3%)" in said


@pytest.mark.parametrize("terminal", [True, False])
def test_names_cannot_steer_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, terminal: bool
) -> None:
    for name in ("good", "bad\udcfe\n\x1b]0;title\x07"):
        path = tmp_path / "in" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(np.zeros((8, 8, 3), np.uint8), "PNG") if name == "good" else b"")
    words = [str(tmp_path / "in"), str(tmp_path / "out"), "--val-fraction", "0", "--max-bad", "0.5"]
    assert make(["folder", *words]) == 0
    if terminal:
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("TTY_INTERACTIVE", "1")
        monkeypatch.setenv("COLUMNS", "120")
    capsys.readouterr()
    assert stats.main([str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert r"train: bad\udcfe\n\x1b]0;title\x07.png: is empty" in said
    assert "\x1b]" not in said and "\x07" not in said


def test_classes_in_order_are_told_with_what_to_do(tmp_path: Path, ask: Ask) -> None:
    generator = np.random.default_rng(0)
    images = list(generator.integers(0, 256, (1_600, 4, 4, 1), np.uint8))
    labels = [number // 400 for number in range(1_600)]
    in_order = write_set(tmp_path / "a", images, labels=labels, shard=200)
    found = ask(in_order)
    assert found["splits"]["train"]["classes"]["order"] > 50
    assert any("set data.window to all" in text and "tandem data reshard" in text for text in found["warnings"])
    few = ask(write_set(tmp_path / "b", images, labels=labels, shard=800))
    assert any("the default data.window of 4 mixes all 2 shards" in text for text in few["warnings"])
    shuffled = ask(write_set(tmp_path / "c", images, labels=generator.permutation(labels).tolist(), shard=200))
    assert shuffled["splits"]["train"]["classes"]["order"] < classes.SORTED
    assert not any("order" in text for text in shuffled["warnings"])


def test_bad_images_and_missing_labels_are_counted_and_named(pictures: list[Pixels], tmp_path: Path, ask: Ask) -> None:
    images: list[Pixels | bytes] = list(pictures)
    images[4] = encoded(pictures[4], "PNG")[:300]
    images[9] = b"no image"
    labels: list[int | None] = [number % 2 * 20 for number in range(60)]
    labels[11] = None
    write_set(tmp_path, images, labels=labels)
    found = ask(tmp_path)
    train = found["splits"]["train"]
    assert train["looked_at"] == 60 and train["bad"]["count"] == 2
    assert [one["where"].rpartition(" ")[2] for one in train["bad"]["named"]] == ["00004", "00009"]
    assert all(one["why"] for one in train["bad"]["named"])
    assert train["classes"]["unlabelled"] == 1
    text = "\n".join(found["warnings"])
    assert "2 of 60 images cannot be decoded" in text and "1 of 60 samples has no label" in text
    assert "19 of 21 classes have no sample, such as 1" in text


def test_frames_grids_and_grey_are_warned_of(pictures: list[Pixels], tmp_path: Path, ask: Ask) -> None:
    images = []
    for picture in pictures:
        grey = np.asarray(Image.fromarray(picture[:24, :24]).convert("L"))[..., None].repeat(3, axis=2)
        image = enlarged(grey, 2, Image.Resampling.NEAREST).copy()
        if len(images) % 4 == 0:
            image[:, :6] = image[:, -6:] = 255
        images.append(image)
    found = ask(write_set(tmp_path, images))
    train = found["splits"]["train"]
    assert train["frames"]["images"] == 15 and train["grey_as_colour"] == 60
    assert train["frames"]["pixels"]["left"] == {"low": 6, "median": 6, "high": 6}
    assert list(train["grids"]) == ["2"]
    text = "\n".join(found["warnings"])
    assert "25.0% of the images have a frame" in text
    assert "a grid of 2 pixels" in text and "or drawings on one raster" in text
    assert "the colour images are grey" in text


def test_images_of_mixed_sizes_channels_and_kinds_are_measured(tmp_path: Path, ask: Ask) -> None:
    generator = np.random.default_rng(3)
    sizes = [(5, 9, 3), (30, 4, 1), (16, 16, 3), (1, 1, 1), (40, 40, 3)]
    images = [generator.integers(0, 256, shape, np.uint8) for shape in sizes]
    train = ask(write_set(tmp_path, images))["splits"]["train"]
    flat = np.concatenate([np.broadcast_to(image, (*image.shape[:2], 3)).reshape(-1, 3) for image in images]) / 255
    assert train["mean"] == pytest.approx(flat.mean(axis=0).tolist())
    assert train["std"] == pytest.approx(flat.std(axis=0).tolist())
    assert train["height"] == {"low": 1, "median": 16, "high": 40} and train["width"]["low"] == 1
    assert train["channels"] == {"1": 2, "3": 3} and train["fields"] == {"png": 5}
    assert train["grids"] is None and train["classes"]["order"] is None


def test_figures_depend_on_neither_threads_nor_chunks(pictures: list[Pixels], tmp_path: Path, ask: Ask) -> None:
    write_set(tmp_path, [*pictures, *pictures[:3]], labels=[number % 3 for number in range(63)], shard=10)
    assert ask(tmp_path, "--workers", "1") == ask(tmp_path, "--workers", "4")


def test_a_sample_is_drawn_by_the_seed(pictures: list[Pixels], tmp_path: Path, ask: Ask) -> None:
    write_set(tmp_path, pictures)
    one, again, other = (ask(tmp_path, "--samples", "20", "--seed", seed) for seed in ("0", "0", "1"))
    assert one == again and one["splits"]["train"]["looked_at"] == 20
    assert one["splits"]["train"]["mean"] != other["splits"]["train"]["mean"]


def test_the_command_speaks_plain_lines_and_writes_json_and_a_sheet(pictures: list[Pixels], tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", pictures[:30], labels=[number % 3 for number in range(30)])
    figures, sheet = tmp_path / "figures.json", tmp_path / "sheet.png"
    words = ["data", "stats", str(folder), "--json", str(figures), "--sheet", str(sheet)]
    said = starts.tandem(tmp_path / "logs", *words).ok()
    assert "train: samples: 30 in 1 shard" in said.out and "copies: exact: none" in said.out
    assert "train: class 1: 10 (33.3%)" in said.out and "\x1b" not in said.out
    assert json.loads(figures.read_text())["splits"]["train"]["samples"] == 30
    drawn = np.asarray(Image.open(sheet))
    assert drawn.ndim == 3 and all(holds(drawn, fit(picture, CELL)) for picture in pictures[:30:4])
    before = sheet.read_bytes()
    starts.tandem(tmp_path / "logs", *words).ok()
    assert sheet.read_bytes() == before


def test_what_cannot_be_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    starts.tandem(logs, "data", "stats", str(tmp_path / "none")).refused("does not exist")
    starts.tandem(logs, "data", "stats", str(tmp_path), "--sheet", "sheet.jpg").refused("end it in .png")


@given(
    labels=st.lists(st.integers(0, 4), min_size=2 * classes.RUN, max_size=1_500),
    cuts=st.lists(st.integers(1, 1_499), max_size=4),
)
@settings(max_examples=25, deadline=None)
def test_the_order_of_classes_is_pearsons_whatever_the_shards(labels: list[int], cuts: list[int]) -> None:
    class Tables:
        """As much of an index as is asked for."""

        def __init__(self) -> None:
            edges = sorted({0, len(labels), *(cut for cut in cuts if cut < len(labels))})
            self.classes = tuple("abcde")
            self.parts = [labels[low:high] for low, high in pairwise(edges)]
            self.shards = tuple(self.parts)

        def table(self, shard: int) -> dict[str, np.ndarray]:
            return {"label": np.array(self.parts[shard], np.int32)}

    found = classes.balance(Tables())  # type: ignore[arg-type]
    assert found.counts.tolist() == [labels.count(label) for label in range(5)]
    runs = len(labels) // classes.RUN
    table = np.array([np.bincount(labels[run * 256 : run * 256 + 256], minlength=5) for run in range(runs)])
    table = table[:, table.sum(axis=0) > 0]
    if table.shape[1] < 2:
        assert found.order is None
        return
    expected = chi2_contingency(table, correction=False)
    assert found.order == pytest.approx(expected.statistic / expected.dof)


@given(samples=st.integers(1, 300), count=st.integers(1, 300), seed=st.integers(-(2**63), 2**63 - 1))
def test_a_spread_is_of_different_samples_from_all_over(samples: int, count: int, seed: int) -> None:
    found = spread(samples, count, seed=seed)
    assert len(found) == min(samples, count) and (np.diff(found) > 0).all()
    assert found[0] >= 0 and found[-1] < samples
    if count < samples:
        parts = [part * samples // count for part in range(count + 1)]
        assert all(low <= one < high for one, (low, high) in zip(found.tolist(), pairwise(parts), strict=True))


@given(st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=9), min_size=1, max_size=5))
def test_moments_of_parts_are_those_of_the_whole(parts: list[list[int]]) -> None:
    def of(levels: list[int]) -> Moments:
        array = np.array(levels, np.float64)
        return Moments(len(levels), array.sum(keepdims=True), (array**2).sum(keepdims=True))

    joined = of(parts[0])
    for part in parts[1:]:
        joined = joined.join(of(part))
    whole = np.concatenate([np.array(part) for part in parts]) / 255
    assert joined.mean() == pytest.approx([whole.mean()]) and joined.std() == pytest.approx([whole.std()], abs=1e-6)


def test_a_walk_gives_every_sample_in_order_and_each_bad_one_with_its_reason(
    pictures: list[Pixels], tmp_path: Path
) -> None:
    images: list[Pixels | bytes] = list(pictures[:25])
    images[7] = b""
    config = ShardsConfig(path=write_set(tmp_path, images, shard=10), size=48)
    opened = index.load(config, "train")

    def whole(chunk: Chunk) -> Chunk:
        return chunk

    chunks = list(walk(opened, config, look=whole, threads=3))
    samples = [sample for chunk in chunks for sample in chunk.samples.tolist()]
    assert samples == [number for number in range(25) if number != 7]
    decoded = [image for chunk in chunks for image in chunk.images]
    assert all(np.array_equal(image, pictures[sample]) for sample, image in zip(samples, decoded, strict=True))
    assert [bad for chunk in chunks for bad in chunk.bad] == [(7, "is empty")]
    some = np.array([3, 9, 10, 24])
    chunks = list(walk(opened, config, look=whole, threads=1, samples=some))
    assert [sample for chunk in chunks for sample in chunk.samples.tolist()] == some.tolist()
    opened.close()

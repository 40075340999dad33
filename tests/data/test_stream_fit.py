"""Images of another size than the config's, of several sizes, and of several sets."""

import io
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.data import MixtureConfig, ShardsConfig, Stream, convert
from trainer.data.config import LimitsConfig, SetConfig


def picture(number: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def write(tmp_path: Path, tar_of: Callable[..., Path]) -> Callable[..., Path]:
    """write(name, sizes): a set of one PNG of each (height, width)."""

    def write(name: str, sizes: list[tuple[int, int]]) -> Path:
        members = [(f"{number:03d}.png", png(picture(number, *size))) for number, size in enumerate(sizes)]
        tar_of(tmp_path / name / "train" / "0.tar", members)
        return tmp_path / name

    return write


def stream(path: Path, *, batch: int = 4, rank: int = 0, world: int = 1, **options: Any) -> Stream:
    config = ShardsConfig(path=path, readers=1, prefetch=2, **options)
    return Stream(config, split="train", batch=batch, rank=rank, world=world, seed=0)


MIXED = [(20, 30), (16, 16), (9, 40), (25, 12), (16, 8), (40, 40)]


# ------------------------------------------------------------------ one size
@pytest.mark.parametrize("fit", ["resize", "center", "random"])
def test_images_of_one_size_come_as_they_are_stored(write: Callable[..., Path], fit: str) -> None:
    one = stream(write("set", [(20, 30)] * 6), size=16, fit=fit)
    assert one.stored == (20, 30, 3)
    for raw in islice(one.batches(0), 3):
        for image, number in zip(raw.data, raw.index.tolist(), strict=True):
            assert np.array_equal(image, picture(number, 20, 30))


def test_a_size_that_the_data_does_not_have_says_which_it_has_and_what_to_do(write: Callable[..., Path]) -> None:
    path = write("set", [(20, 30)] * 3)
    with pytest.raises(
        ValueError, match=r"^data\.size: 16 x 16 is not what .* holds \(20 x 30, height x width\)"
    ) as no:
        stream(path, size=16)
    assert "set data.size to [20, 30], take data.fit=resize, or" in str(no.value)
    assert stream(path, size=(20, 30)).stored == (20, 30, 3)


@pytest.mark.parametrize("fit", ["center", "random"])
@pytest.mark.parametrize("size", [(21, 30), (20, 31), 64])
def test_a_cut_larger_than_the_images_is_refused(
    write: Callable[..., Path], fit: str, size: int | tuple[int, int]
) -> None:
    path = write("set", [(20, 30)] * 3)
    with pytest.raises(ValueError, match=rf"^data\.fit: {fit} cuts .* and .* holds 20 x 30.*data\.fit=resize"):
        stream(path, size=size, fit=fit)


# ------------------------------------------------------------------ several sizes
@pytest.mark.parametrize("fit", ["exact", "center", "random"])
def test_images_of_several_sizes_need_to_be_scaled(write: Callable[..., Path], fit: str) -> None:
    path = write("set", MIXED)
    with pytest.raises(ValueError, match=rf"^data\.fit: {fit} does not go with images of different sizes") as no:
        stream(path, size=16, fit=fit)
    assert "(9 to 40 x 8 to 40, height x width)" in str(no.value)
    assert "data.fit=resize" in str(no.value)
    assert "tandem data make folder SRC DEST --size N" in str(no.value)


@pytest.mark.parametrize("cache", [0, 64])
def test_images_of_several_sizes_are_scaled_and_cut_as_they_are_read(write: Callable[..., Path], cache: int) -> None:
    one = stream(write("set", MIXED), size=(16, 12), fit="resize", cache_mb=cache)
    assert one.stored == (16, 12, 3)
    for raw in islice(one.batches(0), 6):
        for image, number in zip(raw.data, raw.index.tolist(), strict=True):
            assert np.array_equal(image, convert.resize(picture(number, *MIXED[number]), (16, 12)))
    one.close()


def test_the_limit_of_pixels_holds_where_sizes_differ(write: Callable[..., Path]) -> None:
    limits = LimitsConfig(megapixels=0.001)  # 40 x 40 is more
    config = ShardsConfig(path=write("set", MIXED), size=8, fit="resize", max_bad_fraction=0.5, limits=limits)
    one = Stream(config, split="train", batch=6, rank=0, world=1, seed=0)
    (raw,) = one.evaluation(6)
    assert raw.index[raw.weight > 0].tolist() == [0, 1, 2, 3, 4]
    assert [(bad.key, bad.reason) for bad in one.news()] == [("005", "has 40 x 40 pixels, at most 1,000 are allowed")]
    one.close()


# ------------------------------------------------------------------ several sets
@pytest.mark.parametrize("cache", [0, 64])
def test_a_mixture_draws_by_weight_and_is_the_same_for_any_world_size(write: Callable[..., Path], cache: int) -> None:
    small, large = write("small", [(8, 8)] * 5), write("large", [(16, 16)] * 12)
    config = MixtureConfig(
        sets=(SetConfig(path=small, weight=1.0), SetConfig(path=large, weight=3.0)), size=8, fit="resize",
        cache_mb=cache, readers=2,
    )  # fmt: skip

    def read(rank: int, world: int, start: int, steps: int) -> list[Any]:
        one = Stream(config, split="train", batch=64, rank=rank, world=world, seed=1)
        assert (one.samples, one.index.set_samples, one.stored) == (17, (5, 12), (8, 8, 3))
        found = list(islice(one.batches(start), steps))
        one.close()
        return found

    whole = read(0, 1, 0, 64)  # 4,096 positions: one block
    index = torch.cat([raw.index for raw in whole])
    assert int((index < 5).sum()) == 1024
    for raw in whole[:4]:
        for image, number in zip(raw.data, raw.index.tolist(), strict=True):
            expected = picture(number, 8, 8) if number < 5 else convert.resize(picture(number - 5, 16, 16), (8, 8))
            assert np.array_equal(image, expected)
    shares = [read(rank, 4, 640, 3) for rank in range(4)]
    for raw, parts in zip(whole[10:13], zip(*shares, strict=True), strict=True):
        assert torch.equal(raw.index, torch.cat([part.index for part in parts]))
        assert torch.equal(raw.data, torch.cat([part.data for part in parts]))


def test_an_evaluation_of_a_mixture_is_all_of_its_sets(write: Callable[..., Path]) -> None:
    paths = [write("a", [(8, 8)] * 5), write("b", [(8, 8)] * 4)]
    config = MixtureConfig(sets=tuple(SetConfig(path=path) for path in paths), size=8, cache_mb=0)
    one = Stream(config, split="train", batch=4, rank=0, world=1, seed=1)
    index = torch.cat([raw.index[raw.weight > 0] for raw in one.evaluation(4)])
    assert index.tolist() == list(range(9))
    one.close()


@pytest.mark.parametrize("fit", ["resize", "center", "random"])
def test_images_larger_than_the_limit_are_refused_before_any_is_read(write: Callable[..., Path], fit: str) -> None:
    path = write("set", [(20, 30)] * 3)
    with pytest.raises(ValueError, match=r"^data\.limits\.megapixels: 0\.0005 allows no image of .* \(20 x 30"):
        stream(path, size=16, fit=fit, limits=LimitsConfig(megapixels=0.0005))

"""From rows of the shards to images on the device: cut, scaled, mirrored by position, one batch ahead."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.data import Feed, RawBatch, Transform, to_device, to_uint8
from trainer.data.config import Fit
from trainer.data.reader import Interrupted


def rows(data: torch.Tensor, first: int = 0) -> RawBatch:
    position = torch.arange(first, first + len(data))
    return RawBatch(data, torch.zeros(len(data), dtype=torch.int64), position, position.clone(), torch.ones(len(data)))


def transform(fit: Fit, size: tuple[int, int], *, flip: bool = False, seed: int = 0) -> Transform:
    return Transform(height=size[0], width=size[1], fit=fit, flip=flip, seed=seed)


def places(count: int, height: int, width: int) -> torch.Tensor:
    """Images whose two first channels spell row and column of each pixel."""
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([row, column, row * 0], -1).to(torch.uint8).expand(count, -1, -1, -1).contiguous()


def corners(found: torch.Tensor) -> list[tuple[int, int]]:
    """Where each cut of `places` began; fails where it is no whole window."""
    bytes_ = to_uint8(found)
    first = bytes_[:, :1, :1, :2]
    expected = places(1, *bytes_.shape[1:3])[..., :2] + first
    assert torch.equal(bytes_[..., :2], expected)
    return [tuple(pair) for pair in first[:, 0, 0].tolist()]


@pytest.mark.parametrize(("stored", "size", "corner"), [((7, 9), (4, 4), (1, 2)), ((8, 8), (8, 5), (0, 1))])
def test_the_centre_is_cut_out(stored: tuple[int, int], size: tuple[int, int], corner: tuple[int, int]) -> None:
    found = to_device(rows(places(3, *stored)), device="cpu", transform=transform("center", size)).image
    assert found.shape == (3, 3, *size)
    assert corners(found) == [corner] * 3
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_random_cuts_reach_every_corner_alike_and_depend_on_seed_and_position_alone() -> None:
    count, cut = 4000, transform("random", (4, 5), seed=3)
    found = to_device(rows(places(count, 6, 8)), device="cpu", transform=cut).image
    seen = corners(found)
    frequency = np.array([seen.count((top, left)) for top in range(3) for left in range(4)])
    assert frequency.sum() == count
    expected = count / 12
    # chi squared of 11 degrees of freedom: 31.3 is passed once in 1000, and the draws are fixed
    assert ((frequency - expected) ** 2 / expected).sum() < 31.3
    part = to_device(rows(places(8, 6, 8), first=100), device="cpu", transform=cut).image
    assert torch.equal(part, found[100:108])
    other = to_device(rows(places(count, 6, 8)), device="cpu", transform=transform("random", (4, 5), seed=4)).image
    assert not torch.equal(other, found)


def test_a_random_cut_without_room_is_the_image() -> None:
    found = to_device(rows(places(2, 4, 5)), device="cpu", transform=transform("random", (4, 5))).image
    assert corners(found) == [(0, 0)] * 2


@pytest.mark.parametrize(
    ("stored", "size"),
    [((64, 96), (16, 16)), ((33, 33), (16, 16)), ((16, 16), (40, 40)), ((20, 30), (20, 20))],
)
def test_scaling_is_antialiased_as_pillow_does_it(stored: tuple[int, int], size: tuple[int, int]) -> None:
    # levels that no overshoot takes out of 0 to 255, where Pillow would cut it off between its passes too
    noise = np.random.default_rng(0).integers(80, 176, (*stored, 3), np.uint8)
    found = to_device(rows(torch.from_numpy(noise)[None]), device="cpu", transform=transform("resize", size)).image
    scale = max(size[0] / stored[0], size[1] / stored[1])
    scaled = (round(stored[1] * scale), round(stored[0] * scale))
    picture = np.asarray(Image.fromarray(noise).resize(scaled, Image.Resampling.BICUBIC)).astype(int)
    top, left = (picture.shape[0] - size[0]) // 2, (picture.shape[1] - size[1]) // 2
    expected = picture[top : top + size[0], left : left + size[1]]
    # Pillow rounds to a level after each of its two passes, and its coefficients to 1/2^14: up to two levels apart
    assert np.abs(to_uint8(found)[0].numpy().astype(int) - expected).max() <= 2


def test_scaled_images_have_the_256_levels_that_likelihoods_count_on() -> None:
    noise = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (4, 31, 31, 1), np.uint8))
    found = to_device(rows(noise), device="cpu", transform=transform("resize", (16, 16))).image
    level = (found.double() + 1) * 127.5
    assert (level - level.round()).abs().max() < 1e-4  # float32 of v / 127.5 - 1
    assert level.min() >= 0 and level.max() <= 255.0001


def test_what_is_mirrored_and_cut_is_the_same_in_any_split_of_a_batch() -> None:
    both = transform("random", (4, 4), flip=True, seed=9)
    data = torch.randint(0, 256, (32, 6, 6, 3), dtype=torch.uint8)
    whole = to_device(rows(data), device="cpu", transform=both).image
    halves = [to_device(rows(data[i : i + 16], first=i), device="cpu", transform=both).image for i in (0, 16)]
    assert torch.equal(torch.cat(halves), whole)


def test_a_feed_reads_one_batch_ahead_and_gives_them_in_order() -> None:
    read = []

    def batches() -> Iterator[RawBatch]:
        for number in range(4):
            read.append(number)
            yield rows(torch.full((2, 3, 3, 1), number, dtype=torch.uint8))

    seen = []
    for given in Feed(batches(), device=torch.device("cpu"), transform=transform("exact", (3, 3))):
        seen.append(int(to_uint8(given.image)[0, 0, 0, 0]))
        assert read == list(range(min(4, len(seen) + 1)))
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize("error", [ValueError("a.tar: 0001:\n is cut"), OSError(5, "Input/output error", "a.tar")])
def test_a_feed_keeps_an_error_until_it_is_asked_and_gives_what_came_before(error: Exception) -> None:
    def batches() -> Iterator[RawBatch]:
        yield rows(torch.zeros(2, 3, 3, 1, dtype=torch.uint8))
        raise error

    feed = Feed(batches(), device=torch.device("cpu"), transform=transform("exact", (3, 3)))
    assert len(list(feed)) == 1
    assert feed.fault in ("a.tar: 0001:; is cut", "Input/output error: a.tar")


def test_a_feed_that_is_interrupted_has_neither_batch_nor_fault() -> None:
    def batches() -> Iterator[RawBatch]:
        yield rows(torch.zeros(2, 3, 3, 1, dtype=torch.uint8))
        raise Interrupted

    feed = Feed(batches(), device=torch.device("cpu"), transform=transform("exact", (3, 3)))
    assert len(list(feed)) == 1
    assert feed.fault is None


def test_a_feed_hides_no_bug() -> None:
    def batches() -> Iterator[RawBatch]:
        raise KeyError("bug")
        yield

    with pytest.raises(KeyError, match="bug"):
        Feed(batches(), device=torch.device("cpu"), transform=transform("exact", (3, 3))).fetch()

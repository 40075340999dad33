"""The only two conversions of pixels, and the transform on the device."""

import pytest
import torch

from trainer.data import RawBatch, Transform, to_device, to_float, to_uint8


def test_all_levels_make_the_round_trip() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(2, -1, -1, 3).contiguous()
    image = to_float(levels)
    assert image.dtype == torch.float32
    assert image.shape == (2, 3, 16, 16)
    assert image.min() == -1.0
    # 1 is 255 * fl(2 / 255) - 1, off by one rounding of the product
    assert image.max().item() == pytest.approx(1.0, abs=2**-23)
    assert torch.equal(to_uint8(image), levels)


def test_neighbouring_levels_are_equally_far_apart() -> None:
    image = to_float(torch.arange(256, dtype=torch.uint8).view(1, 1, 256, 1)).flatten()
    torch.testing.assert_close(image.diff(), torch.full((255,), 2 / 255), rtol=0, atol=2**-22)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values_outside_are_clamped_and_the_nearest_level_is_taken(dtype: torch.dtype) -> None:
    values = torch.tensor([-7.0, -1.0, 0.0, 1.0, 1.5], dtype=dtype).view(1, 1, 1, 5)
    assert to_uint8(values).flatten().tolist() == [0, 0, 128, 255, 255]


def test_memory_stays_channels_last() -> None:
    image = to_float(torch.zeros(4, 6, 5, 3, dtype=torch.uint8))
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert to_uint8(image).is_contiguous()


def raw(count: int, first: int = 0) -> RawBatch:
    position = torch.arange(first, first + count)
    image = torch.tensor([[10, 20, 30]], dtype=torch.uint8).view(1, 1, 3, 1).repeat(count, 1, 1, 1)
    return RawBatch(image, torch.zeros(count, dtype=torch.int64), position, position.clone(), torch.ones(count))


def transform(*, flip: bool, seed: int) -> Transform:
    return Transform(height=1, width=3, fit="exact", flip=flip, seed=seed)


def test_half_of_the_images_are_mirrored_and_only_left_to_right() -> None:
    batch = to_device(raw(4000), device="cpu", transform=transform(flip=True, seed=1))
    rows = to_uint8(batch.image).view(4000, 3)
    mirrored = rows[:, 0] == 30
    assert torch.equal(rows[~mirrored], torch.tensor([[10, 20, 30]], dtype=torch.uint8).expand((~mirrored).sum(), 3))
    assert torch.equal(rows[mirrored], torch.tensor([[30, 20, 10]], dtype=torch.uint8).expand(mirrored.sum(), 3))
    assert abs(mirrored.float().mean() - 0.5) < 0.04  # 5 standard deviations of a share of 4000
    assert batch.image.is_contiguous(memory_format=torch.channels_last)


def test_what_is_mirrored_depends_on_seed_and_position_alone() -> None:
    whole = to_device(raw(64), device="cpu", transform=transform(flip=True, seed=7)).image
    part = to_device(raw(16, first=32), device="cpu", transform=transform(flip=True, seed=7)).image
    assert torch.equal(part, whole[32:48])
    assert not torch.equal(to_device(raw(64), device="cpu", transform=transform(flip=True, seed=8)).image, whole)


def test_without_flip_nothing_moves() -> None:
    batch = to_device(raw(3), device="cpu", transform=transform(flip=False, seed=0))
    assert to_uint8(batch.image).view(3, 3).tolist() == [[10, 20, 30]] * 3
    assert batch.position.tolist() == [0, 1, 2]

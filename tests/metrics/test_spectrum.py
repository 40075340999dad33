"""Texture: known pictures have known figures, noise counts as sharp, and any split adds up to the whole."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from trainer.metrics.spectrum import Texture

SIZE = 28


def texture(images: torch.Tensor, batch: int = 16) -> Texture:
    found = Texture()
    for part in images.split(batch):
        found.add(part)
    return found


def noise(n: int = 64, channels: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * 0.15  # inside [-1, 1]


def test_images_over_themselves_are_one_in_all() -> None:
    assert tuple(texture(noise()).ratios(texture(noise()))) == (1.0, 1.0, 1.0, 1.0)


def test_half_the_amplitude_is_a_quarter_of_the_power() -> None:
    found = texture(0.5 * noise()).ratios(texture(noise()))
    assert (found.gradient, found.high, found.check) == pytest.approx((0.25, 0.25, 0.25))
    assert found.phase == pytest.approx(1.0)


def test_a_blur_lowers_high_frequencies_most() -> None:
    found = texture(functional.avg_pool2d(noise(), 3, 1, 1)).ratios(texture(noise()))
    assert found.check < found.high < found.gradient < 0.3


@pytest.mark.parametrize("cycles", [3, 6, 8, 14])
def test_the_power_of_a_wave_is_high_from_a_quarter_cycle_a_pixel_on(cycles: int) -> None:
    wave = torch.cos(2 * math.pi * cycles * torch.arange(SIZE) / SIZE).expand(2, 1, SIZE, SIZE)
    sums = texture(wave).sums
    assert sums is not None
    power = float(torch.fft.fft2(wave.double()).abs().square().sum())  # of both images
    high = sums[2] / power
    assert high.item() == pytest.approx(float(cycles / SIZE >= 0.25), abs=1e-6)


def test_a_checkerboard_answers_the_checkerboard_and_a_ramp_does_not() -> None:
    row = torch.arange(SIZE).float()
    board = ((row[:, None] + row) % 2 * 2 - 1).expand(1, 1, SIZE, SIZE)
    ramp = (row / SIZE).expand(1, 1, SIZE, SIZE)
    assert texture(board).ratios(texture(noise())).check > 10
    assert texture(ramp).ratios(texture(noise())).check < 1e-6


def test_the_grid_of_nearest_upsampling_is_seen_as_a_phase_far_from_one() -> None:
    small = noise()[:, :, ::2, ::2]
    nearest = functional.interpolate(small, scale_factor=2, mode="nearest")
    # inside the blocks nothing changes: the ratio has no bound
    assert texture(nearest + 0.01 * noise(seed=1)).ratios(texture(noise())).phase > 100
    assert texture(noise(seed=1)).ratios(texture(noise())).phase == pytest.approx(1.0, abs=0.05)


def test_black_images_have_ratios_without_a_nan() -> None:
    black = texture(torch.full((4, 1, SIZE, SIZE), -1.0))
    assert tuple(black.ratios(black)) == (1.0, 1.0, 1.0, 1.0)
    assert tuple(black.ratios(texture(noise())))[1] < 1e9


@given(st.integers(1, 20), st.integers(0, 20))
@settings(max_examples=20, deadline=None)
def test_any_split_over_batches_and_ranks_is_the_whole(batch: int, first: int) -> None:
    images = noise(20, channels=3)
    whole = texture(images, batch=20)
    ranks = [Texture(), Texture()]
    for rank, part in zip(ranks, (images[:first], images[first:]), strict=True):
        rank.add(images[:0])
        for piece in part.split(batch):
            rank.add(piece)
    other = ranks[1].sums
    merged = ranks[0].merged(lambda mine: mine + other)
    assert whole.sums is not None and merged.sums is not None
    torch.testing.assert_close(merged.sums, whole.sums, rtol=1e-9, atol=1e-9)


def test_images_of_other_sizes_and_no_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(28, 28\) against real ones of \(32, 32\)"):
        texture(noise()).ratios(texture(torch.zeros(1, 1, 32, 32)))
    with pytest.raises(ValueError, match="no images"):
        Texture().ratios(Texture())

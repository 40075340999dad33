"""DiffAugment: what each policy does to a picture, and that draws, not state, decide it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.kernels import noise
from trainer.losses import augment

ALL = tuple(augment.POLICIES)
UNIT = st.floats(0.0, 1.0, exclude_max=True, width=32)


def picture(batch: int = 2, channels: int = 3, height: int = 16, width: int = 12, seed: int = 0) -> Tensor:
    shape = (batch, channels, height, width)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def drawn(positions: Tensor, seed: int = 0) -> dict[str, Tensor]:
    return augment.draws(lambda stream, shape: noise.uniform(seed, stream, positions, shape), ALL)


def test_draws_belong_to_positions_so_real_and_fake_of_a_position_change_alike() -> None:
    x = picture(4)
    whole = augment.apply(x, ALL, drawn(torch.arange(4)))
    parts = [augment.apply(x[i : i + 2], ALL, drawn(torch.arange(i, i + 2))) for i in (0, 2)]
    assert torch.equal(whole, torch.cat(parts))
    same = picture(1).expand(4, -1, -1, -1)
    assert not torch.equal(*augment.apply(same, ALL, drawn(torch.arange(4)))[:2])  # each position its own


@pytest.mark.parametrize("policy", ALL)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_policy_is_differentiable_twice(policy: augment.Policy, channels: int) -> None:
    x = picture(2, channels, 4, 3).requires_grad_()
    draws = drawn(torch.arange(2))
    assert torch.autograd.gradcheck(lambda image: augment.apply(image, (policy,), draws), (x,))
    assert torch.autograd.gradgradcheck(lambda image: augment.apply(image, (policy,), draws).square(), (x,))


def test_no_policy_leaves_the_image_alone() -> None:
    x = picture()
    assert augment.apply(x, (), {}) is x


def test_policies_act_in_the_order_in_which_they_are_named() -> None:
    x, draws = picture(), {"color": torch.full((2, 3), 0.9), "cutout": torch.full((2, 2), 0.5)}
    forth, back = (augment.apply(x, order, draws) for order in (("color", "cutout"), ("cutout", "color")))
    assert not torch.allclose(forth, back)


# ---------------------------------------------------------------- color
def test_color_in_the_middle_of_its_draws_changes_nothing() -> None:
    torch.testing.assert_close(augment.color(picture(), torch.full((2, 3), 0.5)), picture())


@pytest.mark.parametrize("channels", [1, 3])
def test_brightness_adds_up_to_a_half(channels: int) -> None:
    x = picture(1, channels)
    bright = augment.color(x, torch.tensor([[1.0, 0.5, 0.5]]))
    torch.testing.assert_close(bright, x + 0.5)


def test_saturation_scales_distance_from_grey_and_contrast_distance_from_the_mean() -> None:
    x = picture(1)
    grey = augment.color(x, torch.tensor([[0.5, 0.0, 0.5]]))
    torch.testing.assert_close(grey, x.mean(1, keepdim=True).expand_as(x))
    flat = augment.color(x, torch.tensor([[0.5, 0.5, 0.0]]))
    torch.testing.assert_close(flat, x.mean() + 0.5 * (x - x.mean()))


# ---------------------------------------------------------------- translation
@settings(deadline=None)
@given(down=UNIT, right=UNIT, height=st.integers(4, 30), width=st.integers(4, 30))
def test_translation_moves_by_whole_pixels_and_fills_with_grey(
    down: float, right: float, height: int, width: int
) -> None:
    x = picture(1, 1, height, width)
    moved = augment.translation(x, torch.tensor([[down, right]]))
    reach = [int(size / 8 + 0.5) for size in (height, width)]
    shift = [int(u * (2 * r + 1)) - r for u, r in zip((down, right), reach, strict=True)]
    assert all(abs(s) <= r for s, r in zip(shift, reach, strict=True))
    expected = torch.zeros_like(x)
    rows, columns = ((max(0, s), min(n, n + s)) for s, n in zip(shift, (height, width), strict=True))
    expected[..., rows[0] : rows[1], columns[0] : columns[1]] = x[
        ..., rows[0] - shift[0] : rows[1] - shift[0], columns[0] - shift[1] : columns[1] - shift[1]
    ]
    assert torch.equal(moved, expected)


def test_translation_reaches_both_ends_and_every_shift_alike() -> None:
    column = torch.arange(16.0).view(1, 1, 16, 1).expand(5000, 1, 16, 16)
    u = torch.rand(5000, 2, generator=torch.Generator().manual_seed(0))
    shifts = 8 - augment.translation(column, u)[:, 0, 8].amax(1)  # row 8 shows the row that moved there
    found = torch.bincount((shifts + 2).long(), minlength=5) / 5000
    assert len(found) == 5 and (found - 0.2).abs().max() < 0.03  # 5 deviations of sqrt(.16 / 5000)


# ---------------------------------------------------------------- cutout
@settings(deadline=None)
@given(down=UNIT, right=UNIT, height=st.integers(4, 17), width=st.integers(4, 17))
def test_cutout_cuts_one_rectangle_of_half_the_sides_or_what_is_inside(
    down: float, right: float, height: int, width: int
) -> None:
    hole = augment.cutout(torch.ones(1, 1, height, width), torch.tensor([[down, right]]))[0, 0] == 0
    rows, columns = hole.any(1).nonzero().flatten(), hole.any(0).nonzero().flatten()
    for found, size in ((rows, height), (columns, width)):
        cut = int(size / 2 + 0.5)
        assert cut // 2 <= len(found) <= cut
        assert len(found) == 0 or found[-1] - found[0] + 1 == len(found)
        if found[0] > 0 and found[-1] < size - 1:
            assert len(found) == cut
    assert hole.sum() == len(rows) * len(columns)


def test_cutout_has_its_centre_anywhere() -> None:
    u = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0))
    share = (augment.cutout(torch.ones(4000, 1, 8, 8), u) == 0).float().mean(0)[0]
    assert share[4, 4] > share[0, 4] > share[0, 0] > 0.02

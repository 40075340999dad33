"""Folded upsampling and normalisation, each against its definition."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from trainer.networks.blocks import UpConv, normalisation


@given(
    channels=st.integers(1, 9),
    out=st.integers(1, 9),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_upconv_is_nearest_upsampling_and_a_3x3_convolution(
    channels: int, out: int, height: int, width: int, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = UpConv(channels, out).double()
    x = torch.randn(2, channels, height, width, dtype=torch.float64, requires_grad=True)
    plain = functional.conv2d(
        functional.interpolate(x, scale_factor=2, mode="nearest"), layer.weight, layer.bias, padding=1
    )
    folded = layer(x)
    # sums of 9 * channels products of order 1, in another order: some 81 roundings of 1e-16
    torch.testing.assert_close(folded, plain, rtol=0, atol=1e-13)
    direction = torch.randn_like(plain)
    wanted = torch.autograd.grad(plain, (x, layer.weight, layer.bias), direction)
    given_ = torch.autograd.grad(folded, (x, layer.weight, layer.bias), direction)
    for mine, theirs in zip(given_, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


def test_upconv_of_a_flat_image_shows_no_checkerboard() -> None:
    torch.manual_seed(0)
    layer = UpConv(4, 4).double().requires_grad_(False)
    inside = layer(torch.ones(1, 4, 6, 6, dtype=torch.float64))[..., 2:-2, 2:-2]
    assert float((inside - inside[..., :1, :1]).abs().max()) < 1e-14
    free = functional.conv_transpose2d(
        torch.ones(1, 4, 6, 6, dtype=torch.float64), torch.randn(4, 4, 4, 4, dtype=torch.float64), stride=2, padding=1
    )[..., 2:-2, 2:-2]
    assert float((free - free[..., :1, :1]).abs().max()) > 0.1  # the measure sees the grid of an unfolded kernel


@given(channels=st.integers(1, 200))
@settings(max_examples=50, deadline=None)
def test_group_norm_takes_any_number_of_channels_in_at_most_eight_groups(channels: int) -> None:
    layer = normalisation("group", channels)
    assert isinstance(layer, nn.GroupNorm)
    assert 1 <= layer.num_groups <= 8 and channels % layer.num_groups == 0
    if channels % 32 == 0:
        assert layer.num_groups == 8
    assert isinstance(normalisation("none", channels), nn.Identity)

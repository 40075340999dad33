"""Between bytes and floats: the only two conversions of pixels in the project."""

import torch
from torch import Tensor

LEVELS = 255


def to_float(image: Tensor) -> Tensor:
    """uint8 (B, H, W, C) -> float32 (B, C, H, W) in [-1, 1]: level v becomes v / 127.5 - 1. Memory stays NHWC
    (channels_last), so nothing is transposed."""
    assert image.dtype == torch.uint8 and image.dim() == 4
    return image.permute(0, 3, 1, 2).to(torch.float32).mul_(2 / LEVELS).sub_(1)


def to_uint8(image: Tensor) -> Tensor:
    """float (B, C, H, W) -> uint8 (B, H, W, C): scaled, rounded to the nearest level, clamped. The inverse of
    `to_float` for all 256 levels; values outside [-1, 1] become 0 or 255."""
    assert image.is_floating_point() and image.dim() == 4
    level = image.detach().to(torch.float32).add(1).mul_(LEVELS / 2).round_().clamp_(0, LEVELS)
    return level.to(torch.uint8).permute(0, 2, 3, 1).contiguous()

"""How far a reconstruction is from its image: peak signal-to-noise ratio."""

import torch
from torch import Tensor

from trainer.metrics.range import check_range

PEAK = 2.0  # of images in [-1, 1]
CAP = 100.0  # dB, for identical images; the smallest error of one level in one of 196,608 elements is 101 dB


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """10 log10(4 / MSE) of each image, (B,) float32 dB, at most 100: average it over images, never the errors.

    x, y: (B, C, H, W) float in [-1, 1]. What a decoder gives beyond (x) counts as clamped, as a viewer sees it; real
    images (y) beyond are refused, and uint8 is: convert it."""
    shapes = f"{tuple(x.shape)} and {tuple(y.shape)}"
    if x.shape != y.shape or x.dim() != 4:
        raise ValueError(f"psnr: images of {shapes} cannot be compared; give equal (B, C, H, W)")
    if not x.is_floating_point():
        raise ValueError(f"psnr: {x.dtype} is no image in [-1, 1]; convert it with trainer.data.to_float")
    check_range(y, name="psnr")
    error = (x.detach().double().clamp(-1.0, 1.0) - y.detach().double().clamp(-1.0, 1.0)).square().mean((1, 2, 3))
    return torch.log10(PEAK**2 / error.clamp(min=1e-300)).mul(10.0).clamp(max=CAP).float()

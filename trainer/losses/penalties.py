"""Gradient penalties: the norm of a discriminator's gradient over the whole image, one value a sample, without weights.

The caller applies gamma / 2 to `r1` and `r2`, lambda to `wasserstein`, and the factor of a lazy interval. Patch logits
count as their mean. Float32 (or float64) and eager: autocast is refused or switched off, double backward needs both.
"""

from collections.abc import Callable

import torch
from torch import Tensor

TINY = 1e-12  # under the root: finite gradient where the norm is 0; 2e-13 of a norm of 3


def r1(logits: Tensor, image: Tensor) -> Tensor:
    """|grad_x D(x)|^2 at real images (Mescheder et al. 2018, eq. 9), (B,).

    logits: (B,) or (B, h, w), computed from `image` (B, C, H, W), which requires a gradient; row i from image i."""
    return _squared_norm(logits, image)


def r2(logits: Tensor, image: Tensor) -> Tensor:
    """|grad_x D(x)|^2 at generated images (Mescheder et al. 2018, eq. 10), (B,); arguments as for `r1`."""
    return _squared_norm(logits, image)


def wasserstein(discriminator: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    """(|grad_x D(x)| - 1)^2 at x = mix * real + (1 - mix) * fake (Gulrajani et al. 2017, algorithm 1), (B,).

    mix: uniform in [0, 1), (B,): one number an image."""
    assert mix.shape == (len(real),), f"one interpolation weight an image, not {tuple(mix.shape)}"
    assert real.shape == fake.shape, f"{tuple(real.shape)} and {tuple(fake.shape)} cannot be mixed"
    with torch.autocast(device_type=real.device.type, enabled=False):
        weight = mix.to(real.dtype).view(-1, 1, 1, 1)
        image = torch.lerp(fake.detach(), real.detach(), weight).requires_grad_(True)
        squares = _squared_norm(discriminator(image), image)
    return ((squares + TINY).sqrt() - 1.0).square()


def _squared_norm(logits: Tensor, image: Tensor) -> Tensor:
    assert image.requires_grad, "the image must require a gradient before the discriminator sees it"
    assert not torch.is_autocast_enabled(image.device.type), "penalties are taken in float32"
    assert logits.dtype in (torch.float32, torch.float64), f"penalties are taken in float32, not {logits.dtype}"
    verdict = logits if logits.dim() == 1 else logits.flatten(1).mean(1)
    # rows are independent, so the gradient of the sum holds each row's own
    (gradient,) = torch.autograd.grad(verdict.sum(), image, create_graph=True)
    assert gradient.requires_grad, "the penalty trains nothing: the discriminator is frozen"
    return gradient.square().sum((1, 2, 3))

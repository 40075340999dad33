"""How sharp images are, and whether upsampling left a grid in them: streaming, over ranks, relative to real images.

Noise counts as sharp: read these beside a distance such as frechet's. Images (B, C, H, W) in [-1, 1], all of one size.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.metrics.range import check_range

HIGH = 0.25  # cycles a pixel: half of the highest frequency along a side


class Ratios(NamedTuple):
    """Of a model's images over real ones: 1 is alike, below 1 is smoother."""

    gradient: float
    """Energy of differences between neighbours."""
    high: float
    """Power at radial frequencies of 0.25 cycle a pixel and more."""
    check: float
    """Response to a checkerboard of single pixels."""
    phase: float
    """Energy of differences across the borders of 2 x 2 blocks over that inside them; 1 without an upsampling grid."""


class Texture:
    """Sums over images."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None  # images, then _terms
        self.size: tuple[int, int] | None = None

    def add(self, images: Tensor) -> None:
        """images (B, C, H, W) float in [-1, 1]; B may be 0. ValueError for others."""
        assert images.dim() == 4
        check_range(images, name="spectrum")
        size = (images.shape[2], images.shape[3])
        assert self.size in (None, size), f"images of {size} among images of {self.size}"
        self.size = size
        # an empty batch has its shape of sums too, but no transform
        found = self._terms(images.detach().float() if len(images) else images.new_zeros(1, *images.shape[1:]))
        found = found if len(images) else torch.zeros_like(found)
        self.sums = found if self.sums is None else self.sums + found

    def _terms(self, x: Tensor) -> Tensor:
        """(1 + 5,) float64, summed over images, each term averaged over channels and places."""
        dx, dy = x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]
        parts = [
            dx,
            dy,
            dx[..., 1:, :] - dx[..., :-1, :],
            dx[..., 1::2],
            dy[..., 1::2, :],
            dx[..., ::2],
            dy[..., ::2, :],
        ]
        energy = torch.stack([part.square().double().mean((1, 2, 3)) for part in parts])  # (7, B)
        spectrum = torch.fft.fft2(x).abs().square().double().mean(1).sum(0)  # (H, W)
        high = spectrum[self._frequencies(x) >= HIGH].sum()
        gx, gy, check, across_x, across_y, inside_x, inside_y = energy.sum(1)
        count = torch.full((), len(x), dtype=torch.float64, device=x.device)
        return torch.stack([count, gx + gy, high, check, across_x + across_y, inside_x + inside_y])

    def _frequencies(self, x: Tensor) -> Tensor:
        """(H, W) radial frequency, cycles a pixel."""
        fy, fx = (torch.fft.fftfreq(size, device=x.device) for size in x.shape[2:])
        radius: Tensor = (fy[:, None].square() + fx[None].square()).sqrt()
        return radius

    def merged(self, reduce: Callable[[Tensor], Tensor]) -> "Texture":
        """The same over all ranks; `reduce` sums a tensor over them. A collective: every rank has added something."""
        assert self.sums is not None, "nothing was added on this rank; add its empty batch"
        merged = Texture()
        merged.sums, merged.size = reduce(self.sums.clone()), self.size
        return merged

    def ratios(self, real: "Texture") -> Ratios:
        """These images over real ones of the same size."""
        if self.size != real.size:
            raise ValueError(f"spectrum: images of {self.size} against real ones of {real.size}; take both at one size")
        mine, other = self._summary(), real._summary()
        # black images have no texture to compare with: 0 / 0 is alike
        safe = torch.where((mine == 0.0) & (other == 0.0), torch.ones_like(mine), mine / other)
        return Ratios(*safe.tolist())

    def _summary(self) -> Tensor:
        sums = self._some()
        means = sums[1:] / sums[0]
        phase = means[3] / means[4] if means[4] > 0.0 else torch.ones_like(means[3])
        return torch.stack([means[0], means[1], means[2], phase])

    def _some(self) -> Tensor:
        if self.sums is None or self.sums[0] == 0.0:
            raise ValueError("spectrum: no images were added")
        return self.sums

"""Terms of a phase's loss, and the weight of the terms that are balanced against the rest.

Esser et al. 2021, eq. 7, weighs the adversarial loss by a ratio of gradient norms so that its pull on the decoder is
a fixed share of the reconstruction's. Here the ratio of an update comes from the gradients of the updates before it,
summed over micro-batches and ranks: one value for all of them, and nobody waits for it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight


class Term(NamedTuple):
    """One loss of a phase: what is logged is `value`, what is applied is scale * weight * value (* the group's
    ratio)."""

    value: Tensor
    """Float32, one value a sample: (B,)."""
    weight: float = 1.0
    group: str | None = None
    """Balanced terms carry the name of their group: one group, one norm, one ratio."""
    scale: float = 1.0
    """Factor of a whole group, after its ratio: the norm is measured without it, so a group whose scale is still 0 is
    measured and not felt."""


@dataclass(frozen=True)
class BalanceConfig:
    """How balanced losses are brought to the scale of the reconstruction loss."""

    kind: Literal["none", "last_layer", "output"] = "output"
    """none: weights as they stand. last_layer: ratio of gradient norms at the decoder's last convolution (Esser et
    al. 2021, eq. 7). output: ratio at the reconstruction itself, smoothed (Defossez et al. 2022, section 3.4)."""
    smoothing: float = 0.98
    """Share of the old norm that each update keeps; 0 takes the last update's as it is."""
    ceiling: float = 1e4
    """Largest ratio."""

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing: {self.smoothing} is a share of the old norm, 0 <= smoothing < 1")


class Balance:
    """The norms behind the ratios: measured in every update, used from the next on, equal on all ranks."""

    OFFSET = 1e-4  # in the classic ratio's denominator, taming-transformers and latent-diffusion alike
    REFERENCE = "reference"

    def __init__(self, config: BalanceConfig) -> None:
        self.config = config
        self.norms: dict[str, Tensor] = {}
        self._now: dict[str, Tensor] = {}

    @property
    def active(self) -> bool:
        return self.config.kind != "none"

    def ratio(self, group: str, *, like: Tensor) -> Tensor:
        """Factor of a group's gradient, a float32 scalar on the device of `like`: 0 until both norms were measured
        once, and were finite."""
        if not self.active:
            return torch.ones((), device=like.device)
        if group not in self.norms or self.REFERENCE not in self.norms:
            return torch.zeros((), device=like.device)
        offset = self.OFFSET if self.config.kind == "last_layer" else 1e-12
        ratio = self.norms[self.REFERENCE] / (self.norms[group] + offset)
        return ratio.nan_to_num(nan=0.0, posinf=self.config.ceiling).clamp(0.0, self.config.ceiling)

    def observe(self, group: str, gradient: Tensor, features: Tensor | None) -> None:
        """gradient: of the group's loss at the reconstruction (B, P, H, W); features: input of the last convolution,
        which has 3x3 kernels and padding 1, (B, C, H, W), for last_layer."""
        gradient = gradient.float()
        if self.config.kind == "last_layer":
            assert features is not None
            shape = (gradient.shape[1], features.shape[1], 3, 3)
            found: Tensor = conv2d_weight(features.float(), shape, gradient, padding=1)  # type: ignore[no-untyped-call]
        else:
            found = gradient.square().sum()
        self._now[group] = self._now[group] + found if group in self._now else found

    def update(self, reduce: Callable[[Tensor], Tensor], *, world: int) -> None:
        """End of an update. `reduce` sums over ranks, each of which handed in the gradient of its own mean."""
        if not self._now:
            return
        groups = sorted(self._now)
        total = reduce(torch.stack([self._now[group] for group in groups]))
        self._now = {}
        for group, found in zip(groups, total.unbind(), strict=True):
            norm = found.norm() / world if self.config.kind == "last_layer" else found.sqrt() / world
            # a non-finite gradient skips its update; it must not stay in the average, nor count as the first measure
            old = self.norms.get(group, torch.full_like(norm, torch.nan))
            smooth = self.config.smoothing * old + (1.0 - self.config.smoothing) * norm
            kept = torch.where(torch.isfinite(old), smooth, norm)
            self.norms[group] = torch.where(torch.isfinite(norm), kept, old)

    def export(self) -> dict[str, Tensor]:
        return {name: norm.detach().to("cpu", copy=True) for name, norm in self.norms.items()}

    def load(self, norms: Mapping[str, Tensor], device: torch.device) -> None:
        self.norms = {name: norm.to(device) for name, norm in norms.items()}

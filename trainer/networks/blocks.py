"""The pieces that all networks are made of: normalisation, folded upsampling, residual blocks, stages.

Initialisation is torch's own, U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for weights and biases, from torch's global generator,
which the caller seeds. With it a convolution shrinks the variance about threefold, so a residual branch starts small.
No operation works in place and no module keeps buffers: a gradient penalty may differentiate any network twice, and
ranks have nothing to synchronise but gradients.
"""

import contextlib
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from trainer.kernels.choose import differentiated_twice, is_differentiated_twice
from trainer.kernels.convolution import Conv2d
from trainer.kernels.group_norm_silu import group_norm_silu

Norm = Literal["group", "none"]


def normalisation(kind: Norm, channels: int) -> nn.Module:
    """GroupNorm in at most 8 groups, of at least 4 channels each where the channels divide so, or nothing."""
    if kind == "none":
        return nn.Identity()
    groups = max(g for g in range(1, min(8, max(1, channels // 4)) + 1) if channels % g == 0)
    return nn.GroupNorm(groups, channels)


class GroupNormSiLU(nn.GroupNorm):
    """SiLU of the normalisation in one operation; the parameters are the normalisation's."""

    def forward(self, x: Tensor) -> Tensor:
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps)


class Done(nn.Identity):
    """Stands where an activation would that the layer before has computed, so that weights keep their names."""


def activated(norm: Norm, channels: int, activation: nn.Module) -> list[nn.Module]:
    """Normalisation and activation, two layers: GroupNorm and SiLU are computed in one."""
    layer = normalisation(norm, channels)
    if isinstance(layer, nn.GroupNorm) and isinstance(activation, nn.SiLU):
        return [GroupNormSiLU(layer.num_groups, channels), Done()]
    return [layer, activation]


class UpConv(nn.Conv2d):
    """Nearest upsampling by 2, then a 3x3 convolution, computed as one transposed 4x4 convolution of stride 2.

    Every output pixel sees each input pixel through the sum of those weights of the 3x3 kernel that fall on its copies;
    the 4x4 kernel holds these sums. The same map as the two steps in half their time, and without the checkerboard of a
    free transposed convolution (Odena et al. 2016).
    (B, in, h, w) -> (B, out, 2h, 2w). The parameters are those of the 3x3 convolution.
    """

    def __init__(self, channels: int, out: int) -> None:
        super().__init__(channels, out, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        rows = functional.pad(self.weight, (0, 0, 0, 1)) + functional.pad(self.weight, (0, 0, 1, 0))
        kernel = functional.pad(rows, (0, 1, 0, 0)) + functional.pad(rows, (1, 0, 0, 0))
        return functional.conv_transpose2d(x, kernel.transpose(0, 1).flip(2, 3), self.bias, stride=2, padding=1)


class Residual(nn.Module):
    """x + convolutions(x), pre-activated (He et al. 2016b): norm, activation, 3x3, twice. Shape kept."""

    def __init__(self, channels: int, *, norm: Norm, activation: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(*activated(norm, channels, activation), Conv2d(channels, channels, 3, padding=1)),
            *(*activated(norm, channels, activation), Conv2d(channels, channels, 3, padding=1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)  # type: ignore[no-any-return]


def stage(entry: list[nn.Module], channels: int, *, blocks: int, norm: Norm, activation: nn.Module) -> list[nn.Module]:
    """What leads to a resolution (`entry`), its residual blocks, and the normalisation and activation that close it."""
    residuals = [Residual(channels, norm=norm, activation=activation) for _ in range(blocks)]
    return [*entry, *residuals, *activated(norm, channels, activation)]


class Body(nn.Sequential):
    """Stages in a row. With `recompute` only what leads from one residual block or stage to the next is kept for the
    backward pass, and the rest is computed again there (Chen et al. 2016): the same numbers for less memory and up to a
    third more time."""

    def __init__(self, layers: list[nn.Module], *, recompute: bool) -> None:
        super().__init__(*layers)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        if not (self.recompute and torch.is_grad_enabled()):
            return super().forward(x)  # type: ignore[no-any-return,no-untyped-call]
        part: list[nn.Module] = []
        for layer in self:
            part.append(layer)
            if isinstance(layer, (Residual, Done, nn.SiLU, nn.LeakyReLU)):
                x = recomputed(part, x)
                part = []
        assert not part, "every stage ends with a block or an activation"
        return x


def recomputed(layers: list[nn.Module], x: Tensor) -> Tensor:
    """The layers one after the other; x alone is kept for the backward pass, and the rest is computed again there."""
    # with the weights of this forward: where penalties put others in their place (functional_call under stage 3), the
    # network's own are back when backward comes
    compiling = torch.compiler.is_compiling()
    held: list[tuple[nn.Module, dict[str, Tensor]]] = [
        (layer, {} if compiling else dict(layer.named_parameters())) for layer in layers
    ]

    twice = is_differentiated_twice()  # the layers must keep the same for backward both times

    def run(x: Tensor) -> Tensor:
        with differentiated_twice() if twice else contextlib.nullcontext():
            for layer, weights in held:
                x = functional_call(layer, weights, x) if weights else layer(x)
        return x

    # nothing inside is random
    out: Tensor = checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)
    return out


def rows(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h*w*C). Channels last, so that it costs no copy in the memory format that training uses."""
    return x.permute(0, 2, 3, 1).flatten(1)


def full(x: Tensor) -> Tensor:
    """bfloat16 and float16 become float32 (losses and clamps need it), float32 and float64 stay."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x

"""Differentiable augmentation of real and generated images alike (Zhao et al. 2020, DiffAugment).

The caller gives the draws, one set an image, so real and fake of a position can be changed alike and a resumed run
draws the same. Images (B, C, H, W) in [-1, 1]; what is cut or moved in is 0, mid-grey, as in the paper's code. Policies
act in the order in which they are named.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

Policy = Literal["color", "translation", "cutout"]
Uniform = Callable[[str, tuple[int, ...]], Tensor]
"""(stream, shape) -> uniform in [0, 1), (B, *shape)."""

SHIFT = 1 / 8  # of the side, at most
CUT = 1 / 2  # of the side


def draws(uniform: Uniform, policies: Sequence[Policy]) -> dict[str, Tensor]:
    """The uniform draws that `policies` take, (B, n) each, of the streams `augment/<policy>`."""
    return {policy: uniform(f"augment/{policy}", (POLICIES[policy][1],)) for policy in policies}


def apply(images: Tensor, policies: Sequence[Policy], draws: Mapping[str, Tensor]) -> Tensor:
    """images (B, C, H, W), changed by each policy with the B rows of its draws."""
    for policy in policies:
        images = POLICIES[policy][0](images, draws[policy])
    return images


def color(x: Tensor, u: Tensor) -> Tensor:
    """Brightness + U(-.5, .5), saturation times U(0, 2), contrast times U(.5, 1.5); u (B, 3)."""
    brightness, saturation, contrast = u.to(x.dtype).view(-1, 3, 1, 1, 1).unbind(1)
    x = x + (brightness - 0.5)
    if x.shape[1] > 1:  # one channel is its own mean
        grey = x.mean(1, keepdim=True)
        x = grey + (x - grey) * (2.0 * saturation)
    level = x.mean((1, 2, 3), keepdim=True)
    return level + (x - level) * (contrast + 0.5)


def translation(x: Tensor, u: Tensor) -> Tensor:
    """Moved down and right by whole pixels, at most an eighth of the side either way; u (B, 2)."""
    for axis, draw in ((2, u[:, 0]), (3, u[:, 1])):
        size = x.shape[axis]
        reach = int(size * SHIFT + 0.5)
        shift = _whole(draw, 2 * reach + 1) - reach
        source = torch.arange(size, device=x.device) - shift.view(-1, 1)  # (B, size)
        view = (-1, 1, size, 1) if axis == 2 else (-1, 1, 1, size)
        inside = ((source >= 0) & (source < size)).view(view)
        index = source.clamp(0, size - 1).view(view).expand_as(x)
        x = x.gather(axis, index) * inside.to(x.dtype)
    return x


def cutout(x: Tensor, u: Tensor) -> Tensor:
    """A rectangle of half the sides is cut, its centre anywhere in the image; u (B, 2)."""
    masks = []
    for axis, draw in ((2, u[:, 0]), (3, u[:, 1])):
        size = x.shape[axis]
        cut = int(size * CUT + 0.5)
        start = _whole(draw, size + 1 - cut % 2) - cut // 2
        place = torch.arange(size, device=x.device) - start.view(-1, 1)
        masks.append((place >= 0) & (place < cut))
    hole = masks[0].view(len(x), 1, -1, 1) & masks[1].view(len(x), 1, 1, -1)
    return x * (~hole).to(x.dtype)


POLICIES: dict[Policy, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
    "color": (color, 3),
    "translation": (translation, 2),
    "cutout": (cutout, 2),
}


def _whole(uniform: Tensor, count: int) -> Tensor:
    """[0, 1) -> 0 .. count - 1, int64."""
    return (uniform * count).long().clamp(max=count - 1)

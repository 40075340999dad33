"""Walks between latents of a Gaussian prior."""

import torch
from torch import Tensor


def slerp(start: Tensor, end: Tensor, t: float) -> Tensor:
    """From `start` (t = 0) to `end` (t = 1) on the sphere (White 2016, "Sampling Generative Networks"), any one shape.

    One latent each, not a batch. The direction turns evenly and the norm goes evenly from one to the other: ends are
    exact, equal norms are kept. Where no arc is defined (a zero latent, equal or opposite directions) it is a line."""
    if t == 0.0:
        return start.clone()
    if t == 1.0:
        return end.clone()
    a, b = start.flatten().double(), end.flatten().double()
    norm_a, norm_b = a.norm(), b.norm()
    cosine = torch.dot(a, b) / (norm_a * norm_b).clamp(min=1e-300)
    angle = torch.acos(cosine.clamp(-1.0, 1.0))
    sine = angle.sin()
    if float(norm_a * norm_b) == 0.0 or float(sine) < 1e-6:
        return torch.lerp(start, end, t)
    direction = (torch.sin((1.0 - t) * angle) * a / norm_a + torch.sin(t * angle) * b / norm_b) / sine
    point: Tensor = direction * torch.lerp(norm_a, norm_b, t)
    return point.to(start.dtype).view_as(start)

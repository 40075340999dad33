"""The pictures of a run, from averaged weights: the same latents and images each time, so that they compare."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trainer.data import to_uint8
from trainer.kernels import noise
from trainer.methods import Method
from trainer.metrics.interpolate import slerp

SEED = 0


def latents(method: Method, count: int, *, seed: int = SEED, device: torch.device) -> Tensor:
    """Prior draws (count, *latent_size): row i depends on (seed, i) alone, for any batch size and world size."""
    return noise.normal(seed, "samples", torch.arange(count, device=device), method.latent_size)


@torch.no_grad()
def samples(method: Method, networks: Mapping[str, nn.Module], z: Tensor) -> Tensor:
    """Images uint8 (B, H, W, C) of latents."""
    images: Tensor = to_uint8(method.decode(networks, z))
    return images


@torch.no_grad()
def reconstructions(method: Method, networks: Mapping[str, nn.Module], image: Tensor) -> Tensor | None:
    """uint8 (B, H, W, C) of images (B, C, H, W) in [-1, 1], from the posterior mean; None where there is no encoder."""
    if not hasattr(method, "encode"):
        return None
    mean, _ = method.encode(networks, image)
    images: Tensor = to_uint8(method.decode(networks, mean))
    return images


@torch.no_grad()
def interpolation(
    method: Method,
    networks: Mapping[str, nn.Module],
    *,
    rows: int,
    columns: int,
    seed: int = SEED,
    device: torch.device,
) -> Tensor:
    """uint8 (rows * columns, H, W, C): each row walks on the sphere from one prior draw to another (slerp)."""
    ends = latents(method, 2 * rows, seed=seed, device=device)
    steps = torch.linspace(0.0, 1.0, columns, device=device)
    walks = torch.stack([slerp(ends[2 * row], ends[2 * row + 1], t) for row in range(rows) for t in steps.tolist()])
    return samples(method, networks, walks)

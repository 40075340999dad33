"""Configs that whole steps are measured on: the shipped ones, and the three methods at 28, 64 and 256 pixels."""

import json
from pathlib import Path
from typing import Any

import torch

from tools.bench.recipes import PERIOD
from trainer import config as configuration
from trainer.config import Config
from trainer.losses import vgg

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = tuple(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
METHODS, SIZES = ("vae", "gan", "vaegan"), (28, 64, 256)
SMALL = {  # of a network that no CPU takes a step of within seconds: the same parts
    "kl_f8_256": (
        "batch=4", "precision=fp32", "data.size=64", "method.autoencoder.width=32", "method.autoencoder.blocks=1",
        "method.discriminator.width=16",
    ),
}  # fmt: skip
FELT = ("method.discriminator_learns_from=0", "method.adversarial_from=0", "method.adversarial_ramp=0")
"""Of a VAE-GAN that is timed: every phase is at work."""


def shipped(name: str, *overrides: str, small: bool = False) -> Config:
    """configs/NAME.yaml on data that are not looked for, as it trains once everything has started."""
    path = CONFIGS / f"{name}.yaml"
    felt = FELT if "adversarial_from" in path.read_text() else ()
    return configuration.load(path, ["run=unused", *felt, *(SMALL.get(name, ()) if small else ()), *overrides])


def random_lpips(folder: Path) -> Path:
    """A file of VGG16 and LPIPS weights, random ones: they take as long."""
    from safetensors.torch import save_file

    generator, tensors = torch.Generator().manual_seed(0), {}
    channels = 3
    for number, stage in enumerate(vgg.STAGES):
        for layer, out in stage:
            weight = torch.randn((out, channels, 3, 3), generator=generator) / (4.5 * channels) ** 0.5
            tensors[f"features.{layer}.weight"], tensors[f"features.{layer}.bias"] = weight, torch.zeros(out)
            channels = out
        tensors[f"lin{number}.model.1.weight"] = torch.rand((1, channels, 1, 1), generator=generator)
    path = folder / "lpips.safetensors"
    save_file(tensors, path)
    return path


def of_size(method: str, size: int, *, lpips: Path | None, precision: str, quick: bool = False) -> Config:
    """One of METHODS at one of SIZES. 28: the demo's networks. 64: residual pyramids. 256: the f8 autoencoder of
    latent diffusion, its patch discriminator and LPIPS, and a generator as large as its decoder."""
    width, blocks, batch = {28: (16, 0, 64), 64: (64, 1, 64), 256: (128, 2, 8)}[size]
    multipliers = {28: [1, 2, 4], 64: [1, 2, 4, 4], 256: [1, 2, 4, 4]}[size]
    if quick:
        width, batch = 32, 2
    pyramid = {"kind": "conv", "width": width, "multipliers": multipliers, "blocks": blocks, "latent": 32}
    large = {"kind": "kl", "width": width, "multipliers": multipliers, "blocks": blocks, "latent": 4}
    autoencoder = large if size == 256 else pyramid
    critic = {"kind": "global", "width": 2 * width, "multipliers": multipliers, "blocks": min(blocks, 1)}
    game = {"loss": "relativistic", "r1": 0.2, "r2": 0.2, "penalty_interval": PERIOD * batch}
    likelihood = {"kind": "bernoulli" if size == 28 else "laplace"}
    tree: dict[str, Any] = {
        "run": "unused",
        "images": 10_000_000,
        "batch": batch,
        "precision": precision,
        "data": {"kind": "shards", "path": "unused", "size": size, "channels": 1 if size == 28 else 3},
        "optim": {"lr": 1e-4, "ema_half_life": 4_500},
    }
    if method == "vae":
        tree["method"] = {"kind": "vae", "autoencoder": autoencoder, "likelihood": likelihood}
    elif method == "gan":
        tree["method"] = {"kind": "gan", "generator": pyramid, "discriminator": critic, "critic": game}
        tree["optim"]["betas"] = [0.0, 0.99]
    else:
        patch = {"kind": "patch", "width": 16 if quick else 64, "layers": 3}
        tree["method"] = {
            "kind": "vaegan", "autoencoder": autoencoder, "likelihood": likelihood,
            "discriminator": patch if size == 256 else critic, "critic": {"loss": "hinge"} if size == 256 else game,
        }  # fmt: skip
        if size == 256 and lpips is not None:
            tree["method"] |= {"perceptual": {"kind": "lpips_vgg", "path": str(lpips)}, "perceptual_weight": 1e5}
    return configuration.parse(json.loads(json.dumps(tree)), source=f"benchmark {method} {size}")

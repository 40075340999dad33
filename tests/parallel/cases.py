"""Small runs of every method: what the tests of step, methods and ranks train."""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from trainer import build
from trainer import config as configuration
from trainer.config import Config
from trainer.data import Batch
from trainer.methods import Method
from trainer.parallel.engine import Engine
from trainer.parallel.ranks import Ranks
from trainer.phase import Run
from trainer.step import train_step

BATCH, SIZE, UPDATES = 16, 8, 20
PYRAMID: dict[str, Any] = {"kind": "conv", "width": 8, "multipliers": [1, 2], "latent": 4}
CRITIC: dict[str, Any] = {"kind": "global", "width": 8, "multipliers": [1, 2]}
R3GAN: dict[str, Any] = {"loss": "relativistic", "r1": 0.2, "r2": 0.2, "penalty_interval": 2 * BATCH}
METHODS: dict[str, dict[str, Any]] = {
    "vae": {"kind": "vae", "autoencoder": PYRAMID, "likelihood": {"kind": "gaussian", "learn_scale": True}},
    "vae_free_bits": {"kind": "vae", "autoencoder": PYRAMID, "kl": {"free_bits": 0.5, "warmup": 64}},
    "gan": {
        "kind": "gan",
        "generator": PYRAMID,
        "discriminator": CRITIC,
        "critic": R3GAN,
    },
    "gan_r1": {
        "kind": "gan",
        "generator": PYRAMID,
        "discriminator": CRITIC,
        "critic": {"loss": "non_saturating", "r1": 0.2},
    },
    "gan_wasserstein": {
        "kind": "gan",
        "generator": PYRAMID,
        "discriminator": CRITIC,
        "critic": {"loss": "wasserstein", "gradient_penalty": 10.0, "augment": ["translation", "cutout"]},
    },
    "vaegan_output": {
        "kind": "vaegan",
        "autoencoder": PYRAMID,
        "discriminator": CRITIC,
        "likelihood": {"kind": "bernoulli"},
        "critic": R3GAN,
        "balance": {"kind": "output", "smoothing": 0.9},
        "prior_weight": 3.0,
        "adversarial_from": BATCH,
        "adversarial_ramp": 2 * BATCH,
    },
    "vaegan_last_layer": {
        "kind": "vaegan",
        "autoencoder": {**PYRAMID, "latent_shape": "map"},
        "discriminator": {"kind": "patch", "width": 8, "layers": 1},
        "likelihood": {"kind": "laplace"},
        "critic": {"loss": "hinge"},
        "balance": {"kind": "last_layer", "smoothing": 0.0},
        "discriminator_learns_from": BATCH,
        "adversarial_from": 2 * BATCH,
    },
    "vaegan_larsen": {
        "kind": "vaegan_larsen",
        "encoder": PYRAMID,
        "decoder": PYRAMID,
        "discriminator": CRITIC,
        "critic": {"loss": "non_saturating", "r1": 0.2},
    },
}
OPTIM = {
    "sgd": {"algorithm": "sgd", "lr": 1e-4, "betas": [0.5, 0.99], "clip": 50.0},
    "adam": {"algorithm": "adam", "lr": 1e-3, "betas": [0.5, 0.99], "eps": 1e-4, "clip": 50.0},
    "clipped": {"algorithm": "sgd", "lr": 1e-2, "betas": [0.5, 0.99], "clip": 0.1},
}


def make_config(method: str | dict[str, Any], algorithm: str, accumulate: int, world: int, **changes: Any) -> Config:
    """method: a name of METHODS, or its tree. changes: of the config's top level; optim's keys are merged."""
    tree = {
        "run": "unused",
        "images": UPDATES * BATCH,
        "batch": BATCH,
        "micro_batch": BATCH // world // accumulate,
        "data": {"kind": "shards", "path": "unused", "size": SIZE, "channels": 1},
        "method": METHODS[method] if isinstance(method, str) else method,
        **changes,
        "optim": {**OPTIM[algorithm], "ema_half_life": 3 * BATCH, **changes.get("optim", {})},
    }
    return configuration.parse(copy.deepcopy(tree), source="test")


def global_batch(update: int) -> Batch:
    """The images of an update, the same for every world size."""
    position = torch.arange(update * BATCH, (update + 1) * BATCH)
    generator = torch.Generator().manual_seed(update)
    image = torch.rand(BATCH, 1, SIZE, SIZE, generator=generator) * 2 - 1
    return Batch(image, torch.zeros_like(position), position, position, torch.ones(BATCH))


def rank_share(batch: Batch, ranks: Ranks) -> Batch:
    share = slice(ranks.rank * BATCH // ranks.world, (ranks.rank + 1) * BATCH // ranks.world)
    return Batch(**{f.name: getattr(batch, f.name)[share] for f in dataclasses.fields(Batch)})


@dataclasses.dataclass
class Small:
    """A run that is built but not started; `update` takes updates of it."""

    config: Config
    method: Method
    engines: dict[str, Engine]
    run: Run
    ranks: Ranks

    def update(self, number: int, batch: Batch | None = None) -> None:
        """Update `number`, counted from 0, on its own images or on `batch` (global)."""
        share = rank_share(global_batch(number) if batch is None else batch, self.ranks)
        parts = build.split(share, self.config.micro_batches(self.ranks.world))
        train_step(self.method, self.engines, parts, self.run, images=number * BATCH, batch=BATCH, ranks=self.ranks)


def small(config: Config, ranks: Ranks, *, networks: Mapping[str, nn.Module] | None = None) -> Small:
    """networks: stand in for the method's own of the same names."""
    method = build.build_method(config, device=ranks.device)
    built = build.build_networks(method, seed=config.seed) | dict(networks or {})
    engines = build.build_engines(config, method, built, ranks)
    run = Run(engines, seed=config.seed, balance=method.balance, precision=config.precision)
    return Small(config, method, engines, run, ranks)

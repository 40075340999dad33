"""What is measured: networks and losses of the Fashion-MNIST demo, pinned so that figures of different days compare."""

import json
from pathlib import Path
from typing import Any

from trainer import config as configuration
from trainer.config import Config

PYRAMID = {"kind": "conv", "width": 16, "multipliers": [1, 2, 4], "latent": 16}
CRITIC = {"kind": "global", "width": 32, "multipliers": [1, 2, 4]}
GAME = {"loss": "relativistic", "r1": 0.2, "r2": 0.2}
OPTIM = {"lr": 2e-3, "betas": [0.5, 0.99], "warmup": 5_000, "ema_half_life": 4_500}

PERIOD = 8
"""Updates from one penalty to the next: what is timed is a multiple of it."""
CLOCK = 100_000
"""Images seen where timing starts: past every warm-up."""

RECIPES: dict[str, dict[str, Any]] = {
    "vae-tiny": {  # 5 ms an update on a core of 2025: what a framework costs shows here
        "batch": 32,
        "method": {"kind": "vae", "autoencoder": {**PYRAMID, "width": 4}},
        "optim": OPTIM,
    },
    "vae-small": {  # 12 ms
        "batch": 64,
        "method": {"kind": "vae", "autoencoder": {**PYRAMID, "width": 8}},
        "optim": OPTIM,
    },
    "vae": {"batch": 64, "method": {"kind": "vae", "autoencoder": PYRAMID}, "optim": OPTIM},
    "gan": {
        "batch": 64,
        "method": {
            "kind": "gan",
            "generator": {**PYRAMID, "latent": 32},
            "discriminator": CRITIC,
            "critic": {**GAME, "penalty_interval": PERIOD * 64},
        },
        "optim": {**OPTIM, "betas": [0.0, 0.99], "discriminator": {"lr": 1e-3}},
    },
    "vaegan": {
        "batch": 64,
        "method": {
            "kind": "vaegan",
            "autoencoder": PYRAMID,
            "discriminator": CRITIC,
            "likelihood": {"kind": "bernoulli"},
            "kl": {"weight": 1.0},
            "critic": {**GAME, "penalty_interval": PERIOD * 64},
            "balance": {"kind": "output", "smoothing": 0.98},
            "adversarial_weight": 0.5,
            "prior_weight": 3.0,
        },
        "optim": {**OPTIM, "discriminator": {"lr": 1e-3, "betas": [0.0, 0.99]}},
    },
}


def recipe(name: str, data: Path) -> Config:
    """The config of one of RECIPES on the shards in `data`."""
    tree = {
        "run": "unused",
        "images": 10_000_000,
        "data": {"kind": "shards", "path": str(data), "size": 28, "channels": 1},
        **RECIPES[name],
    }
    return configuration.parse(json.loads(json.dumps(tree)), source=f"benchmark {name}")

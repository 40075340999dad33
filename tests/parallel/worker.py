"""Updates of every method on whatever processes it was started on; the tests compare what different starts wrote.

    python -m tests.parallel.worker OUT      one process, or a rank of several (torchrun's environment variables)
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from trainer import build, config as configuration
from trainer.config import Config
from trainer.data import Batch
from trainer.parallel.config import DDPConfig
from trainer.parallel.ranks import Ranks, start
from trainer.phase import Run
from trainer.step import means, train_step

BATCH, SIZE, UPDATES = 16, 8, 6
PYRAMID: dict[str, Any] = {"kind": "conv", "width": 8, "multipliers": [1, 2], "latent": 4}
CRITIC: dict[str, Any] = {"kind": "global", "width": 8, "multipliers": [1, 2]}
PENALTIES = {"r1": 0.2, "r2": 0.2, "penalty_interval": 2 * BATCH}
METHODS: dict[str, dict[str, Any]] = {
    "vae": {"kind": "vae", "autoencoder": PYRAMID, "likelihood": {"kind": "gaussian", "learn_scale": True}},
    "vae_free_bits": {"kind": "vae", "autoencoder": PYRAMID, "kl": {"free_bits": 0.5, "warmup": 64}},
    "gan": {"kind": "gan", "generator": PYRAMID, "discriminator": CRITIC, "critic": {"loss": "relativistic", **PENALTIES}},
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
        "critic": {"loss": "relativistic", **PENALTIES},
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
}


def make_config(method: str, optim: str, accumulate: int, world: int) -> Config:
    tree = {
        "run": "unused",
        "images": UPDATES * BATCH,
        "batch": BATCH,
        "micro_batch": BATCH // world // accumulate,
        "data": {"kind": "shards", "path": "unused", "size": SIZE, "channels": 1},
        "method": METHODS[method],
        "optim": {**OPTIM[optim], "ema_half_life": 3 * BATCH},
    }
    return configuration.parse(json.loads(json.dumps(tree)), source="test")


def global_batch(update: int) -> Batch:
    """The images of an update, the same for every world size."""
    position = torch.arange(update * BATCH, (update + 1) * BATCH)
    generator = torch.Generator().manual_seed(update)
    image = torch.rand(BATCH, 1, SIZE, SIZE, generator=generator) * 2 - 1
    return Batch(image, torch.zeros_like(position), position, position, torch.ones(BATCH))


def rank_share(batch: Batch, ranks: Ranks) -> Batch:
    share = slice(ranks.rank * BATCH // ranks.world, (ranks.rank + 1) * BATCH // ranks.world)
    return Batch(**{f.name: getattr(batch, f.name)[share] for f in dataclasses.fields(Batch)})


def updates(config: Config, ranks: Ranks) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """The losses of each update and every weight and average at the end."""
    method = build.build_method(config, device=ranks.device)
    engines = build.build_engines(config, method, build.build_networks(method, seed=config.seed), ranks)
    run = Run(engines, seed=config.seed, balance=method.balance)
    losses = []
    for update in range(UPDATES):
        parts = build.split(rank_share(global_batch(update), ranks), config.micro_batches(ranks.world))
        train_step(method, engines, parts, run, images=update * BATCH, batch=BATCH, ranks=ranks)
        losses.append(means(run.kept, ranks))
        run.kept.clear()
    weights = {
        f"{name}/{part}/{key}": tensor
        for name, engine in engines.items()
        for part, tensors in engine.export().items()
        for key, tensor in tensors.items()
        if part != "optimizer"
    }
    return losses, weights


def main(out: Path) -> None:
    torch.set_num_threads(1)
    ranks = start(DDPConfig())
    for method in METHODS:
        for optim in OPTIM:
            for accumulate in (1, 2):
                losses, weights = updates(make_config(method, optim, accumulate, ranks.world), ranks)
                stem = out / f"{method}-{optim}-{accumulate}-{ranks.world}-{ranks.rank}"
                stem.with_suffix(".json").write_text(json.dumps({"world": ranks.world, "losses": losses}))
                save_file(weights, stem.with_suffix(".safetensors"))
    ranks.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

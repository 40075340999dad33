"""Small runs of every method, and what they left: curves as TensorBoard reads them, tensors of checkpoints."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from torch import Tensor

from trainer import checkpoint
from trainer.data import ShardsConfig

NETWORK = {"width": 4, "multipliers": [1, 2]}
CRITIC = {"r1": 0.2, "r2": 0.2, "penalty_interval": 32}
METHODS: dict[str, dict[str, Any]] = {
    "vae": {"kl": {"warmup": 200}},
    "gan": {"critic": {"loss": "relativistic", **CRITIC, "augment": ["color", "translation"]}},
    "vaegan": {"critic": {"loss": "relativistic", **CRITIC}, "adversarial_from": 48, "adversarial_ramp": 96},
    "vaegan_larsen": {"critic": {"loss": "non_saturating", "r1": 0.2}},
}
AUTOENCODER = {"autoencoder": {"kind": "conv", **NETWORK}}
DISCRIMINATOR = {"discriminator": {"kind": "global", **NETWORK}}
PARTS = {
    "vae": AUTOENCODER,
    "gan": {"generator": {"kind": "conv", **NETWORK}, **DISCRIMINATOR},
    "vaegan": AUTOENCODER | DISCRIMINATOR,
    "vaegan_larsen": {part: {"kind": "conv", "latent": 16, **NETWORK} for part in ("encoder", "decoder")}
    | DISCRIMINATOR,
}
BATCH, IMAGES = 16, 384
FREE = ("throughput/", "final/train_seconds", "_hparams_", "custom_scalars__", "config", "environment")
"""Tags that may differ between two runs of the same training."""


def write_config(path: Path, method: str, *, data: Path, **more: Any) -> Path:
    """A config of 24 updates, each on the board, with a checkpoint after every third. JSON is YAML."""
    tree: dict[str, Any] = {
        "run": str(path.with_suffix("")),
        "images": IMAGES,
        "batch": BATCH,
        "data": {"kind": "shards", "path": str(data), "size": 28, "channels": 1, "flip": True, "cache_mb": 0},
        "method": {"kind": method, **METHODS[method], **PARTS[method]},
        "optim": {"lr": 2e-3, "warmup": 64, "decay": "linear", "ema_half_life": 200, "clip": 1000.0},
        "log": {"every": BATCH, "pictures_every": 192, "evaluate_every": 96, "evaluate_images": 64},
        "checkpoint": {"every": 48, "keep_last": 20},
    }
    for key, value in more.items():
        tree[key] = tree[key] | value if isinstance(value, dict) else value
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree))
    return path


def shards(data: Path) -> ShardsConfig:
    return ShardsConfig(path=data, size=28, channels=1)


def curves(run: Path) -> dict[str, dict[int, Any]]:
    """{tag: {step: value}} of a run's board, as TensorBoard's loader gives them; fails where a tag has a step twice."""
    accumulator = EventAccumulator(str(run / "board"), tensor_size_guidance={"tensors": 0})
    accumulator.Reload()
    found: dict[str, dict[int, Any]] = {}
    for tag in accumulator.Tags()["tensors"]:
        if tag.startswith(FREE):
            continue
        events = accumulator.Tensors(tag)
        steps = [event.step for event in events]
        assert steps == sorted(set(steps)), f"{tag}: steps {steps}"
        values = (make_ndarray(event.tensor_proto) for event in events)
        found[tag] = {step: _plain(value) for step, value in zip(steps, values, strict=True)}
    return found


def losses(run: Path) -> dict[str, dict[int, float]]:
    return {tag: values for tag, values in curves(run).items() if tag.startswith("loss/")}


def tensors(run: Path) -> dict[str, Tensor]:
    """Every tensor of a run's newest checkpoint: weights, averages, moments, balance."""
    path = checkpoint.newest(run)
    assert path is not None
    found = checkpoint.load(path)
    return {f"{name}/{key}": value for name, group in found.tensors.items() for key, value in group.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def saved(run: Path) -> list[int]:
    """Images of a run's checkpoints, rising."""
    folder = run / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def _plain(value: "np.ndarray[Any, Any]") -> Any:
    return value.item() if value.ndim == 0 else value.tolist()

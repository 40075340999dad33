"""What trained runs are worth on Fashion-MNIST: distances, texture, PSNR, ELBO, classes; a table, and quality.json.

    python -m tools.quality runs/vae_fashion runs/vaegan_fashion --data data/fashion-mnist

The feature network fd_fashion_cnn is trained once (about two minutes) and kept beside the shards. Weights are the
averaged ones and seeds are fixed: measuring again gives the same figures.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tools.quality_figures import Quality, table, write
from trainer import generate
from trainer.data import Batch, RawBatch, ShardsConfig, Stream, Transform, to_device, to_float
from trainer.errors import boundary
from trainer.losses.reconstruction import bits_per_dim
from trainer.metrics import fashion_cnn, psnr
from trainer.metrics.fashion_cnn import Facts, FashionCNN
from trainer.metrics.frechet import frechet
from trainer.metrics.moments import Moments
from trainer.metrics.spectrum import Texture

BATCH = 250  # images at once; changes no figure
FLOOR_SAMPLES = 10_000  # training images whose distance to the test images is the floor
SHAPE = (28, 28, 1)  # height, width, channels
AS_STORED = Transform(height=28, width=28, fit="exact", flip=False, seed=0)


class Split(Protocol):
    """What is asked of a split of the data: `trainer.data.Stream` has it."""

    fingerprint: str

    def evaluation(self, batch: int) -> Iterator[RawBatch]:
        """Each sample once."""


class Model(Protocol):
    """What is asked of a run: `trainer.generate.Trained` has it."""

    @property
    def device(self) -> torch.device:
        """Where its batches go."""

    def sample(self, count: int, *, seed: int = 0, batch: int = 250) -> Iterator[Tensor]:
        """uint8 (B, H, W, C)."""

    def reconstruct(self, batch: Batch) -> Tensor | None:
        """uint8 (B, H, W, C), from the posterior mean; None without an encoder."""

    def elbo(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """(nll, kl) in nats (B,); None without a likelihood."""


@dataclass
class Pictures:
    """Statistics of a set of images."""

    moments: Moments
    texture: Texture
    counts: Tensor
    """(10,) images by predicted class."""

    @classmethod
    def none(cls) -> "Pictures":
        return cls(Moments(), Texture(), torch.zeros(fashion_cnn.CLASSES, dtype=torch.int64))

    def add(self, network: FashionCNN, images: Tensor) -> Tensor:
        """images uint8 (B, 28, 28, 1) -> predicted classes (B,)."""
        features, classes = fashion_cnn.describe(network, images)
        self.moments.add(features)
        self.texture.add(to_float(images))
        self.counts += classes.bincount(minlength=fashion_cnn.CLASSES)
        return classes


def valid(split: Split) -> Iterator[RawBatch]:
    """The split without padding and bad samples."""
    for raw in split.evaluation(BATCH):
        keep = raw.weight > 0
        yield RawBatch(raw.data[keep], raw.label[keep], raw.position[keep], raw.index[keep], raw.weight[keep])


def classifier(folder: Path, *, train: Split, test: Split, seed: int = 0) -> tuple[FashionCNN, Facts]:
    """The feature network from `folder`, trained and stored there where it is missing or was trained on other data."""
    if (folder / f"{fashion_cnn.NAME}.json").exists():
        network, facts = fashion_cnn.load(folder)
        if facts.data == train.fingerprint:
            return network, facts
        print(f"{folder}: {fashion_cnn.NAME} was trained on other data", flush=True)
    print(f"training {fashion_cnn.NAME}, about two minutes, once", flush=True)
    started = time.process_time()
    parts = list(valid(train))
    images, labels = torch.cat([part.data for part in parts]), torch.cat([part.label for part in parts])
    network = fashion_cnn.train(images, labels, seed=seed)
    seconds = time.process_time() - started
    floor, real, right = Pictures.none(), Pictures.none(), 0
    for part in valid(test):
        right += int((real.add(network, part.data) == part.label).sum())
    for few in images[:FLOOR_SAMPLES].split(BATCH):
        floor.add(network, few)
    distance = frechet(floor.moments, real.moments)
    facts = Facts(
        sha256="",
        data=train.fingerprint,
        seed=seed,
        accuracy=right / distance.reference,
        floor=distance.value,
        floor_samples=distance.samples,
        reference=distance.reference,
        seconds=seconds,
    )
    return network, fashion_cnn.save(folder, network, facts)


def real_pictures(network: FashionCNN, test: Split) -> Pictures:
    """Statistics of the test images, which every run is held against."""
    found = Pictures.none()
    for raw in valid(test):
        found.add(network, raw.data)
    return found


@torch.no_grad()
def measure(
    model: Model,
    *,
    network: FashionCNN,
    facts: Facts,
    real: Pictures,
    test: Split,
    samples: int,
    seed: int,
    likelihood: Any,
) -> Quality:
    """likelihood: the model's config of p(x|z), or None."""
    drawn = Pictures.none()
    for images in model.sample(samples, seed=seed, batch=BATCH):
        drawn.add(network, images.cpu())
    rebuilt, sums, count = Pictures.none(), {"psnr": 0.0, "same_class": 0.0, "nll": 0.0, "kl": 0.0}, 0
    has_reconstructions = has_elbo = False
    for raw in valid(test):
        batch = to_device(raw, device=model.device, transform=AS_STORED)
        count += len(raw.data)
        found = model.reconstruct(batch)
        if found is not None:
            has_reconstructions, found = True, found.cpu()
            given = fashion_cnn.describe(network, raw.data)[1]
            sums["same_class"] += float((rebuilt.add(network, found) == given).sum())
            sums["psnr"] += float(psnr(to_float(found), to_float(raw.data)).double().sum())
        nats = model.elbo(batch)
        if nats is not None:
            has_elbo = True
            for name, value in zip(("nll", "kl"), nats, strict=True):
                sums[name] += float(value.double().sum())
    mean = {name: total / count for name, total in sums.items()}
    nelbo = mean["nll"] + mean["kl"]
    distance = frechet(drawn.moments, real.moments)
    return Quality(
        fd_samples=distance.value,
        fd_reconstructions=frechet(rebuilt.moments, real.moments).value if has_reconstructions else None,
        fd_floor=facts.floor,
        samples=distance.samples,
        reference=distance.reference,
        texture_samples=drawn.texture.ratios(real.texture),
        texture_reconstructions=rebuilt.texture.ratios(real.texture) if has_reconstructions else None,
        psnr=mean["psnr"] if has_reconstructions else None,
        same_class=mean["same_class"] if has_reconstructions else None,
        elbo=-nelbo if has_elbo else None,
        kl=mean["kl"] if has_elbo else None,
        bits_per_dim=bits_per_dim(nelbo, dims=prod(SHAPE), discrete=likelihood.discrete) if has_elbo else None,
        likelihood=likelihood.name if has_elbo else None,
        class_shares=(drawn.counts / distance.samples).tolist(),
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or of a checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="Fashion-MNIST shards, with train/ and test/")
    parser.add_argument("--samples", type=int, default=10_000, help="drawn from each run (default 10,000)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default 0)")
    chosen = parser.parse_args(argv)
    if chosen.samples < 2:
        raise ValueError(f"samples: {chosen.samples} have no covariance; the figures in this project take 10,000")
    models = {run: generate.load(run) for run in chosen.runs}  # a bad one is named before minutes are spent
    for run, model in models.items():
        if model.config.data.shape != SHAPE:
            raise ValueError(f"{run}: makes images of {model.config.data.shape}, {fashion_cnn.NAME} takes {SHAPE}")
    config = ShardsConfig(path=chosen.data, size=28, channels=1)
    train, test = (Stream(config, split=split, batch=BATCH, rank=0, world=1, seed=0) for split in ("train", "test"))
    network, facts = classifier(chosen.data, train=train, test=test)
    print(f"{fashion_cnn.NAME} {facts.sha256[:12]}: accuracy {facts.accuracy:.4f}, floor {facts.floor:.3f}", flush=True)
    real = real_pictures(network, test)
    rows: dict[str, Quality] = {}
    for run, model in models.items():
        found = measure(
            model,
            network=network,
            facts=facts,
            real=real,
            test=test,
            samples=chosen.samples,
            seed=chosen.seed,
            likelihood=getattr(model.method, "likelihood", None),
        )
        path = generate.home(model.path) / "quality.json"
        write(path, found, images=model.images, seed=chosen.seed, network=fashion_cnn.NAME, network_sha256=facts.sha256)
        print(f"wrote {path}", flush=True)
        rows[str(run)] = found
    train.close()
    test.close()
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(boundary(main, sys.argv[1:]))

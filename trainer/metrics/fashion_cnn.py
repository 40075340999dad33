"""The feature network of `fd_fashion_cnn`: a small classifier of Fashion-MNIST, trained here from a fixed seed.

Its Frechet distance is no FID: other features, another scale. It is compared only among models measured by one file of
weights, whose digest stands beside each value, with the floor: the distance of real training images to test images,
below which nothing is told apart.
"""

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional

from trainer import durable
from trainer.data import to_float

NAME = "fd_fashion_cnn"
DIMS = 64
CLASSES = 10


@dataclass(frozen=True)
class Facts:
    """What travels with the weights."""

    sha256: str
    """Of the weights' file; `save` fills it in."""
    data: str
    """Fingerprint of the shards that it was trained on."""
    seed: int
    accuracy: float
    """Share of test images classified rightly."""
    floor: float
    """Frechet distance of `floor_samples` training images to the test images."""
    floor_samples: int
    reference: int
    """Test images."""
    seconds: float
    """CPU-seconds of training."""


class FashionCNN(nn.Module):
    """Images (B, 1, 28, 28) in [-1, 1] -> 64 features, then the logits of 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_layer(1, 32, kernel=4, stride=2),
            *_layer(32, 64, kernel=3, stride=1),
            nn.MaxPool2d(2),
            *_layer(64, 128, kernel=3, stride=1),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(512, DIMS),
            nn.ReLU(),
        )
        self.head = nn.Linear(DIMS, CLASSES)

    def features(self, image: Tensor) -> Tensor:
        """(B, 64)."""
        found: Tensor = self.body(image * 0.5 + 0.5)  # black is 0, as the padding
        return found

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(image))
        return logits


def _layer(channels: int, out: int, *, kernel: int, stride: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, out, kernel, stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()


def train(images: Tensor, labels: Tensor, *, seed: int, epochs: int = 4, batch: int = 128) -> FashionCNN:
    """images uint8 (N, 28, 28, 1), labels int64 (N,) of 10 classes -> the network in eval mode; 100 to 140 CPU-seconds.

    AdamW with one cycle of its rate up to 4e-3. The global generator is left as it was."""
    if len(images) < batch:
        raise ValueError(f"{NAME}: {len(images)} training images do not fill one batch of {batch}; give a whole split")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = FashionCNN().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.AdamW(network.parameters(), 4e-3, weight_decay=1e-2)
        steps = len(images) // batch
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * steps)
        for _ in range(epochs):
            for chosen in torch.randperm(len(images))[: steps * batch].view(-1, batch):
                loss = functional.cross_entropy(network(to_float(images[chosen])), labels[chosen])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    return _frozen(network)


def _frozen(network: FashionCNN) -> FashionCNN:
    return network.requires_grad_(False).eval()


@torch.no_grad()
def describe(network: FashionCNN, images: Tensor) -> tuple[Tensor, Tensor]:
    """images uint8 (B, 28, 28, 1) -> features (B, 64) float32, class (B,) int64."""
    features = network.features(to_float(images))
    return features, network.head(features).argmax(1)


def save(folder: Path, network: FashionCNN, facts: Facts) -> Facts:
    """Writes the weights, then the facts with their digest, each aside first; returns the facts as written."""
    folder.mkdir(parents=True, exist_ok=True)
    weights, text = folder / f"{NAME}.safetensors", folder / f"{NAME}.json"
    aside = folder / f".{NAME}.{os.getpid()}"
    durable.write_tensors(aside, network.state_dict())
    facts = replace(facts, sha256=durable.sha256(aside))
    text.unlink(missing_ok=True)  # never the facts of other weights
    aside.rename(weights)
    durable.write_text(aside, json.dumps(asdict(facts), indent=1) + "\n")
    aside.rename(text)
    durable.flush(folder)
    return facts


def load(folder: Path) -> tuple[FashionCNN, Facts]:
    """What `save` wrote. ValueError names the file and what is wrong with it; FileNotFoundError: none was made."""
    weights, text = folder / f"{NAME}.safetensors", folder / f"{NAME}.json"
    again = f"delete {text} and measure again, which trains it anew"
    try:
        facts = Facts(**json.loads(text.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{text}: not readable; {again}") from error
    if durable.sha256(weights) != facts.sha256:
        raise ValueError(f"{weights}: its sha256 is not the one in {text.name}; {again}")
    network = FashionCNN()
    try:
        network.load_state_dict(safetensors.torch.load_file(weights))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{weights}: other tensors than those of {NAME}; {again}") from error
    return _frozen(network.to(memory_format=torch.channels_last)), facts  # type: ignore[call-overload]

"""A trained run as something that samples, reconstructs and measures: averaged weights, no optimiser."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from trainer import build, checkpoint, config_yaml, show
from trainer import config as configuration
from trainer.config import Config
from trainer.data import Batch
from trainer.evaluate import elbo
from trainer.methods import Method
from trainer.resume import match


@dataclass(frozen=True)
class Trained:
    """A checkpoint that is ready for use. Images out are uint8 (B, H, W, C)."""

    path: Path
    """The checkpoint."""
    images: int
    """Images seen."""
    config: Config
    method: Method
    networks: dict[str, nn.Module]
    """Averaged weights where an average was kept; eval mode, no gradients."""
    classes: tuple[str, ...]
    device: torch.device

    def sample(self, count: int, *, seed: int = 0, batch: int = 250) -> Iterator[Tensor]:
        """`count` samples from the prior; sample i depends on (seed, i) alone."""
        z = show.latents(self.method, count, seed=seed, device=self.device)
        for part in torch.split(z, batch):
            yield show.samples(self.method, self.networks, part)

    def reconstruct(self, batch: Batch) -> Tensor | None:
        """From the posterior mean; None for a method without an encoder."""
        return show.reconstructions(self.method, self.networks, batch.image)

    def interpolate(self, *, rows: int, columns: int, seed: int = 0) -> Tensor:
        """(rows * columns, H, W, C): walks on the sphere between prior draws (slerp)."""
        return show.interpolation(self.method, self.networks, rows=rows, columns=columns, seed=seed, device=self.device)

    def elbo(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """(nll, kl) in nats an image, (B,) each, at one posterior sample of fixed seed; None without a likelihood."""
        return elbo(self.method, self.networks, batch)


def load(run: Path, *, device: torch.device | None = None) -> Trained:
    """The newest whole checkpoint of a run's folder, or the checkpoint folder itself.

    ValueError, naming the folder, where there is none or it is damaged; nothing is changed on disk."""
    if not run.is_dir():
        raise ValueError(f"{run}: no such run or checkpoint folder")
    path = run if (run / "manifest.json").exists() else checkpoint.newest(run)
    if path is None:
        raise ValueError(f"{run}: holds no checkpoint yet")
    found = checkpoint.load(path)
    source = str(path / "config.yaml")
    config = configuration.parse(config_yaml.loads(found.config_text, source=source), source=source)
    # a checkpoint may come from anywhere: only a YAML that its user wrote may start programs
    config = replace(config, data=replace(config.data, allow_pipe=False))
    place = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    method = build.build_method(build.without_losses(config), device=place)
    networks = build.build_networks(method, seed=config.seed)
    for name, network in networks.items():
        tensors = found.tensors.get(f"{name}.ema", found.tensors.get(name, {}))
        match(network.state_dict(), tensors, what=f"{path}: {name}")
        network.load_state_dict(tensors)
        network.to(device=place, memory_format=torch.channels_last).requires_grad_(False).eval()  # type: ignore[call-overload]
    classes = found.state["classes"]
    assert isinstance(classes, list)
    return Trained(path, found.images, config, method, networks, tuple(map(str, classes)), place)


def home(path: Path) -> Path:
    """Where what is made of a checkpoint goes: its run's folder, or NAME.results beside one that lies alone."""
    if path.parent.name == checkpoint.FOLDER:
        return path.parent.parent
    path = path.resolve()
    return path.parent.parent if path.parent.name == checkpoint.FOLDER else path.with_name(f"{path.name}.results")

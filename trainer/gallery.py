"""What a run shows beside its curves: pictures on the board and as files, its config and environment, its last line."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from trainer import config as configuration
from trainer import show
from trainer.board import Board, NoBoard
from trainer.config import Config
from trainer.data import Stream, Transform, to_device, to_uint8
from trainer.losses.divergence import kl_per_dimension
from trainer.methods import Method
from trainer.parallel.ranks import Ranks
from trainer.pictures import grid, pairs, write_png

COLUMNS = 12
HPARAMS = ("images", "batch", "seed", "precision", "method.", "optim.")  # where runs that are compared differ
TAGS = {"interpolation": "interpolation, spherical"}  # a picture says how its latents were made
FINAL = ("psnr", "nll", "kl", "nelbo", "active_units", "train_seconds")  # of any method


@dataclass
class Gallery:
    """Rank 0 draws; for the other ranks every call returns at once. No call is a collective."""

    config: Config
    method: Method
    test: Stream
    board: Board | NoBoard
    ranks: Ranks

    def describe(self) -> None:
        """Config and environment as text, and the layout of the custom scalars."""
        self.board.layout()
        self.board.text("config", f"```yaml\n{configuration.to_text(self.config)}```")
        device = torch.cuda.get_device_name() if self.ranks.device.type == "cuda" else platform.processor() or "CPU"
        rows = {
            "processes": self.ranks.world,
            "device": device,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "host": platform.node(),
        }
        self.board.text("environment", "\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())]))

    def draw(self, images: int, networks: Mapping[str, nn.Module]) -> None:
        """Samples, reconstructions and interpolations, from fixed seeds and averaged weights."""
        if self.ranks.rank > 0:
            return
        device = self.ranks.device
        z = show.latents(self.method, 8 * COLUMNS, device=device)
        sheets = {"samples": grid(show.samples(self.method, networks, z), columns=COLUMNS)}
        transform = Transform.plain(self.config.data)
        given = to_device(self.test.first(4 * COLUMNS), device=device, transform=transform).image
        rebuilt = show.reconstructions(self.method, networks, given)
        if rebuilt is not None:
            sheets["reconstructions"] = pairs(to_uint8(given), rebuilt, columns=COLUMNS)
        if hasattr(self.method, "encode"):
            with torch.no_grad():
                nats = kl_per_dimension(*self.method.encode(networks, given)).mean(0)
            self.board.histogram(images, "latent/kl_per_dimension", nats)
        walk = show.interpolation(self.method, networks, rows=6, columns=COLUMNS, device=device)
        sheets["interpolation"] = grid(walk, columns=COLUMNS)
        for name, sheet in sheets.items():
            self.board.picture(images, TAGS.get(name, name), sheet)
            write_png(self.config.run / "pictures" / f"{name}.png", sheet, overwrite=True)

    def conclude(self, images: int, metrics: Mapping[str, float], *, seconds: float) -> None:
        """The run's line in the HPARAMS tab."""
        final = {f"final/{name}": value for name, value in metrics.items()} | {"final/train_seconds": seconds}
        flat = configuration.flatten(configuration.to_tree(self.config))
        shown = {key: value for key, value in flat.items() if key.startswith(HPARAMS)}
        shown["method"] = shown.pop("method.kind")  # TensorBoard shows five columns, the first by the alphabet
        self.board.hparams(shown, final, columns=[f"final/{name}" for name in FINAL])

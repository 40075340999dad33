"""From a config to the parts of a run: shape, method, networks and their engines."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from trainer import config as configuration
from trainer import optimizer
from trainer.config import Config
from trainer.data import Batch, Stream
from trainer.kernels import choose
from trainer.losses.perceptual import NoPerceptualConfig
from trainer.methods import Method
from trainer.methods.vaegan import VAEGANConfig
from trainer.networks import ImageShape
from trainer.parallel.engine import Engine
from trainer.parallel.engines import engine
from trainer.parallel.ranks import Ranks, start
from trainer.parallel.resolve import resolve as resolved


def image_shape(config: Config) -> ImageShape:
    size = config.data.size
    height, width = (size, size) if isinstance(size, int) else size
    return ImageShape(config.data.channels, height, width)


def check_world(config: Config, *, world: int) -> None:
    """ValueError for what cannot work on `world` ranks, before they meet: batch, networks, data."""
    config.micro_batches(world)
    with torch.device("meta"):  # shapes without memory
        build_method(without_losses(config), device=torch.device("meta")).networks()
    for split in ("train", "test"):
        Stream(config.data, split=split, batch=config.batch, rank=0, world=world, seed=config.seed).close()


def without_losses(config: Config) -> Config:
    """Without the frozen network of a loss, whose weights a machine that only samples need not have."""
    if not isinstance(config.method, VAEGANConfig):
        return config
    return replace(config, method=replace(config.method, perceptual=NoPerceptualConfig()))


LOCAL = ("data.path", "data.readers", "data.prefetch", "data.cache_mb", "data.remote")
"""Keys that each machine may have its own way; all others must be alike on all ranks."""


def resolve(config: Config) -> tuple[Config, list[str]]:
    """The config with the backend that the launcher asks for, and lines for the log."""
    parallel, said = resolved(
        config.parallel, precision=config.precision, clip=config.optim.clip, compiled=config.compile
    )
    return replace(config, parallel=parallel), said


def meet(config: Config) -> Ranks:
    """All ranks, of one code and one config."""
    flat = configuration.flatten(configuration.to_tree(config))
    local = tuple(f"{key}." for key in LOCAL)
    alike = {key: value for key, value in flat.items() if key not in LOCAL and not key.startswith(local)}
    return start(config.parallel, alike=alike)


def build_stream(config: Config, *, split: str, ranks: Ranks) -> Stream:
    return Stream(config.data, split=split, batch=config.batch, rank=ranks.rank, world=ranks.world, seed=config.seed)


def check_splits(train: Stream, test: Stream) -> None:
    """ValueError where a class number means one thing in training and another in the evaluation."""
    if train.classes and test.classes and train.classes != test.classes:
        here, there = (f"{len(one.classes)}, such as {one.classes[0]}" for one in (train, test))
        raise ValueError(
            f"data.path: the classes of {train.index.store(0).name} ({here}) are not those of "
            f"{test.index.store(0).name} ({there}); index all splits again with `tandem data index`"
        )


def build_method(config: Config, *, device: torch.device) -> Method:
    """ValueError, naming the key, where networks, image size and batch do not fit together."""
    return config.method.build(image=image_shape(config), batch=config.batch, device=device)


def build_networks(method: Method, *, seed: int) -> dict[str, nn.Module]:
    """New networks, the same on every rank and machine for a seed; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return method.networks()


def build_engines(config: Config, method: Method, networks: Mapping[str, nn.Module], ranks: Ranks) -> dict[str, Engine]:
    # torch's default lets convolutions on GPUs round float32 to 10 bits of mantissa, penalties too
    torch.backends.cudnn.allow_tf32 = config.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = config.precision == "tf32"
    choose.prefer(config.impl)
    return {
        name: engine(
            name,
            network,
            config=config.parallel,
            optim=optimizer.resolve(config.optim, network=name, total=config.images),
            ranks=ranks,
            average=name in method.averaged,
            compiled=config.compile,
        )
        for name, network in networks.items()
    }


def averages(engines: Mapping[str, Engine]) -> dict[str, nn.Module]:
    """What is sampled and evaluated: the average where one is kept, the bare network elsewhere. A collective."""
    return {name: engine.evaluated() for name, engine in engines.items()}


def full_kl_weight(config: Config, images: int) -> bool:
    """Whether the KL's warm-up is over at `images`; true where there is no KL."""
    kl = getattr(config.method, "kl", None)
    return kl is None or bool(kl.weight_at(images) == kl.weight)


def split(batch: Batch, parts: int) -> list[Batch]:
    """A rank's share as micro-batches, in order; views, no copies."""
    if parts == 1:
        return [batch]
    columns = (batch.image, batch.label, batch.position, batch.index, batch.weight)
    return [Batch(*row) for row in zip(*(column.chunk(parts) for column in columns), strict=True)]

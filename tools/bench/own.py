"""Tandem's own loop, from a tensor in memory and from its stream of shards."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
from torch import Tensor

from tools.bench.bare import Batches
from tools.bench.recipes import CLOCK
from trainer import build, progress
from trainer.config import Config
from trainer.data import RawBatch, Stream, Transform, to_device
from trainer.parallel.engine import Engine
from trainer.parallel.ranks import Ranks
from trainer.phase import Run
from trainer.step import means, train_step


def alone(device: torch.device) -> Ranks:
    """One process that no launcher has started and Accelerate knows nothing of, which a bare machine may lack."""
    found = Ranks.__new__(Ranks)
    found.rank, found.world, found.device, found._host, found._store = 0, 1, device, None, None
    found.accelerator = SimpleNamespace(distributed_type=None, prepare_model=lambda network: network)
    return found


def in_memory(pixels: Tensor, config: Config) -> Iterator[RawBatch]:
    """What the stream gives, from `pixels`, uint8 (N, H, W, C), as the bare loop reads them."""
    rest = torch.zeros(config.batch, dtype=torch.int64)
    weight = torch.ones(config.batch)
    for update, image in enumerate(Batches(pixels, config.batch), CLOCK // config.batch):
        position = torch.arange(update * config.batch, (update + 1) * config.batch)
        yield RawBatch(image, rest, position, rest, weight)


def from_shards(stream: Stream, config: Config) -> Iterator[RawBatch]:
    return stream.batches(CLOCK // config.batch * config.batch)


def steps_of(
    config: Config,
    ranks: Ranks,
    batches: Iterator[RawBatch],
    *,
    build_engines: Callable[..., dict[str, Engine]] = build.build_engines,
) -> Callable[[int], None]:
    """A function that takes `count` updates as trainer/loop.py does: to the device, step, means of notes when due."""
    method = build.build_method(config, device=ranks.device)
    engines = build_engines(config, method, build.build_networks(method, seed=config.seed), ranks)
    run = Run(engines, seed=config.seed, balance=method.balance, precision=config.precision)
    transform = Transform.training(config.data, seed=config.seed)
    clock = [CLOCK // config.batch * config.batch]

    def steps(count: int) -> None:
        for _ in range(count):
            raw = next(batches)
            given = to_device(raw, device=ranks.device, transform=transform)
            parts = build.split(given, config.micro_batches(ranks.world))
            train_step(method, engines, parts, run, images=clock[0], batch=config.batch, ranks=ranks)
            clock[0] += config.batch
            if progress.due(clock[0], every=config.log.every, batch=config.batch):
                means(run.kept, ranks)
                run.kept.clear()

    return steps

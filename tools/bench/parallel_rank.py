"""One rank of tools/bench/parallel.py: every backend's steps in turns. Rank 0 writes seconds an update.

torchrun --nproc-per-node 2 -m tools.bench.parallel_rank JOB OUT
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tools.bench import bare, own, turns
from tools.bench.recipes import CLOCK, PERIOD, RECIPES
from trainer import config as configuration
from trainer import optimizer
from trainer.config import Config
from trainer.data import RawBatch
from trainer.errors import leave
from trainer.methods import Method
from trainer.parallel.config import DeepSpeedConfig
from trainer.parallel.ddp import DDPEngine
from trainer.parallel.engine import Applied, Engine
from trainer.parallel.ranks import Ranks, start

BARE, PLAIN = "bare", "plain"
BACKENDS: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    "zero1": {"kind": "deepspeed", "stage": 1},
    "zero2": {"kind": "deepspeed", "stage": 2},
    "zero3": {"kind": "deepspeed", "stage": 3},
    "zero3-d1": {"kind": "deepspeed", "stage": 3, "discriminator": 1},
}
"""zero3-d1: stage 3, its discriminator at 1."""
IMAGES = 1024  # in memory


def config_of(backend: str, job: dict[str, Any], *, world: int) -> Config:
    recipe: dict[str, Any] = json.loads(json.dumps(RECIPES["vaegan"]))
    recipe["method"]["autoencoder"]["width"] = job["width"]
    recipe["method"]["discriminator"]["width"] = 2 * job["width"]
    recipe["method"]["critic"]["penalty_interval"] = PERIOD * job["batch"]
    tree = recipe | {
        "run": "unused",
        "images": 10_000_000,
        "batch": job["batch"],
        "micro_batch": job["batch"] // world // job["accumulate"],
        "data": {"kind": "shards", "path": "unused", "size": 28, "channels": 1},
        "parallel": BACKENDS[backend],
    }
    return configuration.parse(tree, source=f"benchmark {backend}")


def batches(pixels: Tensor, config: Config, ranks: Ranks) -> Iterator[RawBatch]:
    """This rank's shares of batches of `pixels`, uint8 (N, H, W, C)."""
    count = config.share(ranks.world)
    for update, image in enumerate(bare.Batches(pixels, count), CLOCK // config.batch):
        position = torch.arange(count) + update * config.batch + ranks.rank * count
        yield RawBatch(image, torch.zeros(count, dtype=torch.int64), position, position, torch.ones(count))


class Plain(DDPEngine):
    """Bare torch in an engine's place, for Tandem's own step: no wrapper, no norm, no look for what is not finite."""

    def run(self, call: Callable[[Any], Any], *, last: bool, eager: bool = False) -> Any:
        return call(self.network)

    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor], *, last: bool) -> None:
        torch.autograd.backward(outputs, gradients)

    @torch.no_grad()
    def step(self, images: int, *, batch: int) -> Applied:
        self.optimizer.param_groups[0]["lr"] = self.optim.rate(images)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            torch._foreach_lerp_(self._averages, self.live, 1.0 - self.optim.ema_decay(images, batch=batch))
        return Applied(applied=torch.ones(()), norm=torch.zeros(()))


def plain_engines(config: Config, method: Method, networks: Mapping[str, nn.Module], ranks: Ranks) -> dict[str, Engine]:
    return {
        name: Plain(
            network,
            optim=optimizer.resolve(config.optim, network=name, total=config.images),
            ranks=ranks,
            average=name in method.averaged,
            compiled=False,
        )
        for name, network in networks.items()
    }


def in_group(steps: Any, ranks: Ranks) -> turns.Turn:
    """The same figure on all ranks, so that they agree on the length of a turn: CPU-seconds of all of them, and on GPUs
    seconds of the slowest."""
    cuda = ranks.device.type == "cuda"

    def turn(count: int) -> float:
        since = time.perf_counter() if cuda else time.process_time()
        steps(count)
        if cuda:
            torch.cuda.synchronize()
        taken = (time.perf_counter() if cuda else time.process_time()) - since
        return ranks.largest(round(1e9 * taken)) / 1e9 if cuda else ranks.total(round(1e9 * taken)) / 1e9

    return turn


def main(argv: list[str]) -> int:
    job: dict[str, Any] = json.loads(argv[0])
    torch.set_num_threads(1)
    ranks = start(DeepSpeedConfig())
    pixels = torch.randint(0, 256, (IMAGES, 28, 28, 1), dtype=torch.uint8)
    configs = {name: config_of(name, job, world=ranks.world) for name in job["backends"]}
    found = {}
    if ranks.world == 1 and job["accumulate"] == 1 and ranks.device.type == "cpu":  # as the bare loop is written
        first = next(iter(configs.values()))
        found[BARE] = bare.steps_of(bare.loop_of(first), pixels)
        found[PLAIN] = own.steps_of(first, ranks, batches(pixels, first, ranks), build_engines=plain_engines)
    for name, config in configs.items():
        found[name] = own.steps_of(config, ranks, batches(pixels, config, ranks))
    seconds = turns.measure(
        {name: in_group(steps, ranks) for name, steps in found.items()},
        unit=PERIOD, seconds=job["seconds"], rounds=job["rounds"],
    )  # fmt: skip
    if ranks.rank == 0:
        Path(argv[1]).write_text(json.dumps({"world": ranks.world, "seconds": seconds}))
    ranks.close()
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))

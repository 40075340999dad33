"""The whole training step with each fused part on and off: images a second of the shipped configs.

    python -m tools.bench.step                                      # all shipped configs; minutes
    python -m tools.bench.step --configs vaegan_fashion --parts --rounds 9 --out step.json
    python -m tools.bench.step --methods vae,vaegan --sizes 64,256 --precision bf16

eager is plain torch throughout; auto is what a run takes, which is eager on a CPU; compiled and triton are that
implementation wherever there is one. With --parts: each of an auto's kernels alone, on a CPU each part compiled alone,
and what always is at work taken away. Variants take short turns in one process, and a ratio compares within its round.
On a CPU images per CPU-second of one thread; large networks are made small there. Data are noise in memory.
"""

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo import config as dynamo
from torch._dynamo.exc import FailOnRecompileLimitHit

from tools.bench import models, own, turns
from trainer import optimizer
from trainer.config import Config
from trainer.errors import boundary
from trainer.kernels import choose
from trainer.kernels.choose import Impl, preferred
from trainer.kernels.program import LACKING
from trainer.methods import Method
from trainer.parallel.ddp import DDPEngine
from trainer.parallel.engine import Applied, Engine
from trainer.parallel.ranks import Ranks

IMAGES = 256
"""In memory."""
Steps = Callable[[int], None]
Row = dict[str, Any]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda where there is a GPU)")
    parser.add_argument(
        "--configs", type=turns.names(models.SHIPPED), metavar="A,B", help=f"of {','.join(models.SHIPPED)}"
    )
    parser.add_argument(
        "--methods", type=turns.names(models.METHODS), metavar="A,B",
        help=f"in the place of configs: of {','.join(models.METHODS)}",
    )  # fmt: skip
    sizes = tuple(map(str, models.SIZES))
    parser.add_argument(
        "--sizes", type=turns.names(sizes), default=["28"], metavar="A,B", help=f"of methods: of {','.join(sizes)}"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of methods (default: fp32)")
    parser.add_argument("--parts", action="store_true", help="each part alone, and without each")
    parser.add_argument("--whole", action="store_true", help="also the networks through torch.compile, and impl auto")
    parser.add_argument(
        "--seconds", type=turns.positive, default=2.0, help="of the first variant in a round (default: 2)"
    )
    parser.add_argument("--rounds", type=turns.count, default=5, help="each gives one ratio a variant (default: 5)")
    parser.add_argument("--quick", action="store_true", help="two short rounds, nothing compiled: seconds")
    parser.add_argument("--out", type=turns.new_file, metavar="FILE", help="write the figures as JSON too")
    given = parser.parse_args(argv)
    if given.configs and given.methods:
        parser.error("--methods: takes the place of --configs; give one")
    given.device = turns.device_of(given.device)
    given.configs = given.configs or list(models.SHIPPED)
    if given.quick:
        given.seconds, given.rounds = 0.0, 2
    return given


# ---------------------------------------------------------------------------------------------- parts always on
class LoopedAverage(DDPEngine):
    """The average of the weights tensor by tensor, as most code bases take it, and not by one foreach."""

    @torch.no_grad()
    def step(self, images: int, *, batch: int) -> Applied:
        average, self.average = self.average, None
        applied = super().step(images, batch=batch)
        self.average = average
        if average is not None:
            share = 1.0 - self.optim.ema_decay(images, batch=batch)
            for mine, live in zip(self._averages, self.live, strict=True):
                mine.lerp_(live, share)
        return applied


class ForeachOptimizer(DDPEngine):
    """torch's default on GPUs, several passes over the weights, and not fused=True, which alone knows found_inf."""

    def __init__(self, network: nn.Module, **settings: Any) -> None:
        super().__init__(network, **settings)
        (group,) = self.optimizer.param_groups
        kept = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay") if key in group}
        unheard = property(lambda self: None, lambda self, value: None)
        kind = type("Foreach", (type(self.optimizer),), {"found_inf": unheard, "grad_scale": unheard})
        self.optimizer = kind(self.parameters, foreach=True, **kept)


OFF: dict[str, type[DDPEngine]] = {"average in a loop": LoopedAverage, "optimiser by foreach": ForeachOptimizer}


def engines_of(kind: type[DDPEngine]) -> Callable[..., dict[str, Engine]]:
    """In the place of build.build_engines."""

    def built(config: Config, method: Method, networks: Mapping[str, nn.Module], ranks: Ranks) -> dict[str, Engine]:
        return {
            name: kind(
                network,
                optim=optimizer.resolve(config.optim, network=name, total=config.images),
                ranks=ranks,
                average=name in method.averaged,
                compiled=config.compile,
            )
            for name, network in networks.items()
        }

    return built


# ---------------------------------------------------------------------------------------------- variants
class Taken:
    """Updates of one variant under what it prefers; all its state is its own."""

    def __init__(self, config: Config, ranks: Ranks, impl: Impl, *parts: str, engine: type[DDPEngine] | None = None):
        self.impl, self.parts = impl, parts
        height, width = (config.data.size,) * 2 if isinstance(config.data.size, int) else config.data.size
        pixels = torch.randint(0, 256, (max(IMAGES, config.batch), height, width, config.data.channels))
        given = own.in_memory(pixels.to(torch.uint8), config)
        how = {} if engine is None else {"build_engines": engines_of(engine)}
        self.steps = own.steps_of(config, ranks, given, **how)

    def __call__(self, count: int) -> None:
        with contextlib.ExitStack() as stack:
            if self.parts:
                stack.enter_context(preferred("eager"))
            stack.enter_context(preferred(self.impl, *self.parts))
            self.steps(count)


def operations(take: Taken) -> list[str]:
    """Those of trainer/kernels that an update of eager code asks for."""
    choose._said.clear()
    take(1)
    return sorted({name for name, _, _ in choose._said})


def variants(config: Config, ranks: Ranks, given: argparse.Namespace) -> dict[str, Steps]:
    """Name -> function that takes so many updates. `eager` comes first."""
    kernels = given.device == "cuda" and LACKING is None
    eager = Taken(config, ranks, "eager")
    found: dict[str, Steps] = {"eager": eager, "auto": Taken(config, ranks, "auto")}
    if not given.quick:
        found["compiled"] = Taken(config, ranks, "compiled")
    if given.whole:
        found["networks compiled, auto"] = Taken(_compiled(config), ranks, "auto")
        found["networks compiled, eager"] = Taken(_compiled(config), ranks, "eager")
    if given.parts:
        alone: Impl = "triton" if kernels else "compiled"
        names = operations(eager)
        if alone == "compiled":  # these never are
            names = [] if given.quick else [name for name in names if name not in ("noise", "group_norm_silu")]
        for name in names:
            found[f"{name} alone, {alone}"] = Taken(config, ranks, alone, name)
        for name, kind in OFF.items():
            found[name] = Taken(config, ranks, "auto", engine=kind)
    return found


def _compiled(config: Config) -> Config:
    return dataclasses.replace(config, compile=True)


def working(found: Mapping[str, Steps]) -> tuple[dict[str, Steps], dict[str, str]]:
    """Those that take a step, and why others do not: what cannot be compiled says so."""
    able, unable = {}, {}
    for name, steps in found.items():
        try:
            steps(1)
            able[name] = steps
        except ValueError as error:
            unable[name] = str(error)
        except FailOnRecompileLimitHit:
            unable[name] = f"more shapes of one operation than torch.compile takes, {dynamo.recompile_limit}"
    return able, unable


def turn_of(steps: Steps, device: str) -> turns.Turn:
    if device == "cpu":
        return turns.in_process(steps)

    def turn(count: int) -> float:
        torch.cuda.synchronize()
        since = time.perf_counter()
        steps(count)
        torch.cuda.synchronize()
        return time.perf_counter() - since

    return turn


def measure(name: str, config: Config, ranks: Ranks, given: argparse.Namespace) -> list[Row]:
    """A row a variant."""
    torch._dynamo.reset()  # another model's shapes do not count
    choose.compiled.cache_clear()
    found, unable = working(variants(config, ranks, given))
    critic = getattr(config.method, "critic", None)
    lazy = 1 if critic is None else max(1, critic.penalty_interval // config.batch)  # updates from penalty to penalty
    costs = turns.measure(
        {variant: turn_of(steps, given.device) for variant, steps in found.items()},
        unit=1 if given.quick else lazy, seconds=given.seconds, rounds=given.rounds,
    )  # fmt: skip
    size = f"{config.data.channels}x{config.data.size}x{config.data.size}, batch {config.batch}, {config.precision}"
    start = {"model": name, "size": size}
    rows: list[Row] = []
    for variant, seconds in costs.items():
        median = statistics.median(seconds)
        rows.append({
            **start, "variant": variant, "images_per_s": round(config.batch / median, 1),
            "ms_per_update": round(1e3 * median, 3), "ratio_to_eager": turns.ratios(costs["eager"], seconds),
        })  # fmt: skip
    rows += [{**start, "variant": variant, "absent": why} for variant, why in unable.items()]
    return rows


def describe(rows: list[Row]) -> None:
    title = f"{rows[0]['model']}: {rows[0]['size']}"
    print(f"\n{title:46} {'images/s':>9} {'ms/update':>10}   of eager (least to most)")
    for row in rows:
        if "absent" in row:
            print(f"  {row['variant']:44} {row['absent']}")
            continue
        ratio = row["ratio_to_eager"]
        line = f"  {row['variant']:44} {row['images_per_s']:9.0f} {row['ms_per_update']:10.3f}   "
        print(f"{line}{ratio['median']:.3f} ({ratio['least']:.3f} to {ratio['most']:.3f})", flush=True)


def configs(given: argparse.Namespace, folder: Path) -> dict[str, Config]:
    """By name."""
    small = given.device == "cpu"
    if not given.methods:
        return {name: models.shipped(name, small=small) for name in given.configs}
    lpips = models.random_lpips(folder) if "256" in given.sizes and not given.quick else None
    return {
        f"{method}-{size}": models.of_size(
            method, int(size), lpips=lpips, precision=given.precision, quick=given.quick
        )
        for method in given.methods
        for size in given.sizes
    }  # fmt: skip


def main(argv: list[str]) -> int:
    given = parse(argv)
    if given.device == "cpu":
        torch.set_num_threads(1)
    ranks = own.alone(torch.device(given.device))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="tandem-step-") as folder:
        for name, config in configs(given, Path(folder)).items():
            torch.manual_seed(0)
            some = measure(name, config, ranks, given)
            describe(some)
            rows += some
            if given.out is not None:  # after each model: who is stopped keeps what there is
                where = turns.where(["python -m tools.bench.step", *argv], ("torch", "triton"))
                given.out.write_text(json.dumps({**where, "device": given.device, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(boundary(main, sys.argv[1:]))

"""What R1 and R2 cost, beside a discriminator's step without them, on the shipped discriminators.

    python -m tools.bench.penalties                                 # both tables, minutes
    python -m tools.bench.penalties --cost --networks gan_fashion --rounds 200
    python -m tools.bench.penalties --bias --sigmas 0.001,0.01,0.1

Cost: the discriminator's phase as a run takes it (forward of real and fakes, loss, penalties, backward, update), one
thread, the variants in turns in one process, least CPU time of all rounds (on a GPU: of its own clock), as a ratio to
the step without penalties. `torch` is the exact penalty by torch's own second derivatives, through a graph of its own.
Bias: the finite difference beside the exact penalty, on a discriminator after some updates on smooth images against
smoother ones: the mean over draws of its error with its standard error, and the deviation of a single draw, both
as shares of the exact value.
"""

import argparse
import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional

from tools.bench import clock, models, own, turns
from trainer import optimizer
from trainer.data import Batch
from trainer.errors import boundary
from trainer.kernels import convolution
from trainer.kernels.choose import differentiated_twice
from trainer.losses import penalties
from trainer.losses.balance import Balance, BalanceConfig
from trainer.methods.critic import Critic, CriticConfig
from trainer.networks import ImageShape
from trainer.parallel.ddp import DDPEngine
from trainer.parallel.engine import Engine
from trainer.parallel.ranks import Ranks
from trainer.phase import Run

LAZY = 8
"""Updates from one lazy penalty to the next, as in the shipped configs."""
GAMMA = 0.2
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "torch": {"r1": GAMMA, "r2": GAMMA},
    "exact": {"r1": GAMMA, "r2": GAMMA},
    "exact, R1 only": {"r1": GAMMA},
    "finite difference": {"r1": GAMMA, "r2": GAMMA, "penalty": "finite_difference"},
    f"lazy, every {LAZY}th": {"r1": GAMMA, "r2": GAMMA, "penalty_interval": LAZY},  # times the batch
}


class Case(NamedTuple):
    """A shipped discriminator at work."""

    config: str
    overrides: tuple[str, ...]
    fakes: int
    """For each real image: reconstruction and prior sample are two."""


CASES = {
    "gan_fashion": Case("gan_fashion", (), 1),
    "vaegan_fashion": Case("vaegan_fashion", (), 2),
    "kl_f8 at 128 px": Case("kl_f8_256", ("batch=2", "data.size=128"), 1),
    "kl_f8 at 256 px": Case("kl_f8_256", ("batch=2", "data.size=256"), 1),
}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.penalties",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--networks", type=turns.names(tuple(CASES)), default=list(CASES), metavar="A,B", help=f"of {','.join(CASES)}"
    )
    parser.add_argument("--cost", action="store_true", help="only this table")
    parser.add_argument("--bias", action="store_true", help="only this table")
    parser.add_argument("--rounds", type=turns.count, default=40, help="steps of each variant (default: 40)")
    parser.add_argument("--updates", type=turns.count, default=200, help="before the bias is measured (default: 200)")
    parser.add_argument(
        "--draws", type=turns.count, default=64, help="of the finite difference, an image (default: 64)"
    )
    parser.add_argument(
        "--sigmas", type=lambda text: [turns.positive(one) for one in text.split(",")],
        default=[1e-3, 1e-2, 0.03, 0.1, 0.3], metavar="S,S",
        help="steps of the finite difference (default: 0.001,0.01,0.03,0.1,0.3)",
    )  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda where there is a GPU)")
    parser.add_argument("--out", type=turns.new_file, metavar="FILE", help="write the figures as JSON too")
    given = parser.parse_args(argv)
    if not (given.cost or given.bias):
        given.cost = given.bias = True
    given.device = turns.device_of(given.device)
    return given


class Phase:
    """A discriminator's phase of one shipped config under a critic of its own; every call takes an update."""

    def __init__(self, case: Case, ranks: Ranks, changes: Mapping[str, Any]) -> None:
        config = models.shipped(case.config, *case.overrides, "precision=fp32")
        method: Any = config.method
        size = (config.data.size,) * 2 if isinstance(config.data.size, int) else config.data.size
        shape = ImageShape(config.data.channels, *size)
        changes = {key: value * (config.batch if key == "penalty_interval" else 1) if key != "penalty" else value
                   for key, value in changes.items()}  # fmt: skip
        self.batch = config.batch
        self.critic = Critic(CriticConfig(loss=method.critic.loss, **changes), batch=self.batch)
        torch.manual_seed(0)
        self.network: nn.Module = method.discriminator.build(image=shape)
        self.engine = DDPEngine(
            self.network,
            optim=optimizer.resolve(config.optim, network="discriminator", total=config.images),
            ranks=ranks, average=False, compiled=False,
        )  # fmt: skip
        engines: dict[str, Engine] = {"discriminator": self.engine}
        self.run = Run(engines, seed=0, balance=Balance(BalanceConfig(kind="none")))
        position = torch.arange(self.batch, device=ranks.device)
        self.shape, self.count, self.device = shape, case.fakes, ranks.device
        self.generator = torch.Generator().manual_seed(0)
        self.see()
        none = torch.zeros_like(position)
        self.given = Batch(self.real, none, position, position, torch.ones(self.batch, device=ranks.device))
        self.images = config.images // 2  # past the warm-up
        self.images -= self.images % (LAZY * self.batch)

    def see(self) -> None:
        """New images: smooth ones, and fakes that are smoother."""
        self.real, *self.fakes = (self._smooth(cells) for cells in (7, *[5] * self.count))

    def _smooth(self, cells: int) -> Tensor:
        coarse = torch.randn(self.batch, self.shape.channels, cells, cells, generator=self.generator)
        smooth = functional.interpolate(coarse, (self.shape.height, self.shape.width), mode="bicubic").clamp(-1, 1)
        return smooth.to(self.device, memory_format=torch.channels_last)

    def __call__(self) -> None:
        count = self.batch
        self.run.begin("discriminator", self.given, images=self.images, last=True, share=True, count=count)
        terms = self.critic.discriminate(self.run, self.real, self.fakes)
        self.engine.backward(*self.run.gradients(terms), last=True)
        self.engine.step(self.images, batch=self.batch)
        self.run.end()
        self.run.kept.clear()
        self.images += self.batch


@contextlib.contextmanager
def by_torch() -> Iterator[None]:
    """Penalties as they are written with torch alone."""

    def with_norms(logits: Tensor, seen: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        verdict = logits if logits.dim() == 1 else logits.flatten(1).mean(1)
        (gradient,) = torch.autograd.grad(verdict.sum(), image, create_graph=True)
        return logits, gradient.square().sum((1, 2, 3))

    with (
        mock.patch.object(convolution, "_plain", lambda x: True),
        mock.patch.object(penalties, "with_norms", with_norms),
    ):
        yield


def cost(name: str, ranks: Ranks, *, rounds: int) -> dict[str, float]:
    """Variant -> least milliseconds of a step of discriminator `name`."""
    calls: dict[str, Callable[[], object]] = {}
    for variant, changes in VARIANTS.items():
        phase = Phase(CASES[name], ranks, changes)
        if variant == "torch":
            calls[variant] = _under(by_torch, phase)
        elif "penalty_interval" in changes:
            calls[variant] = _often(phase, LAZY)
        else:
            calls[variant] = phase
    if ranks.device.type == "cuda":
        found = {variant: one.least for variant, one in clock.times(calls, ranks.device, rounds=rounds).items()}
    else:
        found = least(calls, rounds=rounds)
    return {name: ms / (LAZY if "penalty_interval" in VARIANTS[name] else 1) for name, ms in found.items()}


def least(calls: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, float]:
    """Least milliseconds of this process, which whoever else uses the machine takes none of."""
    found = dict.fromkeys(calls, math.inf)
    for number in range(rounds + 1):  # the first allocates
        for name, call in calls.items():
            since = time.process_time()
            call()
            if number:
                found[name] = min(found[name], 1e3 * (time.process_time() - since))
    return found


def _under(context: Callable[[], contextlib.AbstractContextManager[None]], call: Callable[[], None]) -> Any:
    def run() -> None:
        with context():
            call()

    return run


def _often(call: Callable[[], None], count: int) -> Any:
    def run() -> None:
        for _ in range(count):
            call()

    return run


def bias(name: str, ranks: Ranks, *, sigmas: list[float], updates: int, draws: int) -> list[dict[str, float]]:
    """One row a step of the finite difference, at real images and fakes alike."""
    phase = Phase(CASES[name], ranks, VARIANTS["exact"])
    for _ in range(updates):
        phase()
        phase.see()
    images = torch.cat([phase.real, *phase.fakes]).requires_grad_()
    with differentiated_twice():
        exact = penalties.r1(phase.network(images), images).detach().double()
    rows = []
    with torch.no_grad():
        logits = phase.network(images)
        for sigma in sigmas:
            generator = torch.Generator(images.device).manual_seed(0)
            values = []
            for _ in range(draws):
                noise = torch.empty_like(images).normal_(generator=generator)
                values.append(penalties.finite_difference(logits, phase.network(images + sigma * noise), sigma))
            found = torch.stack(values).double()  # (draws, images)
            off = (found / exact - 1.0).mean(0)
            rows.append({
                "sigma": sigma,
                "bias": float(off.mean()),
                "error": float((found / exact).std() / math.sqrt(found.numel())),
                "spread": float((found.std(0) / exact).mean()),
            })  # fmt: skip
    return rows


def main(argv: list[str]) -> int:
    given = parse(argv)
    torch.set_num_threads(1)
    ranks = own.alone(torch.device(given.device))
    found: dict[str, Any] = {"where": turns.where(["python -m tools.bench.penalties", *argv], ["torch"])}
    if given.cost:
        found["cost"] = {}
        print(f"| discriminator | {' | '.join(VARIANTS)} |\n|{'---|' * (len(VARIANTS) + 1)}")
        for name in given.networks:
            costs = found["cost"][name] = cost(name, ranks, rounds=given.rounds)
            cells = [f"{costs['plain']:.1f} ms", *(f"{ms / costs['plain']:.2f}" for ms in list(costs.values())[1:])]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
    if given.bias:
        found["bias"] = {}
        print("\n| discriminator | sigma | bias | spread of a draw |\n|---|---|---|---|")
        for name in given.networks:
            rows = bias(name, ranks, sigmas=given.sigmas, updates=given.updates, draws=given.draws)
            found["bias"][name] = rows
            for row in rows:
                figures = f"{row['bias']:+.3f} ± {row['error']:.3f} | {row['spread']:.2f}"
                print(f"| {name} | {row['sigma']:g} | {figures} |", flush=True)
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")
    ranks.close()
    return 0


if __name__ == "__main__":
    sys.exit(boundary(main, sys.argv[1:]))

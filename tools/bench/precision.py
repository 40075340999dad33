"""Whether training in half precision takes the course of float32: loss curves of one config, several seeds each.

    python -m tools.bench.precision
    python -m tools.bench.precision --variants bf16,bf16-weights --seeds 0,1,2 --images 30000 --out curves.json

Each run is a process of its own with one thread. What a precision moves is held against what a seed moves: seeds differ
in weights, order and noise, and a variant shares all three with the float32 run of its seed.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from tools.bench import turns
from trainer.errors import boundary

BASE = "fp32"
VARIANTS = {
    BASE: ["precision=fp32", "parallel.kind=ddp"],
    "bf16": ["precision=bf16", "parallel.kind=ddp"],
    "bf16-weights": ["precision=bf16", "parallel.kind=deepspeed", "parallel.stage=2", "parallel.weights=bf16"],
    "fp16-weights": ["precision=fp16", "parallel.kind=deepspeed", "parallel.stage=2", "parallel.weights=fp16"],
}
LOGS = 10  # points of a curve, each the mean over a tenth of the images
Curves = Mapping[int, Mapping[str, Sequence[float]]]
"""Seed -> name of a figure -> its points."""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.precision",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    others = tuple(name for name in VARIANTS if name != BASE)
    parser.add_argument(
        "--variants", type=turns.names(others), default=["bf16"], metavar="A,B",
        help=f"of {','.join(others)}, against {BASE} (default: bf16)",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=_numbers, default=[0, 1, 2], metavar="N,N", help="at least two (default: 0,1,2)"
    )
    parser.add_argument("--images", type=int, default=30_000, help="of a run (default: 30000)")
    parser.add_argument("--at-once", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--config", type=Path, default=Path("configs/vaegan_fashion.yaml"), help="what is trained")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="more overrides, one each")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write curves and figures as JSON too")
    given = parser.parse_args(argv)
    if len(given.seeds) < 2:
        parser.error("--seeds: one seed has no spread")
    return given


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def curve(folder: Path, given: argparse.Namespace, variant: str, seed: int) -> dict[str, list[float]]:
    """One run: every loss by log, and the figures on the test split at its end."""
    run = folder / f"{variant}-{seed}"
    words = [
        f"run={run}", f"images={given.images}", f"seed={seed}", f"log.every={max(1, given.images // LOGS)}",
        "log.evaluate_every=0", "log.pictures_every=0", "checkpoint.every=0", *VARIANTS[variant], *given.set,
    ]  # fmt: skip
    done = subprocess.run(
        ["env", "OMP_NUM_THREADS=1", sys.executable, "-m", "trainer", str(given.config), *words],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise OSError(f"{variant}, seed {seed}: the run failed: {done.stderr.strip()}")
    board = EventAccumulator(str(run / "board"), tensor_size_guidance={"tensors": 0})
    board.Reload()
    tags = [tag for tag in board.Tags()["tensors"] if tag.startswith(("loss/", "test/"))]
    return {tag: [float(make_ndarray(event.tensor_proto)) for event in board.Tensors(tag)] for tag in tags}


def compare(base: Curves, own: Curves) -> Iterator[dict[str, Any]]:
    """A row a figure, over the second half of its curve, where training has settled.

    spread: largest difference between two seeds of `base`. moved: difference of the means over seeds. All are shares
    of the mean size of the figure."""
    for name in next(iter(base.values())):
        halves = [
            {seed: statistics.fmean(found[name][len(found[name]) // 2 :]) for seed, found in curves.items()}
            for curves in (base, own)
        ]
        size = statistics.fmean(map(abs, halves[0].values())) or 1.0
        means = [statistics.fmean(half.values()) for half in halves]
        yield {
            "figure": name,
            "base": means[0],
            "own": means[1],
            "spread": (max(halves[0].values()) - min(halves[0].values())) / size,
            "moved": abs(means[1] - means[0]) / size,
            "pairs": [abs(halves[1][seed] - value) / size for seed, value in halves[0].items()],
        }


def main(argv: list[str]) -> int:
    given = parse(argv)
    wanted = list(itertools.product(given.seeds, [BASE, *given.variants]))
    with tempfile.TemporaryDirectory(prefix="tandem-precision-") as folder, ThreadPoolExecutor(given.at_once) as pool:
        found = list(pool.map(lambda one: curve(Path(folder), given, one[1], one[0]), wanted))
    curves: dict[str, dict[int, dict[str, list[float]]]] = {name: {} for name in (BASE, *given.variants)}
    for (seed, variant), points in zip(wanted, found, strict=True):
        curves[variant][seed] = points
    rows = {name: list(compare(curves[BASE], curves[name])) for name in given.variants}
    for name, some in rows.items():
        print(f"\n{name:34} {BASE:>10} {name:>12}   moved    of a seed   largest pair")
        for row in some:
            line = f"  {row['figure']:32} {row['base']:10.4g} {row['own']:12.4g} {row['moved']:7.2%}"
            print(f"{line} {row['spread']:11.2%} {max(row['pairs']):14.2%}", flush=True)
    if given.out is not None:
        where = turns.where(["python -m tools.bench.precision", *argv], ("torch", "accelerate", "deepspeed"))
        given.out.write_text(json.dumps({**where, "rows": rows, "curves": curves}, indent=1) + "\n")
        print(f"\nwritten: {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(boundary(main, sys.argv[1:]))

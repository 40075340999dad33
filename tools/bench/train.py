"""How fast Tandem trains, as a ratio to a bare PyTorch loop over the same networks, losses and images.

    python -m tools.bench.train
    python -m tools.bench.train --models vae-tiny,vaegan --seconds 2 --rounds 9 --out bench.json
    python -m tools.bench.train --models vae-tiny --peers accelerate,lightning,pythae

Images per CPU-second of one thread. All variants of a model take short turns in one process, forth and back, and
a ratio compares within its round: whoever else uses the machine slows all of them alike.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.bench import bare, own, turns
from tools.bench.recipes import PERIOD, RECIPES, recipe
from trainer.config import Config
from trainer.data import Stream
from trainer.errors import boundary
from trainer.parallel.config import DDPConfig
from trainer.parallel.ranks import Ranks, start

PEERS = ("accelerate", "lightning", "pythae")
Steps = Callable[[int], None]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models",
        type=turns.names(tuple(RECIPES)),
        default=list(RECIPES),
        metavar="A,B",
        help=f"of {','.join(RECIPES)}",
    )
    parser.add_argument(
        "--peers",
        type=turns.names(PEERS),
        default=[],
        metavar="A,B",
        help=f"of {','.join(PEERS)}: those that are installed",
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="CPU-seconds of a variant in a round (default: 2)")
    parser.add_argument("--rounds", type=int, default=7, help="each gives one ratio a variant (default: 7)")
    parser.add_argument("--data", type=Path, default=Path("data/fashion-mnist"), help="shards of 28 x 28 grey images")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON too")
    return parser.parse_args(argv)


def variants(config: Config, pixels: Tensor, stream: Stream, ranks: Ranks, peers: list[str]) -> dict[str, Steps]:
    """Name -> function that takes so many updates. `bare` comes first."""
    plain = torch.contiguous_format
    found: dict[str, Steps] = {
        "bare": bare.steps_of(bare.loop_of(config), pixels),
        "bare, contiguous": bare.steps_of(bare.loop_of(config, layout=plain), pixels, layout=plain),
        "tandem, in memory": own.steps_of(config, ranks, own.in_memory(pixels, config)),
        "tandem, shards": own.steps_of(config, ranks, own.from_shards(stream, config)),
    }
    if config.method.kind == "vaegan":
        found["conventional"] = bare.steps_of(bare.ConventionalLoop(config, layout=torch.channels_last), pixels)
    if peers:
        from tools.bench import peers as frameworks

        found |= {name: steps for name in peers if (steps := frameworks.steps_of(name, config, pixels)) is not None}
    return found


def table(model: str, batch: int, costs: Mapping[str, list[float]]) -> list[dict[str, Any]]:
    """A row a variant: medians and extremes over rounds."""
    rows = []
    for name, seconds in costs.items():
        row = {
            "model": model,
            "variant": name,
            "images_per_cpu_s": round(batch / statistics.median(seconds), 1),
            "ms_per_update": round(1e3 * statistics.median(seconds), 3),
            "ratio_to_bare": turns.ratios(costs["bare"], seconds),
        }
        if "conventional" in costs and name != "conventional":
            row["ratio_to_conventional"] = turns.ratios(costs["conventional"], seconds)
        rows.append(row)
    return rows


def describe(rows: list[dict[str, Any]]) -> None:
    print(f"\n{rows[0]['model']:22} {'images/CPU-s':>13} {'ms/update':>10}   ratio to bare (least to most)")
    for row in rows:
        ratio = row["ratio_to_bare"]
        line = f"  {row['variant']:20} {row['images_per_cpu_s']:13.0f} {row['ms_per_update']:10.3f}   "
        line += f"{ratio['median']:.3f} ({ratio['least']:.3f} to {ratio['most']:.3f})"
        if "ratio_to_conventional" in row:
            line += f"; to conventional {row['ratio_to_conventional']['median']:.3f}"
        print(line, flush=True)


def main(argv: list[str]) -> int:
    given = parse(argv)
    torch.set_num_threads(1)
    ranks = start(DDPConfig())
    rows: list[dict[str, Any]] = []
    pixels: Tensor | None = None
    for model in given.models:
        config = recipe(model, given.data)
        stream = Stream(config.data, split="train", batch=config.batch, rank=0, world=1, seed=config.seed)
        if pixels is None:
            raw = list(stream.evaluation(config.batch))
            pixels = torch.cat([part.data[part.weight > 0] for part in raw])
        torch.manual_seed(config.seed)
        found = variants(config, pixels, stream, ranks, given.peers)
        costs = turns.measure(
            {name: turns.in_process(steps) for name, steps in found.items()},
            unit=PERIOD, seconds=given.seconds, rounds=given.rounds,
        )  # fmt: skip
        rows += table(model, config.batch, costs)
        describe([row for row in rows if row["model"] == model])
        stream.close()
    if given.out is not None:
        where = turns.where(["python -m tools.bench.train", *argv], ("torch", *PEERS))
        given.out.write_text(json.dumps({**where, "rows": rows}, indent=1) + "\n")
        print(f"\nwritten: {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(boundary(main, sys.argv[1:]))

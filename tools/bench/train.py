"""How fast Tandem trains, as a ratio to a bare PyTorch loop over the same networks, losses and images.

    python -m tools.bench.train
    python -m tools.bench.train --models vae-tiny,vaegan --seconds 2 --rounds 9 --out bench.json
    python -m tools.bench.train --models vae-tiny --peers accelerate,lightning,pythae

Images per CPU-second of one thread. All variants of a model take short turns in one process, forth and back, and
a ratio compares within its round: whoever else uses the machine slows all of them alike.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.bench import bare, own
from tools.bench.recipes import PERIOD, RECIPES, recipe
from trainer.config import Config
from trainer.data import Stream
from trainer.errors import boundary
from trainer.parallel.config import DDPConfig
from trainer.parallel.ranks import Ranks, start

PEERS = ("accelerate", "lightning", "pythae")
TURN = 0.1
Steps = Callable[[int], None]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", type=_names(tuple(RECIPES)), default=list(RECIPES), metavar="A,B", help=f"of {','.join(RECIPES)}"
    )
    parser.add_argument(
        "--peers", type=_names(PEERS), default=[], metavar="A,B", help=f"of {','.join(PEERS)}: those that are installed"
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


def measure(found: Mapping[str, Steps], *, seconds: float, rounds: int) -> dict[str, list[float]]:
    """CPU-seconds an update of each variant, one figure a round of about `seconds` a variant.

    A turn is a whole number of penalty periods, of at least TURN seconds, so that caches are warm for most of it."""
    for steps in found.values():
        steps(PERIOD)  # first calls choose algorithms and allocate
    period = _spend(found["bare"], PERIOD)
    count = PERIOD * max(1, round(TURN / period))
    turns = max(1, round(seconds / (2 * period * count / PERIOD)))
    costs: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(rounds):
        spent = dict.fromkeys(found, 0.0)
        for _ in range(turns):
            for name in (*found, *reversed(found)):
                spent[name] += _spend(found[name], count)
        for name, cost in spent.items():
            costs[name].append(cost / (2 * turns * count))
    return costs


def _spend(steps: Steps, count: int) -> float:
    """CPU-seconds of this process, all threads."""
    since = time.process_time()
    steps(count)
    return time.process_time() - since


def table(model: str, batch: int, costs: Mapping[str, list[float]]) -> list[dict[str, Any]]:
    """A row a variant: medians and extremes over rounds."""
    rows = []
    for name, seconds in costs.items():
        ratios = [b / own for b, own in zip(costs["bare"], seconds, strict=True)]
        row = {
            "model": model,
            "variant": name,
            "images_per_cpu_s": round(batch / statistics.median(seconds), 1),
            "ms_per_update": round(1e3 * statistics.median(seconds), 3),
            "ratio_to_bare": _spread(ratios),
        }
        if "conventional" in costs and name != "conventional":
            other = zip(costs["conventional"], seconds, strict=True)
            row["ratio_to_conventional"] = _spread([c / own for c, own in other])
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
        costs = measure(found, seconds=given.seconds, rounds=given.rounds)
        rows += table(model, config.batch, costs)
        describe([row for row in rows if row["model"] == model])
        stream.close()
    if given.out is not None:
        given.out.write_text(json.dumps({**_where(argv), "rows": rows}, indent=1) + "\n")
        print(f"\nwritten: {given.out}")
    return 0


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 4),
        "least": round(min(values), 4),
        "most": round(max(values), 4),
    }


def _where(argv: list[str]) -> dict[str, Any]:
    cpu = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
    installed = {found.metadata["Name"].lower() for found in importlib.metadata.distributions()}
    return {
        "command": " ".join(["python -m tools.bench.train", *argv]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "cpu": names[0] if names else platform.processor(),
            "cores": os.cpu_count(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "load": [round(value, 2) for value in os.getloadavg()],
            "system": platform.platform(),
        },
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("torch", *PEERS) if name in installed},
    }


def _names(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        wrong = [name for name in text.split(",") if name not in known]
        if wrong:
            raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of {', '.join(known)}")
        return text.split(",")

    return parse


if __name__ == "__main__":
    sys.exit(boundary(main, sys.argv[1:]))

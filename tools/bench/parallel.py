"""What a step costs under each backend, as a ratio to DistributedDataParallel, and to a bare PyTorch loop.

    python -m tools.bench.parallel                                  # 1 and 2 processes, 1 and 4 micro-batches; minutes
    python -m tools.bench.parallel --processes 1 --accumulate 1 --width 48 --backends ddp --seconds 8 --rounds 9

A VAE-GAN with R1 and R2 in every eighth update, on images of noise. All backends live in one start and take short
turns, forth and back, so a ratio compares within its round. On CPUs time is CPU-seconds of all ranks together, waiting
left out: whoever else uses the machine counts least; on GPUs it is the time of the slowest rank.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tools.bench import turns
from tools.bench.parallel_rank import BACKENDS, BARE, PLAIN
from trainer.errors import boundary


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.parallel", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = tuple(BACKENDS)
    parser.add_argument(
        "--backends", type=turns.names(known), default=list(known), metavar="A,B", help=f"of {','.join(known)}"
    )
    parser.add_argument("--processes", type=_numbers, default=[1, 2], metavar="N,N", help="(default: 1,2)")
    parser.add_argument(
        "--accumulate", type=_numbers, default=[1, 4], metavar="N,N", help="micro-batches of a rank (default: 1,4)"
    )
    parser.add_argument("--width", type=int, default=16, help="of the autoencoder, half of the discriminator's")
    parser.add_argument("--batch", type=int, default=32, help="images an update, of all ranks (default: 32)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of the first variant in a round (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="each gives one ratio a variant (default: 5)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON too")
    return parser.parse_args(argv)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def measured(given: argparse.Namespace, *, processes: int, accumulate: int) -> dict[str, list[float]]:
    """Seconds an update of each variant, one figure a round."""
    job = {
        "backends": given.backends, "accumulate": accumulate, "width": given.width, "batch": given.batch,
        "seconds": given.seconds, "rounds": given.rounds,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="tandem-parallel-") as folder:
        out = Path(folder) / "seconds.json"
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *start, "-m", "tools.bench.parallel_rank", json.dumps(job), str(out)]
        ended = subprocess.run(
            ["env", "OMP_NUM_THREADS=1", *command], capture_output=True, text=True, check=False
        )  # fmt: skip
        if ended.returncode:
            raise RuntimeError(ended.stderr)
        found: dict[str, Any] = json.loads(out.read_text())
    assert found["world"] == processes
    costs: dict[str, list[float]] = found["seconds"]
    return costs


def rows_of(costs: dict[str, list[float]], *, processes: int, accumulate: int) -> list[dict[str, Any]]:
    """A row a variant: medians and extremes over rounds. Ratios are of time: above 1 is slower."""
    rows = []
    for name, seconds in costs.items():
        row: dict[str, Any] = {
            "processes": processes,
            "accumulate": accumulate,
            "variant": name,
            "ms_per_update": round(1e3 * statistics.median(seconds), 2),
        }
        for base in ("ddp", BARE, PLAIN):
            if base in costs:
                row[f"time_of_{base}"] = turns.ratios(seconds, costs[base])
        rows.append(row)
    return rows


def main(argv: list[str]) -> int:
    given = parse(argv)
    rows = []
    for processes in given.processes:
        for accumulate in given.accumulate:
            costs = measured(given, processes=processes, accumulate=accumulate)
            found = rows_of(costs, processes=processes, accumulate=accumulate)
            rows += found
            title = f"{processes} processes, {accumulate} micro-batches"
            print(f"\n{title:32} ms/update   time of ddp, of {BARE}, of {PLAIN}")
            for row in found:
                ratios = [row[key] for key in (f"time_of_{base}" for base in ("ddp", BARE, PLAIN)) if key in row]
                told = "   ".join(f"{r['median']:.3f} ({r['least']:.3f} to {r['most']:.3f})" for r in ratios)
                print(f"  {row['variant']:30} {row['ms_per_update']:10.1f}   {told}", flush=True)
    if given.out is not None:
        where = turns.where(["python -m tools.bench.parallel", *argv], ("torch", "accelerate", "deepspeed"))
        given.out.write_text(json.dumps({**where, "rows": rows}, indent=1) + "\n")
        print(f"\nwritten: {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(boundary(main, sys.argv[1:]))

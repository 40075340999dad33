"""Which part of its time a run waits for data, as the board has it (throughput/waiting).

    python -m tools.bench.data wait
    python -m tools.bench.data wait --kinds jpeg --readers 1,2,4

A VAE trains in a process of its own with one thread for the networks, from shards or from memory. What a
start costs (index, threads, the first batches) is in the first figure, which is given apart.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from tools.bench import turns
from tools.bench.data.sets import KINDS, Made, make

NETWORK = {"kind": "conv", "width": 8, "multipliers": [1, 2, 2]}
BATCH, LOGS, UPDATES = 32, 6, 8  # of a run: as many logs of so many updates each


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.data wait",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--kinds", type=turns.names(tuple(KINDS)), default=list(KINDS), metavar="A,B",
        help="of jpeg (256 x 256), png (28 x 28, grey), npy (28 x 28, grey)",
    )  # fmt: skip
    parser.add_argument(
        "--readers", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2], metavar="N,N",
        help="threads that read; 0: a set held in memory, as any is that fits (default: 0,1,2)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON too")
    return parser.parse_args(argv)


def waiting(made: Made, folder: Path, *, readers: int) -> list[float]:
    """throughput/waiting of a new run, one figure a log."""
    images = BATCH * LOGS * UPDATES
    tree = {
        "run": str(folder / f"run-{made.kind.field}-{readers}"),
        "images": images,
        "batch": BATCH,
        "data": {
            "path": str(made.shards), "size": made.kind.side, "channels": made.kind.channels,
            "readers": max(1, readers), "cache_mb": 0 if readers else 1024,
        },
        "method": {"kind": "vae", "autoencoder": NETWORK},
        "log": {"every": BATCH * UPDATES, "evaluate_every": 0, "pictures_every": 0, "evaluate_images": BATCH},
        "checkpoint": {"every": images},
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(json.dumps(tree))
    command = ["env", "OMP_NUM_THREADS=1", sys.executable, "-m", "trainer", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"the run failed: {done.stderr.strip()}")
    board = EventAccumulator(f"{tree['run']}/board")
    board.Reload()
    return [float(make_ndarray(event.tensor_proto)) for event in board.Tensors("throughput/waiting")]


def main(argv: list[str]) -> int:
    given = parse(argv)
    rows: list[dict[str, Any]] = []
    print(f"{'':6} {'readers':>8} {'first log':>10} {'after it (least to most)':>28}")
    for name in given.kinds:
        with tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder:
            made = make(KINDS[name], 2000, Path(folder) / "set")
            (made.shards / "test").symlink_to(made.shards / "train")  # a run wants one; it is not judged
            for readers in given.readers:
                first, *rest = waiting(made, Path(folder), readers=readers)
                rows.append({"kind": name, "readers": readers, "first": first, "rest": rest})
                spread = f"{min(rest):.2%} to {max(rest):.2%}"
                print(f"{name:6} {readers:8} {first:10.2%} {statistics.median(rest):9.2%} ({spread})", flush=True)
    if given.out is not None:
        where = turns.where(["python -m tools.bench.data wait", *argv], ("torch", "numpy", "simplejpeg"))
        given.out.write_text(json.dumps({**where, "rows": rows}, indent=1) + "\n")
        print(f"written: {given.out}")
    return 0

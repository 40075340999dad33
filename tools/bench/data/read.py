"""How fast batches are read, as ratios to the bare decoder and to webdataset's own pipeline.

    python -m tools.bench.data read
    python -m tools.bench.data read --kinds jpeg --peers webdataset,folder,litdata,mosaicml --out read.json
    python -m tools.bench.data read --resume
    python -m tools.bench.data read --device cuda

Images are made here. Microseconds of CPU a sample, on one core. All ways take short turns, forth and back, and a ratio
compares within its round: whoever else uses the machine slows all of them alike.
"""

import argparse
import contextlib
import json
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tools.bench import turns
from tools.bench.data import loaders, peer
from tools.bench.data.others import Other, installed
from tools.bench.data.sets import KINDS, Made, make
from tools.bench.turns import Turn

PEERS = ("webdataset", "folder", *peer.PEERS)
VERSIONS = ("torch", "numpy", "pillow", "simplejpeg", "opencv-python-headless", "webdataset", "litdata",
            "mosaicml-streaming")  # fmt: skip


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.data read",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--kinds", type=turns.names(tuple(KINDS)), default=list(KINDS), metavar="A,B",
        help="of jpeg (256 x 256), png (28 x 28, grey), npy (28 x 28, grey)",
    )  # fmt: skip
    parser.add_argument(
        "--peers", type=turns.names(PEERS), default=list(PEERS[:2]), metavar="A,B",
        help="of webdataset, folder, litdata, mosaicml: those that are installed (default: webdataset,folder)",
    )  # fmt: skip
    parser.add_argument("--samples", type=int, metavar="N", help="images of a kind (default: 2000 jpeg, 8000 others)")
    parser.add_argument("--batch", type=int, default=64, help="images of a batch (default: 64)")
    parser.add_argument("--seconds", type=float, default=0.5, help="CPU-seconds of the bare decoder in a round")
    parser.add_argument("--rounds", type=int, default=7, help="each gives one ratio a way (default: 7)")
    parser.add_argument("--resume", action="store_true", help="time to the first batch, at 0 and 95 %% of an epoch")
    parser.add_argument("--device", choices=("cuda",), help="the way to the GPU: pinned or not, one batch ahead or not")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON too")
    return parser.parse_args(argv)


def ways(made: Made, batch: int, peers: list[str], root: Path, stack: contextlib.ExitStack) -> dict[str, Turn]:
    """Name -> what takes so many batches. `bare` comes first."""
    stream = stack.enter_context(contextlib.closing(loaders.stream_of(made, batch, readers=2)))
    found = {
        "bare": loaders.bare(made, batch),
        "tandem": loaders.alone(made, batch),
        "tandem, 2 readers": loaders.ahead(stream),
        "tandem, in memory": loaders.alone(made, batch, cache_mb=1 << 20),
    }
    if "webdataset" in peers:
        found["webdataset"] = loaders.own_webdataset(made, batch)
    if "folder" in peers:
        found["folder, Pillow"] = loaders.folder(made, batch)
    for name in peers:
        if name in peer.PEERS and installed(name):
            decoders = {"pillow": f"{name}, Pillow", "bare": f"{name}, bare decoder"}
            for decoder, title in decoders.items():
                if made.kind.field != "npy" or decoder == "bare":  # arrays need none
                    work = root / f"{name}-{decoder}"
                    other = stack.enter_context(Other(name, made, batch, work, decoder=decoder))
                    found[name if made.kind.field == "npy" else title] = other.turn
    return found


def table(kind: str, batch: int, costs: Mapping[str, list[float]]) -> list[dict[str, Any]]:
    """A row a way: medians and extremes over rounds."""
    rows = []
    for name, seconds in costs.items():
        row = {
            "kind": kind,
            "way": name,
            "us_per_sample": round(1e6 * statistics.median(seconds) / batch, 2),
            "ratio_to_bare": turns.ratios(costs["bare"], seconds),
        }
        if "webdataset" in costs:
            row["ratio_to_webdataset"] = turns.ratios(costs["webdataset"], seconds)
        rows.append(row)
    return rows


def describe(rows: list[dict[str, Any]]) -> None:
    print(f"\n{rows[0]['kind']:26} {'us/sample':>9}   of bare (least to most)      times webdataset")
    for row in rows:
        print(f"  {row['way']:24} {row['us_per_sample']:9.2f}   {_range(row['ratio_to_bare'])}", end="")
        print(f"   {_range(row['ratio_to_webdataset'])}" if "ratio_to_webdataset" in row else "", flush=True)


def _range(found: Mapping[str, float]) -> str:
    return f"{found['median']:7.3f} ({found['least']:.3f} to {found['most']:.3f})".ljust(26)


def resume(made: Made, batch: int, rounds: int) -> dict[str, Any]:
    """CPU-seconds from a config to its first batch, index and threads included."""
    length = loaders.stream_of(made, batch).order.length
    starts = {"at 0 %": 0, "at 95 %": length * 95 // 100}

    def first(start: int) -> Turn:
        def steps(count: int) -> None:
            for _ in range(count):
                with contextlib.closing(loaders.stream_of(made, batch)) as stream:
                    next(iter(stream.batches(start)))

        return turns.in_process(steps)

    costs = turns.measure({name: first(start) for name, start in starts.items()}, unit=1, seconds=0.2, rounds=rounds)
    return {
        "samples": length,
        "ms": {name: round(1e3 * statistics.median(seconds), 3) for name, seconds in costs.items()},
        "ratio": turns.ratios(costs["at 95 %"], costs["at 0 %"]),
    }


def main(argv: list[str]) -> int:
    given = parse(argv)
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"rows": []}
    if given.device is not None:
        from tools.bench.data import device

        figures["device"] = device.measure(given.batch)
        device.describe(figures["device"])
    for name in given.kinds if given.device is None else ():
        kind = KINDS[name]
        samples = given.samples or kind.samples
        with tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder, contextlib.ExitStack() as stack:
            made = make(kind, samples, Path(folder) / "set")
            if given.resume:
                found = resume(made, given.batch, given.rounds)
                figures.setdefault("resume", {})[name] = found
                print(f"{name}: first batch {found['ms']} ms, ratio {_range(found['ratio'])}")
                continue
            ways_of = ways(made, given.batch, given.peers, Path(folder), stack)
            costs = turns.measure(ways_of, unit=1, seconds=given.seconds, rounds=given.rounds)
            rows = table(name, given.batch, costs)
        figures["rows"] += rows
        describe(rows)
    if given.out is not None:
        where = turns.where(["python -m tools.bench.data read", *argv], VERSIONS)
        given.out.write_text(json.dumps({**where, **figures}, indent=1) + "\n")
        print(f"\nwritten: {given.out}")
    return 0

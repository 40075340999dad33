"""What it costs one rank to know its next batch: time and memory of the order, and of the index on the disk.

    python -m tools.bench.data plan
    python -m tools.bench.data plan --samples 1000000 --shards 100 --ranks 8 --no-index

CPU time of one thread. Plan: the sample numbers of the rank's share. Look-up: the rows of the index for them, whose
tables are loaded and verified as they are needed. The index is made for the measurement, of equal tables and sparse
shards, in a temporary folder.
"""

import argparse
import hashlib
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from trainer.data import ShardsConfig, contents, table
from trainer.data import index as indices
from trainer.data.index import Index
from trainer.data.order import Order
from trainer.data.source import Request, Training
from trainer.data.table import ROW, Shard, Span, Spans
from trainer.errors import boundary

MEMBER = 2048  # bytes of a sample in the made shards
LINKS = 30_000  # names of one file; file systems allow 65,000


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.data plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--samples", type=int, default=10**9, help="of the split (default: 1e9)")
    parser.add_argument("--shards", type=int, default=10**5, help="they are shared out equally (default: 1e5)")
    parser.add_argument("--ranks", type=int, default=4096, help="(default: 4096)")
    parser.add_argument("--share", type=int, default=64, help="images of a rank in a batch (default: 64)")
    parser.add_argument("--window", type=int, default=4, help="shards that are mixed (default: 4)")
    parser.add_argument("--count", type=int, default=500, help="batches of each figure (default: 500)")
    parser.add_argument("--no-index", dest="index", action="store_false", help="the order alone; no files are made")
    given = parser.parse_args(argv)
    if min(given.shards, given.ranks, given.share, given.window, given.count) < 1 or given.samples < given.shards:
        parser.error("each number must be at least 1, and --samples at least --shards")
    return given


def main(argv: list[str]) -> int:
    given = parse(argv)
    each = given.samples // given.shards
    batch = given.ranks * given.share
    print(
        f"{each * given.shards:,} samples in {given.shards:,} shards, window {given.window}, {given.ranks:,} ranks, "
        f"batch {batch:,} ({given.share} a rank)\n\n{'CPU ms':42} {'median':>8} {'p99':>8} {'max':>8}"
    )
    order = Order(np.full(given.shards, each), seed=0, window=given.window)
    before = reset_peak()
    plan(order, given)
    print(f"\nmemory of the plan: {peak() - before:.0f} MiB")
    if given.index:
        with tempfile.TemporaryDirectory(prefix="tandem-plan-") as folder:
            make_set(Path(folder), shards=given.shards, each=each)
            with_index(Path(folder), given)
    return 0


def request_at(order: Order, start: int, given: argparse.Namespace) -> Request:
    """What the last rank reads of the batch at `start`."""
    return next(Training(order, start, given.ranks * given.share, given.ranks - 1, given.ranks)())


def plan(order: Order, given: argparse.Namespace) -> None:
    batch, epoch = given.ranks * given.share, order.length
    chance = random.Random(0)  # noqa: S311  positions to measure at
    anywhere = [chance.randrange(100 * epoch) for _ in range(given.count)]

    def at(start: int) -> Callable[[], object]:
        return lambda: request_at(order, start, given)

    def anew(start: int) -> Callable[[], object]:
        sizes = order.sizes
        return lambda: request_at(Order(sizes, seed=0, window=given.window), start, given)

    show("batch after batch", timed(at(turn * batch) for turn in range(given.count)))
    show("anywhere: another epoch and window each", timed(map(at, anywhere)))
    show("the first of an epoch", timed(at(turn * epoch) for turn in range(given.count)))
    few = max(1, given.count // 10)
    show("a new start at 0% of an epoch", timed(anew(0) for _ in range(few)))
    show("a new start at 95%", timed(anew(epoch * 95 // 100) for _ in range(few)))


def with_index(folder: Path, given: argparse.Namespace) -> None:
    """The same with the rows of each sample, from an index on the disk."""
    before = reset_peak()
    began = time.perf_counter()
    index = indices.load(ShardsConfig(path=folder, size=1), "train")
    order = Order(np.diff(index.starts), seed=0, window=given.window)
    print(f"index of {given.shards:,} shards: loaded and checked in {time.perf_counter() - began:.1f} s\n")
    batch = given.ranks * given.share

    def looked_up(turn: int) -> Callable[[], object]:
        return lambda: rows_of(index, request_at(order, turn * batch, given))

    show("batch after batch, with look-up", timed(map(looked_up, range(given.count))))
    print(f"\nmemory of plan and index: {peak() - before:.0f} MiB")
    index.close()


def rows_of(index: Index, request: Request) -> np.ndarray:
    return index.rows(request.sample)


# ------------------------------------------------------------------ measuring
def timed(calls: Iterable[Callable[[], object]]) -> list[float]:
    """CPU-milliseconds of this thread, of each call."""
    found = []
    for call in calls:
        began = time.thread_time()
        call()
        found.append(1e3 * (time.thread_time() - began))
    return found


def show(name: str, spent: Sequence[float]) -> None:
    ranked = sorted(spent)
    p99 = ranked[max(0, -(-99 * len(ranked) // 100) - 1)]
    print(f"{name:42} {statistics.median(ranked):8.2f} {p99:8.2f} {ranked[-1]:8.2f}", flush=True)


def reset_peak() -> float:
    """MiB of this process now; its peak is counted from here on (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> float:
    return _status("VmHWM")


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    (found,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(found.split()[1]) / 1024


# ------------------------------------------------------------------ an index of that size
def make_set(folder: Path, *, shards: int, each: int) -> None:
    """FOLDER/train with an index of `shards` shards of `each` samples. All shards are one sparse file, and all tables
    one file, under as many names as the file system allows."""
    train = folder / "train"
    train.mkdir()
    begin = np.arange(each, dtype=np.int64) * MEMBER
    rows = np.zeros(each, ROW)
    rows["begin"], rows["end"], rows["offset"], rows["size"] = begin, begin + MEMBER, begin + 512, 100
    data = table.encode(rows)
    digest, size = hashlib.sha256(data).hexdigest(), each * MEMBER + 1024
    lines = [Shard(f"{number:06d}.tar", each, size, "0" * 64, digest) for number in range(shards)]
    for number, shard in enumerate(lines):
        paths = train / shard.name, train / table.table_name(shard.name)
        first = number // LINKS * LINKS
        if number == first:
            paths[0].touch()
            os.truncate(paths[0], size)
            paths[1].write_bytes(data)
        else:
            os.link(train / lines[first].name, paths[0])
            os.link(train / table.table_name(lines[first].name), paths[1])
    later = time.time_ns() + 10**9  # than the shards', whose last names may be of this very tick
    for number in range(0, shards, LINKS):
        os.utime(train / table.table_name(lines[number].name), ns=(later, later))
    one = Span(1, 1)
    found = contents.Contents(shards=tuple(lines), classes=(), fields=("npy",), spans=Spans(one, one, Span(3, 3)))
    contents.write(train / contents.NAME, found)


if __name__ == "__main__":
    sys.exit(boundary(main, sys.argv[1:]))

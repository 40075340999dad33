"""Does the data stream lose, double or misplace a sample when its processes are killed?

    python -m tools.soak.data --samples 1000000 --ranks 4 --kills 20 --seed 0
    python -m tools.soak.data --samples 100000 --ranks 6 --kills 5 --sets 3

Small uneven shards are written to a temporary folder. Real processes read their shares of the global batches, write
down the number that each image spells, and commit their position. One of them or all are killed at random moments;
another start, at a random number of ranks that divides --ranks, goes on from the last commit. At the end what they
wrote is compared with the order as plain Python works it out. Exit code 1 where they differ.
"""

import argparse
import itertools
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np

from tools.shards import encode
from tools.soak import reference
from tools.soak.count import Count, Part, consumed, count
from tools.soak.rank import POLL, SHAPE, Job, committed, read
from trainer.data import tar
from trainer.errors import boundary

WINDOW = 4
EVERY = 5  # batches from commit to commit
SHARE = 64  # images of a rank in a batch, at most
GAP = 0.1  # seconds within which a kill comes after its moment, and the other ranks' after that
PATIENCE = 120.0  # seconds without progress after which a start has hung
CONTEXT = multiprocessing.get_context("fork")  # torch is imported once; no thread is started before


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.soak.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=1_000_000, help="positions to read in all (default: 1000000)")
    parser.add_argument("--ranks", type=int, default=4, help="processes of a start, at most (default: 4)")
    parser.add_argument("--kills", type=int, default=20, help="(default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the shards, the order and the kills (default: 0)")
    parser.add_argument("--sets", type=int, default=1, help="more than one: a mixture, by weights (default: 1)")
    parser.add_argument("--tail", choices=("carry", "drop"), default="carry", help="of an epoch (default: carry)")
    given = parser.parse_args(argv)
    if min(given.samples, given.ranks, given.sets) < 1 or given.kills < 0:
        parser.error("--samples, --ranks and --sets must be at least 1, --kills at least 0")
    if given.samples % given.ranks:
        parser.error(f"--samples {given.samples} does not divide among --ranks {given.ranks}")
    return given


def main(argv: list[str]) -> int:
    given = parse(argv)
    chance = random.Random(given.seed)  # noqa: S311  chance of a test, no secret
    with tempfile.TemporaryDirectory(prefix="tandem-soak-") as folder:
        sizes = [shard_sizes(given.samples // 10 // given.sets + 7, chance) for _ in range(given.sets)]
        write_sets(Path(folder), sizes)
        parts, kills = run(Path(folder), given, chance)
        found = consumed(parts, batch=batch_of(given))
    came_to = count(found, expected(sizes, given))
    print(summary(given, parts, kills, came_to), flush=True)
    return 0 if came_to == Count(0, 0, 0) else 1


def summary(given: argparse.Namespace, parts: Sequence[Part], kills: int, came_to: Count) -> str:
    worlds = sorted({part.world for part in parts})
    ranks = f"{worlds[0]}-{worlds[-1]} ranks" if len(worlds) > 1 else f"{worlds[0]} ranks"
    return f"{given.samples:,} samples, {given.ranks} ranks, {kills} kills, {len(parts)} starts at {ranks}: {came_to}"


def batch_of(given: argparse.Namespace) -> int:
    """Images of a global batch: it divides the samples, and every number of ranks that may be drawn divides it."""
    share = given.samples // given.ranks
    return int(given.ranks * max(part for part in range(1, SHARE + 1) if share % part == 0))


# ------------------------------------------------------------------ the set
def shard_sizes(samples: int, chance: random.Random) -> list[int]:
    """Uneven, from one sample to a fifth of all."""
    sizes = [1, 1]
    while (rest := samples - sum(sizes)) > 0:
        sizes.append(min(rest, chance.randint(1, max(1, samples // 5))))
    chance.shuffle(sizes)
    return sizes


def write_sets(folder: Path, sizes: Sequence[Sequence[int]]) -> None:
    """FOLDER/set-N/train/*.tar. The four pixels of an image spell its number, counted through all sets."""
    number = 0
    for place, shards in enumerate(sizes):
        train = set_folder(folder, place) / "train"
        train.mkdir(parents=True)
        for shard, size in enumerate(shards):
            with (train / f"{shard:05d}.tar").open("wb") as file:
                for sample in range(number, number + size):
                    image = np.array([sample], "<u4").view(np.uint8).reshape(SHAPE)
                    file.write(tar.member(f"{sample:09d}.npy", encode.npy(image)))
                file.write(tar.end(file.tell()))
            number += size


def set_folder(folder: Path, place: int) -> Path:
    return folder / f"set-{place}"


def weights(sets: int) -> list[float]:
    return [float(sets - place) for place in range(sets)]


def expected(sizes: Sequence[Sequence[int]], given: argparse.Namespace) -> list[int]:
    if given.sets == 1:
        batch = batch_of(given) if given.tail == "drop" else None
        order = reference.order(sizes[0], seed=given.seed, window=WINDOW, batch=batch)
    else:
        orders = [
            reference.order(shards, seed=reference.derived(given.seed, reference.SETS, place), window=WINDOW)
            for place, shards in enumerate(sizes)
        ]
        bases = [0, *itertools.accumulate(map(sum, sizes))][:-1]
        order = reference.mixture(orders, bases, weights(given.sets), seed=given.seed)
    return list(itertools.islice(order, given.samples))


# ------------------------------------------------------------------ the starts
def run(folder: Path, given: argparse.Namespace, chance: random.Random) -> tuple[list[Part], int]:
    """Starts and kills until all is read; (what each start added, the kills)."""
    batch = batch_of(given)
    last = max(1, given.samples - (EVERY + 1) * batch)  # behind it a rank may hold before it wrote that it came so far
    moments = sorted(chance.randrange(last) for _ in range(given.kills))
    parts: list[Part] = []
    while (start := committed(folder)) < given.samples:
        moment = moments.pop(0) if moments else None
        hold = None if moment is None else min(max(start, moment) + 4 * EVERY * batch, given.samples - batch)
        job = Job(
            run=folder, number=len(parts), start=start, stop=given.samples, hold=hold, batch=batch, every=EVERY,
            sets=tuple((set_folder(folder, place), weight) for place, weight in enumerate(weights(given.sets))),
            tail=given.tail, window=WINDOW, readers=chance.randint(1, 3), memory=chance.random() < 0.25,
            world=chance.choice([part for part in range(1, given.ranks + 1) if given.ranks % part == 0]),
            seed=given.seed,
        )  # fmt: skip
        job.folder.mkdir()
        said = follow(job, moment, chance)
        part = Part(start, committed(folder), job.world, job.log)
        parts.append(part)
        source = "memory" if job.memory else f"shards, {job.readers} readers"
        print(f"start {job.number}: {job.world} ranks, {source}: {start:,} to {part.until:,}, {said}", flush=True)
    return parts, given.kills - len(moments)


def follow(job: Job, moment: int | None, chance: random.Random) -> str:
    """One start to its end, in words: that of its work, or by signals once `moment` is passed."""
    ranks: list[BaseProcess] = [
        CONTEXT.Process(target=read, args=(job, rank), daemon=True) for rank in range(job.world)
    ]
    for process in ranks:
        process.start()
    try:
        if _wait(job, ranks, moment):
            return "done"
        time.sleep(chance.uniform(0, GAP))
        victim = chance.choice([None, chance.randrange(job.world)])
        if victim is not None:
            ranks[victim].kill()
            time.sleep(chance.uniform(0, GAP))  # what a launcher needs to see it and to end the others
        return "all killed" if victim is None else f"rank {victim} killed, then the others"
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _wait(job: Job, ranks: Sequence[BaseProcess], moment: int | None) -> bool:
    """Whether the start came to its end by itself, before `moment`."""
    log, seen, limit = job.log(0), 0, time.monotonic() + PATIENCE
    while True:
        codes = [process.exitcode for process in ranks]
        if any(codes):  # neither at work (None) nor done (0)
            raise RuntimeError(f"start {job.number}: ranks ended by themselves, exit codes {codes}")
        if None not in codes:
            return True
        written = log.stat().st_size // 8 * job.world if log.exists() else 0
        if moment is not None and job.start + written >= moment:
            return False
        if written > seen:
            seen, limit = written, time.monotonic() + PATIENCE
        if time.monotonic() > limit:
            raise RuntimeError(f"start {job.number}: no rank went on from {job.start + seen:,} for {PATIENCE:.0f} s")
        time.sleep(2 * POLL)


if __name__ == "__main__":
    sys.exit(boundary(main, sys.argv[1:]))

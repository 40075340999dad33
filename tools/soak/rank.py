"""One rank of the soak: reads its share of the global batches through the stream, writes down what it got, and commits
how far all ranks have come. It may be killed at any moment.

    RUN/position.json       {"position": images}, replaced as a whole by rank 0: all ranks wrote down what lies before
    RUN/007/2.i8            what rank 2 of start 7 got, int64 sample numbers, appended before each commit
"""

import contextlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from trainer.data import MixtureConfig, ShardsConfig, Stream
from trainer.data.config import SetConfig

SHAPE = (2, 2, 1)
"""Of an image: four bytes, which spell the number of its sample."""
POLL = 0.001  # seconds


@dataclass(frozen=True)
class Job:
    """What every rank of a start is told. Positions are of the global order, in images."""

    run: Path
    number: int
    """Of the start."""
    sets: tuple[tuple[Path, float], ...]
    """Folder and weight of each set."""
    tail: str
    window: int
    readers: int
    memory: bool
    """Whether the set is held in memory."""
    start: int
    stop: int
    hold: int | None
    """From here on a rank waits for its end, so that none escapes the signal that is meant for it."""
    batch: int
    every: int
    """Batches from commit to commit."""
    world: int
    seed: int

    @property
    def folder(self) -> Path:
        return self.run / f"{self.number:03d}"

    def log(self, rank: int) -> Path:
        return self.folder / f"{rank}.i8"


def read(job: Job, rank: int) -> None:
    """From job.start to job.stop."""
    torch.set_num_threads(1)
    stream = Stream(_config(job), split="train", batch=job.batch, rank=rank, world=job.world, seed=job.seed)
    log = os.open(job.log(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    position, got = job.start, []
    with contextlib.closing(stream):
        for raw in stream.batches(job.start):
            got.append(raw.data.reshape(len(raw.data), 4).numpy().copy().view("<u4"))
            position += job.batch
            if len(got) == job.every or position == job.stop:
                _append(log, np.concatenate(got).astype("<i8").tobytes())
                got = []
                if rank == 0:
                    _commit(job, position)
            if position == job.stop:
                return
            while job.hold is not None and position >= job.hold:
                time.sleep(1)


def committed(run: Path) -> int:
    """The position from which the next start goes on."""
    path = run / "position.json"
    return int(json.loads(path.read_text())["position"]) if path.exists() else 0


def _config(job: Job) -> ShardsConfig | MixtureConfig:
    common = {
        "size": SHAPE[:2], "channels": SHAPE[2], "window": job.window, "readers": job.readers,
        "cache_mb": 1024 if job.memory else 0, "tail": job.tail,
    }  # fmt: skip
    if len(job.sets) == 1:
        return ShardsConfig(path=job.sets[0][0], **common)
    return MixtureConfig(sets=tuple(SetConfig(path=path, weight=weight) for path, weight in job.sets), **common)


def _append(log: int, data: bytes) -> None:
    while data:
        data = data[os.write(log, data) :]


def _commit(job: Job, position: int) -> None:
    """Waits until every rank has written down its share up to `position`. Peers that are gone make it wait until it is
    killed too, as a collective would."""
    size = (position - job.start) // job.world * 8
    while any(not path.exists() or path.stat().st_size < size for path in map(job.log, range(job.world))):
        time.sleep(POLL)
    aside = job.run / "position.part"
    with aside.open("w") as file:
        json.dump({"position": position}, file)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(job.run / "position.json")

"""Every sample of a split, or some, in the order of the shards: read and decoded by threads, bad ones with their
reason."""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from trainer.data import decode
from trainer.data.config import Reading
from trainer.data.convert import Undecodable
from trainer.data.index import Index, Rows
from trainer.data.order import mix
from trainer.data.store import OpenShard

CHUNK = 256
"""Samples that a thread decodes at a time, at most."""
CHUNK_BYTES = 8 << 20
"""Of pixels that these may take, by the largest image of the split; one image is always taken."""
Look = TypeVar("Look")


class Chunk(NamedTuple):
    """Samples that stand one after the other in a shard."""

    samples: NDArray[np.int64]
    """(n): numbers in the split of those that could be decoded."""
    rows: Rows
    """(n): theirs."""
    images: list[NDArray[np.uint8]]
    """n of (H, W, 1 or 3), as they are stored."""
    bad: list[tuple[int, str]]
    """Number and reason of those that could not."""


def walk(
    index: Index,
    config: Reading,
    *,
    look: Callable[[Chunk], Look],
    threads: int,
    samples: NDArray[np.int64] | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Iterator[Look]:
    """What `look` makes of each chunk, in their order. `look` runs in the threads too; what it keeps of the images
    stays in memory until it is taken here. samples: sorted numbers, for some only. advance: is told of samples that
    are done.

    ValueError, OSError: a shard that is missing or changed. A bad sample is no error.
    """
    waiting: deque[tuple[int, Future[Look]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="walk") as pool:
        try:
            for shard, numbers in _chunks(index, samples):
                waiting.append((len(numbers), pool.submit(_look, index, config, shard, numbers, look)))
                if len(waiting) > 2 * threads:
                    yield _taken(waiting, advance)
            while waiting:
                yield _taken(waiting, advance)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _taken(waiting: "deque[tuple[int, Future[Look]]]", advance: Callable[[int], None]) -> Look:
    count, future = waiting.popleft()
    found = future.result()
    advance(count)
    return found


def _chunks(index: Index, samples: NDArray[np.int64] | None) -> Iterator[tuple["_Shard", NDArray[np.int64]]]:
    """Shards and numbers of samples in the split; a chunk lies in one shard."""
    for number, (low, high) in enumerate(zip(index.starts[:-1].tolist(), index.starts[1:].tolist(), strict=True)):
        if samples is None:
            numbers = np.arange(low, high, dtype=np.int64)
        else:
            numbers = samples[np.searchsorted(samples, low) : np.searchsorted(samples, high)]
        if not len(numbers):
            continue
        index.store(number).prepare(index.shards[number : number + 2])
        shard = _Shard(index, number)
        yield from ((shard, part) for part in pieces(index, numbers))


class _Shard:
    """Opened here, one after the other; closed with the last chunk that reads it."""

    def __init__(self, index: Index, number: int) -> None:
        self.number = number
        self.file: OpenShard = index.store(number).open(index.shards[number])


def _look(
    index: Index, config: Reading, shard: _Shard, numbers: NDArray[np.int64], look: Callable[[Chunk], Look]
) -> Look:
    return look(decoded(index, config, shard.number, numbers, descriptor=shard.file.fd))


def pieces(index: Index, numbers: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Samples in parts whose pixels may be held at a time."""
    sides = [span.high for span in (index.height, index.width, index.channels) if span]
    size = min(CHUNK, max(1, CHUNK_BYTES // max(1, int(np.prod(sides)))))
    yield from (numbers[at : at + size] for at in range(0, len(numbers), size))


def decoded(index: Index, config: Reading, shard: int, numbers: NDArray[np.int64], *, descriptor: int) -> Chunk:
    """Samples of an open shard, numbers in the split. ValueError where the shard ends too early."""
    rows = index.table(shard)[numbers - index.starts[shard]]
    most = int(config.limits.megapixels * 1e6)
    images: list[NDArray[np.uint8]] = []
    good: list[int] = []
    bad: list[tuple[int, str]] = []
    for place, (number, row) in enumerate(zip(numbers.tolist(), rows, strict=True)):
        size = int(row["size"])
        data = os.pread(descriptor, size, int(row["offset"]))
        if len(data) != size:
            raise ValueError(f"{index.where(number)}: the shard was cut short while it was read; copy it again")
        try:
            field = index.fields[row["field"]]
            images.append(decode.decode(data, field, channels=None, max_pixels=most, background=config.background))
            good.append(place)
        except Undecodable as error:
            bad.append((number, str(error)))
    return Chunk(numbers[good], rows[good], images, bad)


def spread(samples: int, count: int, *, seed: int) -> NDArray[np.int64]:
    """`count` of the numbers 0 ... samples-1, sorted: one from each of as many equal parts, drawn by the seed. All of
    them where there are no more."""
    if count >= samples:
        return np.arange(samples, dtype=np.int64)
    ends = np.array([part * samples // count for part in range(count + 1)], np.int64)
    drawn = mix(np.arange(count, dtype=np.uint64) ^ mix(np.array([seed], np.int64).view(np.uint64)))
    return ends[:-1] + (drawn % np.diff(ends).astype(np.uint64)).astype(np.int64)

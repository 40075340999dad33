"""Requests to batches: a stage of a webdataset pipeline. From memory where the set is small, else by threads from the
shards."""

import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.data import decode
from trainer.data.batch import RawBatch
from trainer.data.config import DataConfig
from trainer.data.convert import Undecodable
from trainer.data.index import Index
from trainer.data.source import Request

LARGEST_SHARD = 512 << 20  # bytes that are read at once when the memory is filled
CHUNK = 1024  # samples that a thread decodes at a time then


class Quarantine:
    """Samples that cannot be decoded. Whether one can depends on its bytes alone, and its stand-in is the next good
    sample of the split: so every rank, world size and resumed run replaces it by the same."""

    def __init__(self, index: Index, max_bad_fraction: float) -> None:
        self.index = index
        self.reasons: dict[int, str] = {}
        self._share = max_bad_fraction
        self._allowed = max(1, int(max_bad_fraction * index.samples)) if max_bad_fraction else 0
        self._lock = threading.Lock()

    def add(self, sample: int, reason: str) -> None:
        """ValueError when more samples are bad than the config allows."""
        with self._lock:
            self.reasons[sample] = reason
            if len(self.reasons) > min(self._allowed, self.index.samples - 1):
                raise ValueError(
                    f"{self.index.where(sample)}: {reason}; {len(self.reasons)} of {self.index.samples} samples are "
                    f"bad, more than data.max_bad_fraction {self._share:g} allows; make the set again, or raise it"
                )

    def stand_in(self, sample: int) -> int:
        while sample in self.reasons:
            sample = (sample + 1) % self.index.samples
        return sample


def fetch(
    index: Index, samples: NDArray[np.int64], out: NDArray[np.uint8], quarantine: Quarantine, config: DataConfig
) -> NDArray[np.int64]:
    """Decodes `samples` into the rows of `out` (n, H, W, C); returns the samples that really stand there."""
    real = samples.copy()
    starts = index.starts
    file, opened = -1, -1
    try:
        for row in np.argsort(samples, kind="stable").tolist():  # in the order of the bytes on the disk
            while True:
                sample = quarantine.stand_in(int(samples[row]))
                shard = int(np.searchsorted(starts, sample, "right")) - 1
                if shard != opened:
                    if file >= 0:
                        os.close(file)
                    file, opened = os.open(index.folder / index.shards[shard].name, os.O_RDONLY), shard
                try:
                    out[row] = _decode(index, sample, file, out.shape[1:], config)
                    break
                except Undecodable as error:
                    quarantine.add(sample, str(error))
            real[row] = sample
    finally:
        if file >= 0:
            os.close(file)
    return real


def _decode(index: Index, sample: int, file: int, shape: tuple[int, ...], config: DataConfig) -> NDArray[np.uint8]:
    size = int(index.size[sample])
    data = os.pread(file, size, int(index.offset[sample]))
    if len(data) != size:
        raise ValueError(f"{index.where(sample)}: the shard was cut short while it was read; copy it again")
    image = decode.decode(
        data,
        index.fields[index.field[sample]],
        channels=config.channels,
        max_pixels=shape[0] * shape[1],
        background=config.background,
    )
    if image.shape != shape:
        raise Undecodable(f"is {image.shape[0]} x {image.shape[1]}, the set holds {shape[0]} x {shape[1]}")
    return image


class Memory:
    """A split that is decoded once and gathered from memory: one gather a batch."""

    def __init__(self, index: Index, config: DataConfig, quarantine: Quarantine) -> None:
        self.image = np.empty((index.samples, *config.shape), np.uint8)
        self.label = index.label
        self.index, self.quarantine = index, quarantine
        rest = np.concatenate([index.starts[shard] + self._gather(shard, config) for shard in range(len(index.shards))])
        if len(rest):
            chunks = [rest[i : i + CHUNK] for i in range(0, len(rest), CHUNK)]
            with ThreadPoolExecutor(config.readers, thread_name_prefix="decode") as pool:
                list(pool.map(lambda rows: self._fill(rows, config), chunks))
        self.real: NDArray[np.int64] | None = None
        if quarantine.reasons:
            self.real = np.array([quarantine.stand_in(sample) for sample in range(index.samples)], np.int64)

    def _gather(self, number: int, config: DataConfig) -> NDArray[np.int64]:
        """Copies the .npy samples of one layout of a shard at once; returns the numbers (in the shard) of all
        others."""
        index, shard = self.index, self.index.shards[number]
        rows = slice(int(index.starts[number]), int(index.starts[number + 1]))
        every = np.arange(shard.samples, dtype=np.int64)
        offset, size = index.offset[rows], index.size[rows]
        if shard.bytes > LARGEST_SHARD or index.fields[index.field[rows.start]].rpartition(".")[2].lower() != "npy":
            return every
        data = np.fromfile(index.folder / shard.name, np.uint8)
        if len(data) < int((offset + size).max()):
            return every  # cut short this moment: reading sample by sample says so
        first = data[offset[0] : offset[0] + size[0]].tobytes()
        try:
            length, shape = decode.npy_header(first)
        except Undecodable:
            return every
        if shape != config.shape or length + np.prod(shape) != size[0]:
            return every
        same = (index.field[rows] == index.field[rows.start]) & (size == size[0])
        headers = data[np.where(same, offset, offset[0])[:, None] + np.arange(length)]
        same &= (headers == np.frombuffer(first[:length], np.uint8)).all(axis=1)
        steps = np.arange(length, int(size[0]))
        for i in range(0, shard.samples, CHUNK):
            part = every[i : i + CHUNK][same[i : i + CHUNK]]
            self.image[rows.start + part] = data[offset[part, None] + steps].reshape(-1, *shape)
        rest: NDArray[np.int64] = every[~same]
        return rest

    def _fill(self, rows: NDArray[np.int64], config: DataConfig) -> None:
        """Decodes rows one by one; a bad one is noted and its row stays empty, as its stand-in is looked up by
        number."""
        starts = self.index.starts
        for number in np.unique(np.searchsorted(starts, rows, "right") - 1).tolist():
            file = os.open(self.index.folder / self.index.shards[number].name, os.O_RDONLY)
            try:
                for row in rows[(rows >= starts[number]) & (rows < starts[number + 1])].tolist():
                    try:
                        self.image[row] = _decode(self.index, row, file, config.shape, config)
                    except Undecodable as error:
                        self.quarantine.add(row, str(error))
            finally:
                os.close(file)


class Reader:
    """`reader(requests)` gives batches in the order of the requests. `replaced` counts bad samples in what was
    given."""

    def __init__(self, index: Index, config: DataConfig) -> None:
        self.index, self.config = index, config
        self.quarantine = Quarantine(index, config.max_bad_fraction)
        self.replaced = 0
        height, width, channels = config.shape
        self.cached = index.samples * height * width * channels <= config.cache_mb << 20
        self._memory: Memory | None = None
        self._pinned = torch.cuda.is_available()

    def __call__(self, requests: Iterator[Request]) -> Iterator[RawBatch]:
        return self._from_memory(requests) if self.cached else self._from_shards(requests)

    def _from_memory(self, requests: Iterator[Request]) -> Iterator[RawBatch]:
        if self._memory is None:
            self._memory = Memory(self.index, self.config, self.quarantine)
        memory = self._memory
        for request in requests:
            real = request.sample if memory.real is None else memory.real[request.sample]
            image = self._empty(len(real))
            # the numbers are right: mode "clip" spares the copy that "raise" makes of `out`
            np.take(memory.image, real, axis=0, out=image.numpy(), mode="clip")
            yield self._batch(request, real, image)

    def _from_shards(self, requests: Iterator[Request]) -> Iterator[RawBatch]:
        pool = ThreadPoolExecutor(self.config.readers, thread_name_prefix="read")
        waiting: deque[tuple[Request, torch.Tensor, Future[NDArray[np.int64]]]] = deque()
        try:
            for request in requests:
                image = self._empty(len(request.sample))
                work = pool.submit(fetch, self.index, request.sample, image.numpy(), self.quarantine, self.config)
                waiting.append((request, image, work))
                if len(waiting) > self.config.prefetch:
                    first, pixels, done = waiting.popleft()
                    yield self._batch(first, done.result(), pixels)
            while waiting:
                first, pixels, done = waiting.popleft()
                yield self._batch(first, done.result(), pixels)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _empty(self, count: int) -> torch.Tensor:
        return torch.empty((count, *self.config.shape), dtype=torch.uint8, pin_memory=self._pinned)

    def _batch(self, request: Request, real: NDArray[np.int64], image: torch.Tensor) -> RawBatch:
        weight = torch.ones(len(real)) if request.weight is None else torch.from_numpy(request.weight)
        if self.quarantine.reasons:
            replaced = real != request.sample
            self.replaced += int(replaced.sum() if request.weight is None else (replaced & (request.weight > 0)).sum())
            if request.weight is not None:
                weight[torch.from_numpy(replaced)] = 0.0  # an evaluation counts no sample twice
        return RawBatch(
            image,
            torch.from_numpy(self.index.label[real]),
            torch.from_numpy(request.position),
            torch.from_numpy(real.copy() if request.weight is None else real),
            weight,
        )

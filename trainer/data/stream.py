"""The stream of a split: exact order, exact resume, equal batches for every rank."""

import time
import weakref
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
import webdataset

from trainer.data import index as indices
from trainer.data.batch import RawBatch
from trainer.data.config import DataConfig
from trainer.data.order import Order
from trainer.data.reader import Reader
from trainer.data.source import Evaluation, Request, Training

NAMED = 20  # bad samples that one call of `news` names


class Stream:
    """One rank's view of a split. Which samples it gives at which position depends on (seed, shards, window) alone."""

    def __init__(self, config: DataConfig, *, split: str, batch: int, rank: int, world: int, seed: int) -> None:
        """batch: images of a global batch; each of the `world` ranks gets an equal share of it.

        ValueError, before anything is read but headers: a missing or damaged set, another size than the config's, fewer
        samples than ranks, a batch that ranks do not divide.
        """
        assert 0 <= rank < world
        self.config, self.split, self.batch, self.rank, self.world = config, split, batch, rank, world
        _share(batch, world)
        self.index = indices.load(Path(config.sets[0].path), split, image=config.image)
        _agree(self.index, config)
        if self.index.samples < world:
            raise ValueError(
                f"data.path: {self.index.folder} holds {self.index.samples} samples, fewer than the {world} ranks; "
                "use fewer processes or more data"
            )
        self.order = Order(
            [shard.samples for shard in self.index.shards],
            seed=seed,
            window=len(self.index.shards) if config.window == "all" else config.window,
        )
        self.samples: int = self.index.samples
        """In the split."""
        self.classes: tuple[str, ...] = self.index.classes
        self.fingerprint: str = self.index.fingerprint
        """Digest of shard names, sizes and digests: a resumed run compares it."""
        self.waited = 0.0
        """Seconds that the consumer waited for batches, since the stream was made."""
        self._reader = Reader(self.index, config)
        self._told = 0  # bad samples that `news` has had
        # weak: an evaluation that its consumer leaves before the end takes its threads and batches with it
        self._open: weakref.WeakSet[Generator[RawBatch, None, None]] = weakref.WeakSet()

    @property
    def bad(self) -> int:
        """Samples in the batches given so far that were replaced because they could not be decoded."""
        return self._reader.replaced

    def news(self) -> list[str]:
        """A line for each bad sample that this rank has met since the last call; NAMED of them by name.

        Of a set in memory every rank has met the same: there only rank 0 speaks."""
        found = list(self._reader.quarantine.reasons.items())[self._told :]
        self._told += len(found)
        if self.rank and self._reader.cached:
            return []
        lines = [f"{self.index.where(sample)}: {why}; the next good sample stands in" for sample, why in found[:NAMED]]
        return lines + ([f"and {len(found) - NAMED:,} more bad samples"] if len(found) > NAMED else [])

    def batches(self, start: int) -> Iterator[RawBatch]:
        """This rank's share of every global batch from position `start` (images seen) on; endless."""
        assert start >= 0
        return self._run(Training(self.order, start, self.batch, self.rank, self.world))

    def evaluation(self, batch: int) -> Generator[RawBatch, None, None]:
        """Each sample once over all ranks, in the order of the shards; `batch` images a global batch, the same number
        of batches on every rank, padding and bad samples with weight 0. Close it where it is left before its end."""
        _share(batch, self.world)
        return self._run(Evaluation(self.samples, batch, self.rank, self.world))

    def first(self, count: int) -> RawBatch:
        """The first `count` samples of the split (all, where it has fewer), the same on every rank: for pictures."""
        rows = np.arange(min(count, self.samples), dtype=np.int64)
        return next(self._reader(iter([Request(rows, rows, np.ones(len(rows), np.float32))])))

    def close(self) -> None:
        """Ends the readers; iterators of this stream are at their end."""
        for running in list(self._open):
            running.close()

    def _run(self, source: Training | Evaluation) -> Generator[RawBatch, None, None]:
        running = self._timed(webdataset.DataPipeline(source, self._reader))
        self._open.add(running)
        return running

    def _timed(self, pipeline: webdataset.DataPipeline) -> Generator[RawBatch, None, None]:
        batches = iter(pipeline)
        while True:
            began = time.perf_counter()
            raw = next(batches, None)
            self.waited += time.perf_counter() - began
            if raw is None:
                return
            yield raw


def _share(batch: int, world: int) -> int:
    if batch < 1 or batch % world:
        nearest = max(1, round(batch / world)) * world
        raise ValueError(f"batch: {batch} does not divide among {world} ranks; nearest: {nearest}")
    return batch // world


def _agree(index: indices.Index, config: DataConfig) -> None:
    """ValueError where the config asks for a size or for channels that the data does not have."""
    if index.height is None or index.width is None or index.channels is None:
        raise ValueError(f"data.path: no image in {index.folder} can be read; make the set again")
    height, width, channels = config.shape
    found = f"{index.height} x {index.width}"
    if index.height.low != index.height.high or index.width.low != index.width.high:
        raise ValueError(
            f"data.size: {index.folder} holds images of different sizes ({found}, height x width); "
            "make it again with `tandem data make folder SRC DEST --size N`"
        )
    if (index.height.low, index.width.low) != (height, width):
        same = index.height.low == index.width.low
        raise ValueError(
            f"data.size: {height} x {width} is not what {index.folder} holds ({found}, height x width); "
            f"set data.size to {index.height.low if same else [index.height.low, index.width.low]}, "
            "or make the set again with `tandem data make folder SRC DEST --size N`"
        )
    if channels == 1 and index.channels.high > 1:
        raise ValueError(
            f"data.channels: 1 is not what {index.folder} holds ({index.channels} channels); set data.channels to 3, "
            "or make the set again with `tandem data make folder SRC DEST --channels 1`"
        )
    if channels == 3 and index.channels.high == 1:
        raise ValueError(
            f"data.channels: 3 is not what {index.folder} holds (grey images); set data.channels to 1, "
            "or make the set again with `tandem data make folder SRC DEST --channels 3`"
        )

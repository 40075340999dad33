"""The stream of a split: exact order, exact resume, equal batches for every rank."""

import time
import weakref
from collections.abc import Callable, Generator, Iterator
from functools import partial

import numpy as np
import webdataset
from numpy.typing import NDArray

from trainer.data import index as indices
from trainer.data.batch import RawBatch
from trainer.data.config import DataConfig
from trainer.data.images import images_of
from trainer.data.mixture import order_of
from trainer.data.modality import Modality
from trainer.data.opened import allow_cache, prepare
from trainer.data.quarantine import Bad
from trainer.data.reader import Reader
from trainer.data.source import Evaluation, Request, Training

LOOKS = 2
"""Shards of an evaluation that are asked for at a time, beside the next one; fewer where data.window is."""
Shards = Callable[[Request], NDArray[np.int64]]
"""Numbers of the shards that belong to a request."""


class Stream:
    """One rank's view of a split. Which samples it gives at which position depends on (seed, shards, window) alone."""

    def __init__(
        self,
        config: DataConfig,
        *,
        split: str,
        batch: int,
        rank: int,
        world: int,
        seed: int,
        modality: Modality | None = None,
    ) -> None:
        """batch: samples of a global batch; each of the `world` ranks gets an equal share of it. modality: None for
        images.

        ValueError, before anything is read but headers: a missing or damaged set, another size than the config's, fewer
        samples than ranks, a batch that ranks do not divide.
        """
        assert 0 <= rank < world
        self.config, self.split, self.batch, self.rank, self.world = config, split, batch, rank, world
        _share(batch, world)
        self.index = indices.load(config, split)
        modality = images_of(self.index, config) if modality is None else modality
        if self.index.samples < world:
            raise ValueError(
                f"data.path: {self.index.store(0).name} holds {self.index.samples} samples, fewer than the {world} "
                "ranks; use fewer processes or more data"
            )
        self.order = order_of(self.index, config, seed=seed, batch=batch)
        self.samples: int = self.index.samples
        """In the split."""
        self.stored: tuple[int, ...] = modality.shape
        """Of a row of the batches; of images (H, W, C), which the device brings to the config's size."""
        self.classes: tuple[str, ...] = self.index.classes
        self.fingerprint: str = self.index.fingerprint
        """Digest of shard names, sizes and digests: a resumed run compares it."""
        self.waited = 0.0
        """Seconds that the consumer waited for batches, since the stream was made."""
        self._reader = Reader(self.index, config, modality)
        window = len(self.index.shards) if config.window == "all" else config.window
        self._config, self._window, self._looks = config, window, min(window, LOOKS)
        if not self._reader.cached:
            allow_cache(self.index, config, self._looks)
        self._told = 0  # bad samples that `news` has had
        # weak: an evaluation that its consumer leaves before the end takes its threads and batches with it
        self._open: weakref.WeakSet[Generator[RawBatch, None, None]] = weakref.WeakSet()

    @property
    def allowed(self) -> int:
        """Bad samples that a run may meet, by data.max_bad_fraction."""
        return self._reader.quarantine.allowed

    def too_many(self, count: int) -> str:
        """What is wrong with `count` bad samples, more than are allowed: for a message."""
        return self._reader.quarantine.too_many(count)

    @property
    def bad(self) -> int:
        """Samples in the batches given so far that were replaced because they could not be decoded."""
        return self._reader.replaced

    def news(self) -> list[Bad]:
        """The bad samples that this rank has met since the last call.

        Of a set in memory every rank has met the same: there only rank 0 speaks."""
        found = list(self._reader.quarantine.reasons)[self._told :]
        self._told += len(found)
        if self.rank and self._reader.cached:
            return []
        return [self._reader.quarantine.bad(sample) for sample in found]

    def batches(self, start: int, *, stop: Callable[[], bool] = lambda: False) -> Iterator[RawBatch]:
        """This rank's share of every global batch from position `start` (images seen) on; endless. stop: whether the
        run is to end; then whoever waits for a batch gets Interrupted. ValueError: the cache cannot hold two
        windows."""
        assert start >= 0
        if not self._reader.cached:
            allow_cache(self.index, self._config, self._window)
        return self._run(
            Training(self.order, start, self.batch, self.rank, self.world),
            here=lambda request: self.order.shards(int(request.position[0])),
            after=lambda request: self.order.following(int(request.position[0])),
            stop=stop,
        )

    def evaluation(self, batch: int) -> Generator[RawBatch, None, None]:
        """Each sample once over all ranks, in the order of the shards; `batch` images a global batch, the same number
        of batches on every rank, padding and bad samples with weight 0. Close it where it is left before its end."""
        _share(batch, self.world)

        def here(request: Request) -> NDArray[np.int64]:
            return np.unique(self.index.shard_of(request.sample))[: self._looks]

        return self._run(
            Evaluation(self.samples, batch, self.rank, self.world),
            here=here,
            after=lambda request: (here(request)[-1:] + 1) % len(self.index.shards),
        )

    def first(self, count: int) -> RawBatch:
        """The first `count` samples of the split (all, where it has fewer), the same on every rank: for pictures."""
        rows = np.arange(min(count, self.samples), dtype=np.int64)
        return self._reader.read(Request(rows, rows, np.ones(len(rows), np.float32)))

    def close(self) -> None:
        """Ends the readers; iterators of this stream are at their end."""
        self.index.close()  # first: a reader that waits for a shard from afar waits no longer
        for running in list(self._open):
            running.close()

    def _run(
        self,
        source: Training | Evaluation,
        *,
        here: Shards,
        after: Shards,
        stop: Callable[[], bool] = lambda: False,
    ) -> Generator[RawBatch, None, None]:
        def prepared(requests: Iterator[Request]) -> Iterator[Request]:
            """Tells the stores of the shards of a window, and of the next, when its first request passes."""
            known = np.empty(0, np.int64)
            for request in requests:
                if not self._reader.cached and not np.array_equal(shards := here(request), known):
                    known = shards
                    prepare(self.index, np.concatenate([shards, after(request)]))
                yield request

        running = self._timed(webdataset.DataPipeline(source, prepared, partial(self._reader, stop=stop)))
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

"""A split that is held in memory: decoded once, then one gather a batch."""

from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.fill import Fill, Filled
from trainer.data.index import Index
from trainer.data.modality import Modality
from trainer.data.opened import prepare
from trainer.data.quarantine import Quarantine

CHUNK = 1024  # samples that a thread decodes at a time
GROUP = 4  # shards that are open at a time, and as many are fetched ahead


class Memory:
    def __init__(self, index: Index, modality: Modality, fill: Fill, quarantine: Quarantine, *, readers: int) -> None:
        """Reads the whole split, by `readers` threads. Errors are those of `fill`."""
        self._data: NDArray[Any] = np.empty((index.samples, *modality.shape), modality.dtype)
        self._label = np.empty(index.samples, np.int64)
        every = np.arange(index.samples, dtype=np.int64)
        shards = np.arange(len(index.shards), dtype=np.int64)

        def some(low: int, high: int) -> None:
            part = slice(low, min(low + CHUNK, high))
            self._label[part] = fill(every[part], self._data[part]).label

        with ThreadPoolExecutor(readers, thread_name_prefix="decode") as pool:
            for first in range(0, len(shards), GROUP):  # a cache of the machine may hold a few shards, not all
                prepare(index, shards[first : first + 2 * GROUP])
                low, high = index.starts[[first, min(first + GROUP, len(shards))]].tolist()
                list(pool.map(some, range(low, high, CHUNK), repeat(high)))
                fill.close()
        # rows and labels of bad samples are of stand-ins already; their numbers are looked up, as all are known now
        self._sample = quarantine.stand_ins(every) if quarantine.reasons else None

    def __call__(self, samples: NDArray[np.int64], out: NDArray[Any]) -> Filled:
        """As `Fill`, from memory."""
        real = samples if self._sample is None else self._sample[samples]
        # the numbers are right: mode "clip" spares the copy that "raise" makes of `out`
        np.take(self._data, real, axis=0, out=out, mode="clip")
        return Filled(real, self._label[real])

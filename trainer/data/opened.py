"""Shards that are open: bytes of samples, by a read or out of a mapping."""

import mmap
import os
import threading
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from trainer.data import tar
from trainer.data.config import DataConfig
from trainer.data.index import Index
from trainer.data.store import OpenShard, is_folder

KEPT = 64
"""Shards of a split that are open at a time; each takes two descriptors where it is mapped."""


class Layout(NamedTuple):
    """Of the samples of a shard whose rows lie in it as they lie in memory."""

    size: int
    """Bytes of a member."""
    header: NDArray[np.uint8]
    """What each begins with."""
    members: NDArray[np.uint8]
    """(blocks, size): what begins at each block of the tar; the rows overlap."""
    block: NDArray[np.int64]
    """(samples of the shard,): at which block each begins; 0 for those that are not of this layout."""


class Opened:
    """An open shard. Threads may share it."""

    def __init__(self, index: Index, number: int, file: OpenShard) -> None:
        self.table = index.table(number)
        self.start = int(index.starts[number])
        """Number of its first sample in the split."""
        self.layout: Layout | None = None
        self.looked = False
        """Whether somebody has looked for a layout."""
        self.fd = file.fd
        self._file = file  # closes with its last reference
        self._bytes = index.shards[number].bytes

    def whole(self) -> bool:
        """Whether the file is still as long as it was: a mapping that reaches beyond its end would end the process."""
        return os.fstat(self.fd).st_size >= self._bytes

    def map(self, size: int) -> NDArray[np.uint8]:
        """(blocks, size): the bytes that begin at each block of the tar, read-only. Ask whether it is `whole` before
        each use."""
        whole = np.frombuffer(mmap.mmap(self.fd, self._bytes, access=mmap.ACCESS_READ), np.uint8)
        blocks = max(0, len(whole) - size) // tar.BLOCK + 1
        return as_strided(whole, shape=(blocks, size), strides=(tar.BLOCK, 1), writeable=False)


class OpenShards:
    """The shards used last. One that is dropped closes when the last thread that reads it lets it go."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._kept: OrderedDict[int, Opened] = OrderedDict()
        self._lock = threading.Lock()
        self._opening: list[int] = []

    def __call__(self, number: int) -> Opened:
        """Fetches the shard or waits for it where it is remote. Errors are the store's: they name it."""
        with self._lock:
            found = self._kept.get(number)
            if found is not None:
                self._kept.move_to_end(number)
                return found
        self._opening.append(number)
        try:
            file = self._index.store(number).open(self._index.shards[number])  # no lock: it may wait for a network
        finally:
            self._opening.remove(number)
        found = Opened(self._index, number, file)
        with self._lock:
            found = self._kept.setdefault(number, found)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return found

    def waiting(self) -> str:
        """For which shards the threads wait now, and what of them is there: for a message."""
        said = []
        for number in dict.fromkeys(self._opening.copy()):
            store, shard = self._index.store(number), self._index.shards[number]
            said.append(" ".join([f"{store.name}/{shard.name}", *([f"({p})"] if (p := store.progress(shard)) else [])]))
        return ", ".join(said) or "bytes of open shards"

    def close(self) -> None:
        with self._lock:
            self._kept.clear()


def allow_cache(index: Index, config: DataConfig, window: int) -> None:
    """ValueError where the cache is too small for two windows, of `window` shards of each set, from afar."""
    need = 0
    for part in index.parts:
        if not is_folder(part.path):
            need += sum(sorted((shard.bytes for shard in part.contents.shards), reverse=True)[: 2 * window])
    if need > config.remote.cache_gb * 1e9:
        raise ValueError(
            f"data.remote.cache_gb: {config.remote.cache_gb:g} cannot hold two windows of shards of "
            f"{index.store(0).name}, which may have {need / 1e9:.4g} GB; raise it, or lower data.window"
        )


def prepare(index: Index, shards: NDArray[np.int64]) -> None:
    """Tells the stores that these shards are read next; returns at once."""
    sets = np.searchsorted(np.cumsum(index.sets), shards, "right")
    for number in np.unique(sets).tolist():
        mine = shards[sets == number].tolist()
        index.store(mine[0]).prepare([index.shards[shard] for shard in mine])

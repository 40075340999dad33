"""Which sample stands at which position: a pure function of (seed, position), for ever.

Position p lies in epoch p // length. In each epoch the shards are permuted, cut into windows of `window` shards, and
the samples of a window are permuted. So every sample is seen once an epoch, few shards are open at a time, and going on
at any position costs one window. The permutation is our own (splitmix64 and a sort): numpy's may change between
versions (NEP 19).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_MASK = 0xFFFFFFFFFFFFFFFF
_SHARDS, _SAMPLES = 1, 2  # what is permuted


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64 (Steele, Lea and Flood 2014) of each element; wraps."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def derive(*key: int) -> int:
    """64 bits that depend on the key alone."""
    state = np.zeros(1, np.uint64)
    for part in key:
        state = mix(state ^ np.uint64(part & _MASK))
    return int(state[0])


def permutation(n: int, *key: int) -> NDArray[np.int64]:
    """A permutation of 0..n-1 that depends on the key alone."""
    with np.errstate(over="ignore"):
        # no two are equal, since splitmix64 maps one to one: any sort gives this permutation, so the fastest may
        return np.argsort(mix(np.arange(n, dtype=np.uint64) + np.uint64(derive(*key))))


class _Epoch(NamedTuple):
    number: int
    shards: NDArray[np.int64]
    """Permuted; window w holds the w-th `width` of them."""
    ends: NDArray[np.int64]
    """The position in the epoch at which each window ends."""


class Order:
    """`take(start, count)` gives sample numbers 0..N-1 (in the order of the shards) at positions
    start..start+count-1."""

    def __init__(
        self, sizes: Sequence[int] | NDArray[np.int64], *, seed: int, window: int | None, batch: int | None = None
    ) -> None:
        """sizes: samples of each shard, all at least 1. window: shards whose samples are mixed, at least 1; None for
        all. A window is ordered as a whole, which takes some 30 bytes a sample of it.

        batch: an epoch ends with the last whole batch, and what is left of its order is dropped; another epoch drops
        others. None: the tail is carried into the batch that the next epoch fills. ValueError where a batch is larger
        than an epoch.
        """
        self.sizes = np.asarray(sizes, np.int64)
        assert len(self.sizes) and self.sizes.min() > 0 and (window is None or window > 0)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.samples = int(self.sizes.sum())
        self.length = self.samples if batch is None else self.samples // batch * batch
        """Positions of an epoch."""
        if not self.length:
            raise ValueError(
                f"data.tail: drop leaves nothing of {self.samples:,} samples, as a batch is {batch:,}; "
                "take a smaller batch, or tail: carry"
            )
        self.seed, self.width = seed, min(window or len(self.sizes), len(self.sizes))
        self._epochs: tuple[_Epoch, ...] = ()
        self._window: tuple[int, int, NDArray[np.int64]] | None = None

    def take(self, start: int, count: int) -> NDArray[np.int64]:
        """int64 (count,), the caller's own; crosses windows and epochs."""
        taken = np.empty(count, np.int64)
        filled = 0
        while filled < count:
            epoch, at = divmod(start + filled, self.length)
            number = self._number(epoch, at)
            rows = self._samples(epoch, number)
            skip = at - (int(self._epoch(epoch).ends[number]) - len(rows))
            part = rows[skip : skip + min(count - filled, self.length - at)]
            taken[filled : filled + len(part)] = part
            filled += len(part)
        return taken

    def shards(self, start: int) -> NDArray[np.int64]:
        """Numbers of the shards of the window that holds position `start`."""
        epoch, at = divmod(start, self.length)
        return self._shards(epoch, self._number(epoch, at))

    def following(self, start: int) -> NDArray[np.int64]:
        """Numbers of the shards of the window after that of position `start`, which may be the next epoch's first."""
        epoch, at = divmod(start, self.length)
        number = self._number(epoch, at)
        last = int(self._epoch(epoch).ends[number]) >= self.length
        return self._shards(epoch + 1, 0) if last else self._shards(epoch, number + 1)

    def _epoch(self, number: int) -> _Epoch:
        """Two are kept, as whoever reads ahead asks for this and the next in turns. Threads may ask at once: what is
        kept is replaced as a whole."""
        for epoch in self._epochs:
            if epoch.number == number:
                return epoch
        shards = permutation(len(self.sizes), self.seed, number, _SHARDS)
        ends = np.cumsum(np.add.reduceat(self.sizes[shards], np.arange(0, len(shards), self.width)))
        epoch = _Epoch(number, shards, ends)
        self._epochs = (*self._epochs[-1:], epoch)
        return epoch

    def _number(self, epoch: int, at: int) -> int:
        """The window that holds position `at` of an epoch."""
        return int(np.searchsorted(self._epoch(epoch).ends, at, "right"))

    def _shards(self, epoch: int, number: int) -> NDArray[np.int64]:
        return self._epoch(epoch).shards[number * self.width : (number + 1) * self.width]

    def _samples(self, epoch: int, number: int) -> NDArray[np.int64]:
        """The samples of a window, permuted; the last one asked for is kept."""
        kept = self._window
        if kept is not None and kept[:2] == (epoch, number):
            return kept[2]
        shards = self._shards(epoch, number)
        sizes = self.sizes[shards]
        shift = self.starts[shards] - (np.cumsum(sizes) - sizes)  # from a place in the window to a sample's number
        places = permutation(int(sizes.sum()), self.seed, epoch, _SAMPLES, number)
        rows = np.repeat(shift, sizes)[places] + places
        self._window = (epoch, number, rows)
        return rows

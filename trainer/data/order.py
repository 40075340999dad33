"""Which sample stands at which position: a pure function of (seed, position), for ever.

Position p lies in epoch p // N. In each epoch the shards are permuted, cut into windows of `window` shards, and the
samples of a window are permuted. So every sample is seen once an epoch, few shards are open at a time, and going on at
any position costs one window. The permutation is our own (splitmix64 and a stable sort): numpy's may change between
versions (NEP 19).
"""

from collections.abc import Sequence

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


def permutation(n: int, *key: int) -> NDArray[np.int64]:
    """A permutation of 0..n-1 that depends on the key alone."""
    state = np.zeros(1, np.uint64)
    for part in key:
        state = mix(state ^ np.uint64(part & _MASK))
    with np.errstate(over="ignore"):
        return np.argsort(mix(np.arange(n, dtype=np.uint64) + state), kind="stable")


class Order:
    """`take(start, count)` gives sample numbers 0..N-1 (in the order of the shards) at positions
    start..start+count-1."""

    def __init__(self, sizes: Sequence[int], *, seed: int, window: int) -> None:
        """sizes: samples of each shard, all at least 1. window: shards whose samples are mixed, at least 1."""
        assert len(sizes) and min(sizes) > 0 and window > 0
        self.sizes = np.asarray(sizes, np.int64)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.samples = int(self.sizes.sum())
        self.seed, self.width = seed, window
        self._epoch: tuple[int, list[NDArray[np.int64]], NDArray[np.int64]] | None = None
        self._window: tuple[int, int, NDArray[np.int64]] | None = None

    def take(self, start: int, count: int) -> NDArray[np.int64]:
        """int64 (count,); crosses windows and epochs."""
        parts: list[NDArray[np.int64]] = []
        while count > 0:
            epoch, at = divmod(start, self.samples)
            _, ends = self._windows(epoch)
            number = int(np.searchsorted(ends, at, "right"))
            whole = self._samples(epoch, number)
            at -= int(ends[number]) - len(whole)
            part = whole[at : at + count]
            parts.append(part)
            start += len(part)
            count -= len(part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty(0, np.int64)])

    def shards(self, start: int) -> NDArray[np.int64]:
        """Numbers of the shards of the window that holds position `start`."""
        epoch, at = divmod(start, self.samples)
        windows, ends = self._windows(epoch)
        return windows[int(np.searchsorted(ends, at, "right"))]

    def _windows(self, epoch: int) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
        """The shards of each window, and the position in the epoch at which it ends."""
        if self._epoch is None or self._epoch[0] != epoch:
            shards = permutation(len(self.sizes), self.seed, epoch, _SHARDS)
            windows = [shards[i : i + self.width] for i in range(0, len(shards), self.width)]
            ends = np.cumsum([self.sizes[window].sum() for window in windows], dtype=np.int64)
            self._epoch = (epoch, windows, ends)
        return self._epoch[1:]

    def _samples(self, epoch: int, number: int) -> NDArray[np.int64]:
        """The samples of a window, permuted; the last one asked for is kept."""
        if self._window is None or self._window[:2] != (epoch, number):
            shards = self._windows(epoch)[0][number]
            rows = np.concatenate([np.arange(self.starts[s], self.starts[s] + self.sizes[s]) for s in shards])
            self._window = (epoch, number, rows[permutation(len(rows), self.seed, epoch, _SAMPLES, number)])
        return self._window[2]

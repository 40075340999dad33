"""Samples that cannot be decoded, and what stands in for them."""

import threading
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.data.index import Index


class Bad(NamedTuple):
    """A sample that cannot be decoded."""

    sample: int
    """Its number in the split."""
    shard: str
    """Path or redacted URL."""
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}: {self.key}: {self.reason}; the next good sample stands in"


class Quarantine:
    """Whether a sample is bad depends on its bytes alone, and its stand-in is the next good sample of the split, the
    first after the last: so every rank, world size and resumed run replaces it by the same. Threads may share it."""

    def __init__(self, index: Index, max_bad_fraction: float) -> None:
        self.reasons: dict[int, str] = {}
        """Number of each sample that was found bad: why."""
        self._index, self._share = index, max_bad_fraction
        allowed = max(1, int(max_bad_fraction * index.samples)) if max_bad_fraction else 0
        self.allowed: int = min(allowed, index.samples - 1)
        """Bad samples that a run may meet."""
        self._lock = threading.Lock()

    def add(self, sample: int, reason: str) -> None:
        """ValueError where that is one more than the config allows. It is not noted then, so that there always is a
        good sample to look for."""
        with self._lock:
            if sample in self.reasons:
                return
            if len(self.reasons) < self.allowed:
                self.reasons[sample] = reason
                return
        raise ValueError(f"{self._index.where(sample)}: {reason}; {self.too_many(len(self.reasons) + 1)}")

    def too_many(self, count: int) -> str:
        """What is wrong with `count` bad samples, more than are allowed."""
        return (
            f"{count:,} of {self._index.samples:,} samples are bad, more than data.max_bad_fraction {self._share:g} "
            "allows; make the set again, or raise it"
        )

    def stand_in(self, sample: int) -> int:
        """The next sample that is not known to be bad; itself where it is not."""
        while sample in self.reasons:
            sample = (sample + 1) % self._index.samples
        return sample

    def stand_ins(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """`stand_in` of each, as a copy."""
        found: NDArray[np.int64] = samples.copy()
        if self.reasons:
            for at in np.flatnonzero(np.isin(samples, list(self.reasons))).tolist():
                found[at] = self.stand_in(int(samples[at]))
        return found

    def bad(self, sample: int) -> Bad:
        """What is known of a bad sample."""
        number = int(self._index.shard_of(np.array([sample], np.int64))[0])
        shard = f"{self._index.store(number).name}/{self._index.shards[number].name}"
        return Bad(sample, shard, self._index.where(sample).removeprefix(f"{shard}: "), self.reasons[sample])

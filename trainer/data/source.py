"""What comes next: the first stage of a webdataset pipeline. Which samples a rank reads is decided here, from
integers only."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.data.mixture import Mixture
from trainer.data.order import Order


class Request(NamedTuple):
    """The samples of one batch of one rank."""

    position: NDArray[np.int64]
    sample: NDArray[np.int64]
    weight: NDArray[np.float32] | None
    """None: 1 for all."""


@dataclass(frozen=True)
class Training:
    """Endless. Global batch k holds positions start + k * batch ... + batch - 1; rank r reads the r-th of `world` equal
    parts of it. So the global batches are the same for any world size and from any start."""

    order: Order | Mixture
    start: int
    """Images seen."""
    batch: int
    """Images of a global batch."""
    rank: int
    world: int

    def __call__(self) -> Iterator[Request]:
        share = self.batch // self.world
        position = self.start + self.rank * share
        steps = np.arange(share, dtype=np.int64)
        while True:
            yield Request(position + steps, self.order.take(position, share), None)
            position += self.batch


@dataclass(frozen=True)
class Evaluation:
    """Each sample once over all ranks, in the order of the shards; the last global batch is padded with weight 0, so
    that every rank takes part in the same number of batches."""

    samples: int
    batch: int
    rank: int
    world: int

    def __call__(self) -> Iterator[Request]:
        share = self.batch // self.world
        steps = np.arange(share, dtype=np.int64)
        for start in range(0, self.samples, self.batch):
            position = start + self.rank * share + steps
            weight = (position < self.samples).astype(np.float32)
            yield Request(position, position % self.samples, weight)

"""Several sets as one order, by weights. Which set stands at a position is a pure function of (seed, position) too.

Positions are cut into blocks. Each block holds the same number of positions of each set, as near to its weight as a
block allows, in an order of its own. The n-th position of a set in all takes position n of the set's own order, so each
set goes through epochs of its own, each complete, and the state of the whole is still one integer.
"""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from trainer.data.config import DataConfig
from trainer.data.index import Index
from trainer.data.order import Order, derive, permutation

BLOCK = 4096
"""Positions of a block."""
_SETS, _PLACES = 3, 4  # what a key is for; 1 and 2 are the order's


def counts(weights: Sequence[float]) -> list[int]:
    """Positions of each set in a block: BLOCK times its share of the weights, rounded by largest remainder; equal
    remainders go by the order of the sets. ValueError where a set would get none."""
    exact = [Fraction(weight) for weight in weights]  # sums of floats depend on Python's version
    assert exact and min(exact) > 0
    shares = [BLOCK * weight / sum(exact) for weight in exact]
    found = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda number: found[number] - shares[number])
    for number in by_remainder[: BLOCK - sum(found)]:
        found[number] += 1
    for number, count in enumerate(found):
        if not count:
            raise ValueError(
                f"data.sets[{number}].weight: {weights[number]:g} of {float(sum(exact)):g} in all is less than one "
                f"image in {BLOCK:,}; raise it, or leave the set out"
            )
    return found


class Mixture:
    """An `Order` over several sets. Sample and shard numbers count through the sets, as in their joined index."""

    def __init__(self, orders: Sequence[Order], weights: Sequence[float], *, seed: int) -> None:
        assert len(orders) == len(weights)
        self.orders = tuple(orders)
        self.counts = np.array(counts(weights), np.int64)
        self.samples = sum(order.samples for order in orders)
        self.length = self.samples
        """Positions that count as an epoch: as many as all sets hold samples. Each set has epochs of its own."""
        self.seed = seed
        self._bases = np.cumsum([0, *(order.samples for order in orders)], dtype=np.int64)
        self._shard_bases = np.cumsum([0, *(len(order.sizes) for order in orders)], dtype=np.int64)
        self._kept: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None

    def take(self, start: int, count: int) -> NDArray[np.int64]:
        """int64 (count,), the caller's own."""
        if count <= 0:
            return np.empty(0, np.int64)
        first = start // BLOCK
        blocks = [self._block(block) for block in range(first, (start + count - 1) // BLOCK + 1)]
        part = slice(start - first * BLOCK, start - first * BLOCK + count)
        sets, draws = (np.concatenate(column)[part] for column in zip(*blocks, strict=True))
        taken = np.empty(count, np.int64)
        for number in np.unique(sets).tolist():
            mine = sets == number
            draw = int(draws[np.argmax(mine)])  # the others follow it without a gap
            taken[mine] = self._bases[number] + self.orders[number].take(draw, int(mine.sum()))
        return taken

    def shards(self, start: int) -> NDArray[np.int64]:
        """Numbers of the shards of the windows, one of each set, that are in use at position `start`."""
        return self._joined([order.shards(draw) for order, draw in zip(self.orders, self._draws(start), strict=True)])

    def following(self, start: int) -> NDArray[np.int64]:
        """Numbers of the shards of the windows after those."""
        found = [order.following(draw) for order, draw in zip(self.orders, self._draws(start), strict=True)]
        return self._joined(found)

    def _joined(self, shards: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
        return np.concatenate([base + part for base, part in zip(self._shard_bases[:-1], shards, strict=True)])

    def _draws(self, start: int) -> list[int]:
        """The position of each set's own order that comes next at `start`."""
        block, at = divmod(start, BLOCK)
        before = np.bincount(self._block(block)[0][:at], minlength=len(self.orders))
        return [int(draw) for draw in block * self.counts + before]

    def _block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The set of each position of a block, and the position in that set's own order; the last one is kept."""
        kept = self._kept
        if kept is not None and kept[0] == block:
            return kept[1:]
        numbers = np.repeat(np.arange(len(self.orders)), self.counts)
        sets = numbers[permutation(BLOCK, self.seed, block, _PLACES)]
        draws = np.empty(BLOCK, np.int64)
        firsts = np.cumsum(self.counts) - self.counts
        draws[np.argsort(sets, kind="stable")] = np.arange(BLOCK) + (block * self.counts - firsts)[numbers]
        self._kept = (block, sets, draws)
        return sets, draws


def order_of(index: Index, config: DataConfig, *, seed: int, batch: int) -> Order | Mixture:
    """The order of a split as its config asks for it. batch: images of a global batch, which `tail: drop` needs.

    ValueError: `tail: drop` of less than a batch or of a mixture, a weight that is too small.
    """
    sizes = np.diff(index.starts)
    window = None if config.window == "all" else config.window
    if len(config.sets) == 1:
        return Order(sizes, seed=seed, window=window, batch=batch if config.tail == "drop" else None)
    if config.tail == "drop":
        raise ValueError(
            "data.tail: drop does not go with a mixture, as each of its sets ends its epochs at a place of its own; "
            "take tail: carry"
        )
    orders = [
        Order(part, seed=derive(seed, _SETS, number), window=window)
        for number, part in enumerate(np.split(sizes, np.cumsum(index.sets)[:-1]))
    ]
    return Mixture(orders, [one.weight for one in config.sets], seed=seed)

"""The order of samples in plain Python, slow and plainly right: what trainer.data.order and mixture are held against.

It shares no line with them and uses no numpy; see trainer/data/order.py for what it spells out.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import count

WRAP = 2**64
SHARDS, SAMPLES, SETS, PLACES = 1, 2, 3, 4
BLOCK = 4096


def splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) % WRAP
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % WRAP
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % WRAP
    return x ^ (x >> 31)


def derived(*key: int) -> int:
    state = 0
    for part in key:
        state = splitmix64(state ^ (part % WRAP))
    return state


def shuffled(items: Sequence[int], *key: int) -> list[int]:
    state = derived(*key)
    places = sorted(range(len(items)), key=lambda place: splitmix64((place + state) % WRAP))
    return [items[place] for place in places]


def epoch_of(sizes: Sequence[int], *, seed: int, window: int, epoch: int) -> list[int]:
    """All samples of the shards, in the order of one epoch."""
    shards, first = [], 0
    for size in sizes:
        shards.append(range(first, first + size))
        first += size
    numbers = shuffled(range(len(sizes)), seed, epoch, SHARDS)
    found: list[int] = []
    for begin in range(0, len(numbers), window):
        samples = [sample for shard in numbers[begin : begin + window] for sample in shards[shard]]
        found += shuffled(samples, seed, epoch, SAMPLES, begin // window)
    return found


def order(sizes: Sequence[int], *, seed: int, window: int, batch: int | None = None) -> Iterator[int]:
    """The sample at position 0, 1, 2 ... without end. batch: what it does not divide of an epoch is dropped."""
    for epoch in count():
        whole = epoch_of(sizes, seed=seed, window=window, epoch=epoch)
        yield from whole if batch is None else whole[: len(whole) // batch * batch]


def parts(weights: Sequence[float]) -> list[int]:
    """Positions of each set in a block: those whose remainders are largest get one more, the earlier set of equals."""
    total = sum(Fraction(weight) for weight in weights)
    shares = [Fraction(weight) / total * BLOCK for weight in weights]
    whole = [share.numerator // share.denominator for share in shares]
    while sum(whole) < BLOCK:
        left = [share - part for share, part in zip(shares, whole, strict=True)]
        whole[left.index(max(left))] += 1
    return whole


def mixture(
    orders: Sequence[Iterator[int]], bases: Sequence[int], weights: Sequence[float], *, seed: int
) -> Iterator[int]:
    """The sample at position 0, 1, 2 ... of several sets; bases: the number of each set's first sample."""
    in_block = [number for number, part in enumerate(parts(weights)) for _ in range(part)]
    for block in count():
        for number in shuffled(in_block, seed, block, PLACES):
            yield bases[number] + next(orders[number])

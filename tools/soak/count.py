"""What a soak comes to: samples lost, doubled and out of place in what its processes wrote down."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

NOTHING = -1
"""Stands where a rank wrote nothing down."""


class Count(NamedTuple):
    lost: int
    """Samples that were given less often than they are in the order."""
    doubled: int
    """Samples that were given more often."""
    misplaced: int
    """Positions with another sample than the order has there."""

    def __str__(self) -> str:
        return f"{self.lost:,} lost, {self.doubled:,} doubled, {self.misplaced:,} out of place"


class Part(NamedTuple):
    """What one start added: positions start to until - 1, by `world` ranks."""

    start: int
    until: int
    world: int
    log: Callable[[int], Path]
    """The file of a rank."""


def consumed(parts: Iterable[Part], *, batch: int) -> list[int]:
    """The sample numbers that counted, in the order of their positions: of each start what lies before its last commit;
    the work after that was lost with the start, and the next one did it again."""
    found: list[int] = []
    for part in parts:
        share = batch // part.world
        columns = []
        for rank in range(part.world):
            wanted = (part.until - part.start) // part.world
            numbers = np.full(wanted, NOTHING, np.int64)
            if wanted:
                written = np.fromfile(part.log(rank), "<i8")[:wanted]
                numbers[: len(written)] = written
            columns.append(numbers.reshape(-1, share))
        found += np.concatenate(columns, axis=1).reshape(-1).tolist()  # a global batch: the ranks' shares in turn
    return found


def count(found: Sequence[int], expected: Sequence[int]) -> Count:
    have, want = Counter(found), Counter(expected)
    del have[NOTHING]
    places = sum(a != b for a, b in zip(found, expected, strict=False))
    return Count((want - have).total(), (have - want).total(), places + abs(len(found) - len(expected)))

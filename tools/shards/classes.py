"""How many samples each class has, and whether they lie in order in the shards; from the index alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.data.index import Index
from trainer.data.order import mix

RUN = 256
"""Samples in a row whose classes are compared with those of the whole split: a large batch."""
SORTED = 2.0
"""chi2 a degree of freedom, above which the order is told; 1 is a perfect shuffle."""


@dataclass(frozen=True)
class Balance:
    counts: NDArray[np.int64]
    """(classes): samples of each."""
    unlabelled: int
    order: float | None
    """chi2 a degree of freedom of the classes of runs of RUN samples, in the order of the shards; None: too few."""


def common(splits: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The classes of all splits of a set: a number must mean the same in each. ValueError names a split where it does
    not."""
    longest = max(splits.values(), key=len)
    for split, classes in splits.items():
        if tuple(classes) != tuple(longest[: len(classes)]):
            raise ValueError(f"{split}: has other classes than the other splits; run `tandem data index` on the set")
    return tuple(longest)


def balance(index: Index) -> Balance:
    """One pass over the tables of the shards."""
    classes = len(index.classes)
    counts = np.zeros(classes, np.int64)
    in_runs, squares = np.zeros(classes, np.int64), np.zeros(classes, np.float64)
    unlabelled, runs = 0, 0
    rest = np.empty(0, np.int64)
    for shard in range(len(index.shards)):
        label = index.table(shard)["label"].astype(np.int64)
        unlabelled += int((label < 0).sum())
        label = np.concatenate([rest, label[label >= 0]])
        counts += np.bincount(label[len(rest) :], minlength=classes)
        whole = len(label) // RUN
        rest = label[whole * RUN :]
        for run in label[: whole * RUN].reshape(whole, RUN):
            found = np.bincount(run, minlength=classes)
            in_runs += found
            squares += found.astype(np.float64) ** 2
        runs += whole
    return Balance(counts, unlabelled, _order(in_runs, squares, runs))


def _order(counts: NDArray[np.int64], squares: NDArray[np.float64], runs: int) -> float | None:
    """Pearson's chi2 of the table (runs, classes) over its degrees of freedom; squares: sum of the squared counts of
    the runs."""
    present = counts > 0
    freedom = (runs - 1) * (int(present.sum()) - 1)
    if runs < 2 or freedom < 1:
        return None
    expected = counts[present] / runs
    return float((squares[present] / expected).sum() - runs * RUN) / freedom


def some(index: Index, *, each: int, seed: int) -> NDArray[np.int64]:
    """Up to `each` samples of each class (-1, those without, is one too), drawn by the seed; ordered by class."""
    salt = mix(np.array([seed], np.int64).view(np.uint64))
    kept = np.empty((0, 2), np.int64)  # class, sample
    for shard in range(len(index.shards)):
        label = index.table(shard)["label"].astype(np.int64)
        samples = np.arange(index.starts[shard], index.starts[shard + 1])
        kept = np.concatenate([kept, np.stack([label, samples], axis=1)])
        order = np.lexsort((mix(kept[:, 1].astype(np.uint64) ^ salt), kept[:, 0]))
        kept = kept[order]
        first = np.searchsorted(kept[:, 0], kept[:, 0])  # place of the first of the class
        kept = kept[np.arange(len(kept)) - first < each]
    return kept[:, 1]

"""What a split holds: its shards, and where each sample lies in them.

    DEST/train/index.json            classes, image sizes, shards with samples, bytes and sha256 (contents.py)
    DEST/train/train-00000.idx.npy   a row a sample of the shard beside it (table.py)
    DEST/train/train-00000.tar ...

Shards that others made have no index: `load` then scans them once (part.py, build.py).
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data import contents, joined, tar
from trainer.data.config import DataConfig
from trainer.data.part import UNFINISHED, Part, open_part
from trainer.data.scan import LABEL_FIELD
from trainer.data.store import Store
from trainer.data.table import ROW, Rows, Shard, Span, Tables

__all__ = ["LABEL_FIELD", "ROW", "UNFINISHED", "Index", "Rows", "Shard", "Span", "load"]


class Index:
    """A split of one set, or of several, one after the other: the same in every way but `sets`."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self.shards: tuple[Shard, ...] = tuple(shard for part in parts for shard in part.contents.shards)
        self.sets: tuple[int, ...] = tuple(len(part.contents.shards) for part in parts)
        """Shards of each set."""
        self.set_samples: tuple[int, ...] = tuple(part.contents.samples for part in parts)
        self.samples: int = sum(self.set_samples)
        counts = np.fromiter((shard.samples for shard in self.shards), np.int64, len(self.shards))
        self.starts: NDArray[np.int64] = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        """(shards + 1): the number of each shard's first sample."""
        self._joined = joined.join([part.path for part in parts], [part.contents for part in parts])
        self.classes: tuple[str, ...] = self._joined.classes
        self.fields: tuple[str, ...] = self._joined.fields
        """Image fields; `field` of a row is a number into it."""
        self.height, self.width, self.channels = self._joined.spans
        self._first = np.cumsum([0, *self.sets])  # shard of each set
        self._tables = Tables(self._read)

    @property
    def report(self) -> Mapping[str, Any]:
        """Of the maker; of several sets, by their names."""
        if len(self.parts) == 1:
            return self.parts[0].contents.report
        return {part.path: part.contents.report for part in self.parts}

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the shards' names, sizes and digests, and of the fields that were chosen where any were: two splits
        with one fingerprint give the same stream."""
        digests = []
        for part in self.parts:
            rows: list[Any] = [list(shard[:4]) for shard in part.contents.shards]
            if dict(part.contents.reading) != contents.AS_MADE:
                rows.append(part.contents.reading)
            digests.append(hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest())
        return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()

    def shard_of(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,) numbers of samples in the split to (n,) numbers of their shards."""
        return np.searchsorted(self.starts, samples, "right") - 1

    def table(self, shard: int) -> Rows:
        """The rows of a shard's samples, read-only; loaded and verified when first asked for, kept while memory lasts.
        ValueError, OSError: missing, damaged."""
        return self._tables(shard)

    def rows(self, samples: NDArray[np.int64]) -> Rows:
        """(n,) ROW of any samples of the split, in their order; a copy."""
        out = np.empty(len(samples), ROW)
        shard = self.shard_of(samples)
        order = np.argsort(shard, kind="stable")
        bounds = np.flatnonzero(np.diff(shard[order], prepend=-1, append=-1))
        for low, high in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            here = order[low:high]
            number = int(shard[here[0]])
            out[here] = self.table(number)[samples[here] - self.starts[number]]
        return out

    def store(self, shard: int) -> Store:
        """Which source holds a shard."""
        return self.parts[self._part(shard)].store

    def where(self, sample: int) -> str:
        """Shard and key of a sample, for a message; reads its header, and says its number where that cannot be."""
        shard = int(self.shard_of(np.array([sample], np.int64))[0])
        name = f"{self.store(shard).name}/{self.shards[shard].name}"
        number = sample - int(self.starts[shard])
        try:
            begin = int(self.table(shard)[number]["begin"])
            opened = self.store(shard).open(self.shards[shard])
            members = tar.members(
                lambda at, length: os.pread(opened.fd, length, begin + at), name, total=opened.bytes - begin
            )
            return f"{name}: {tar.shown(next(members).key)}"
        except (OSError, ValueError, tar.ShardCut, StopIteration):
            return f"{name}: sample {number}"

    def close(self) -> None:
        """Ends the stores' threads."""
        for part in self.parts:
            part.store.close()

    def _part(self, shard: int) -> int:
        return int(np.searchsorted(self._first, shard, "right")) - 1

    def _read(self, shard: int) -> Rows:
        number = self._part(shard)
        part, numbers, line = self.parts[number], self._joined.numbers[number], self.shards[shard]
        rows = part.table(line)
        if len(self.parts) > 1:
            rows = rows.copy()
            rows["label"] = numbers.label[rows["label"]]
            rows["field"] = numbers.field[rows["field"]]
            rows.flags.writeable = False
        return rows


def load(config: DataConfig, split: str) -> Index:
    """The index of a split of all sets of the config; those without one are scanned, once.

    ValueError says what is missing, damaged, cut short or changed, and what to do.
    """
    return Index([open_part(config, one.path, split) for one in config.sets])

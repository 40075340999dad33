"""Samples to rows of a batch: look up, read, decode in place."""

import itertools
import os
import threading
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.data import tar
from trainer.data.convert import Undecodable
from trainer.data.index import Index
from trainer.data.modality import Modality, Row
from trainer.data.opened import Layout, Opened, OpenShards
from trainer.data.quarantine import Quarantine
from trainer.data.table import Rows

GAP = 4096  # bytes between two samples up to which both come with one read: headers, a class, a short text
REACH = 20  # bits of such a read: none crosses a border of 1 MiB
GATHERED = 1 << 20  # bytes that are gathered at a time, so that they stay in the processor's cache


class Stopped(Exception):
    """Whoever wanted the batch is gone."""


class Filled(NamedTuple):
    sample: NDArray[np.int64]
    """(n,): what really stands in the rows; differs from what was asked for where that is bad."""
    label: NDArray[np.int64]
    """(n,)."""


class _Plan(NamedTuple):
    """Samples in the order of the bytes on the disk, and the rows of the batch that they go to."""

    sample: NDArray[np.int64]
    shard: NDArray[np.int64]
    row: Rows
    place: NDArray[np.int64]

    def part(self, which: NDArray[np.int64]) -> "_Plan":
        return _Plan(self.sample[which], self.shard[which], self.row[which], self.place[which])


class Fill:
    """`fill(samples, out)` decodes samples into the rows of `out`. Threads may share it."""

    def __init__(self, index: Index, modality: Modality, quarantine: Quarantine) -> None:
        self._index, self._modality, self._quarantine = index, modality, quarantine
        self._kinds = [field.rpartition(".")[2].lower() for field in index.fields]
        self._plain = np.array([kind in modality.plain_kinds for kind in self._kinds], bool)
        self._open = OpenShards(index)

    def __call__(self, samples: NDArray[np.int64], out: Row, stop: threading.Event | None = None) -> Filled:
        """samples: int64 (n,). out: (n, *shape), contiguous. Bad samples are noted in the quarantine and replaced.

        ValueError and OSError name the shard, and the key where it is known. Stopped: `stop` was set meanwhile.
        """
        real = self._quarantine.stand_ins(samples)
        place = np.argsort(real, kind="stable")
        found = real[place]
        plan = _Plan(found, self._index.shard_of(found), self._index.rows(found), place)
        label = np.empty(len(real), np.int64)
        label[place] = plan.row["label"]
        if self._plain[plan.row["field"]].any():
            plan = plan.part(self._copy(plan, out))
        for at in self._decode(plan, out, stop):
            real[at], label[at] = self._stand_in(int(real[at]), out[at])
        return Filled(real, label)

    def close(self) -> None:
        """Lets go of the open shards."""
        self._open.close()

    def _decode(self, plan: _Plan, out: Row, stop: threading.Event | None) -> list[int]:
        """Reads and decodes one by one; returns the rows of bad samples. Here goes the time of a stream: plain lists,
        and as few calls a sample as can be."""
        decode, kinds = self._modality.decode, self._kinds
        offset, size, field = (plan.row[name].tolist() for name in ("offset", "size", "field"))
        sample, shard, place = plan.sample.tolist(), plan.shard.tolist(), plan.place.tolist()
        bad: list[int] = []
        opened: Opened | None = None
        first = 0
        for last in _ends(plan):
            if stop is not None and stop.is_set():
                raise Stopped
            if opened is None or opened.number != shard[first]:
                opened = self._open(shard[first])
            begin = offset[first]
            chunk = self._read(opened, begin, offset[last - 1] + size[last - 1] - begin, sample[first])
            for i in range(first, last):
                at = offset[i] - begin
                data = chunk if last - first == 1 else chunk[at : at + size[i]]
                try:
                    decode(data, kinds[field[i]], out[place[i]])
                except Undecodable as error:
                    self._quarantine.add(sample[i], str(error))
                    bad.append(place[i])
                except Exception as error:
                    raise RuntimeError(f"{self._index.where(sample[i])}: {error or type(error).__name__}") from error
            first = last
        return bad

    def _stand_in(self, sample: int, row: Row) -> tuple[int, int]:
        """Decodes the next good sample after a bad one; returns its number and its label."""
        while True:
            sample = self._quarantine.stand_in(sample)
            number = np.array([sample], np.int64)
            plan = _Plan(number, self._index.shard_of(number), self._index.rows(number), np.zeros(1, np.int64))
            if not self._decode(plan, row[None], None):
                return sample, int(plan.row["label"][0])

    def _read(self, opened: Opened, offset: int, size: int, sample: int) -> bytes:
        try:
            data = os.pread(opened.fd, size, offset)
        except OSError as error:
            raise OSError(f"{self._index.where(sample)}: {error}") from error
        if len(data) != size:
            raise self._cut(sample)
        return data

    def _cut(self, sample: int) -> ValueError:
        return ValueError(f"{self._index.where(sample)}: the shard was cut short while it was read; copy it again")

    def _copy(self, plan: _Plan, out: Row) -> NDArray[np.int64]:
        """Copies samples whose rows lie in the shards as they are, all of a shard at once, out of its mapping; returns
        which are left."""
        rows = out.view(np.uint8).reshape(len(out), -1)
        done = np.zeros(len(plan.row), bool)
        bounds = [0, *(np.flatnonzero(plan.shard[1:] != plan.shard[:-1]) + 1).tolist(), len(done)]
        for first, last in itertools.pairwise(bounds):
            part = plan.row[first:last]
            plain = np.flatnonzero(self._plain[part["field"]])
            if not len(plain):
                continue
            opened = self._open(int(plan.shard[first]))
            layout = self._layout(opened, part[plain[0]], int(plan.sample[first + plain[0]]))
            if layout is None:
                continue
            if not opened.whole():
                raise self._cut(int(plan.sample[first]))
            same = (part["size"] == layout.size) & (part["field"] == layout.field) & (part["offset"] % tar.BLOCK == 0)
            which = first + np.flatnonzero(same)
            step = max(1, GATHERED // layout.size)
            for some in (which[i : i + step] for i in range(0, len(which), step)):
                members = layout.members[plan.row["offset"][some] // tar.BLOCK]
                equal = (members[:, : len(layout.header)] == layout.header).all(axis=1)
                done[some] = equal
                if not equal.all():
                    members, some = members[equal], some[equal]  # noqa: PLW2901
                rows[plan.place[some]] = members[:, len(layout.header) :]
        return np.flatnonzero(~done)

    def _layout(self, opened: Opened, row: np.void, sample: int) -> Layout | None:
        """How the rows of a shard lie in it, judged by the first sample that is asked for; None where they do not."""
        if not opened.looked:
            data = self._read(opened, int(row["offset"]), int(row["size"]), sample)
            header = self._modality.plain(data, self._kinds[row["field"]])
            if header is not None:
                start = np.frombuffer(data[:header], np.uint8)
                opened.layout = Layout(int(row["field"]), len(data), start, opened.map(len(data)))
            opened.looked = True
        return opened.layout


def _ends(plan: _Plan) -> list[int]:
    """Where each read ends: samples that all but touch each other come with one."""
    offset, shard = plan.row["offset"], plan.shard
    gap = offset[1:] - (offset[:-1] + plan.row["size"][:-1])
    apart = (shard[1:] != shard[:-1]) | (gap < 0) | (gap > GAP) | (offset[1:] >> REACH != offset[:-1] >> REACH)
    return [*(np.flatnonzero(apart) + 1).tolist(), len(offset)] if len(offset) else []

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
        label = np.empty(len(real), np.int64)
        order = real.argsort(kind="stable")  # that of the bytes on the disk
        found = real[order]
        shards = self._index.shard_of(found)
        bounds = [0, *((shards[1:] != shards[:-1]).nonzero()[0] + 1).tolist(), len(found)]
        for first, last in itertools.pairwise(bounds):
            opened = self._open(int(shards[first]))
            number, place = found[first:last] - opened.start, order[first:last]
            label[place] = opened.table["label"][number]
            number, place = self._copy(opened, number, place, out)
            for at in self._decode(opened, number, place, out, stop):
                real[at], label[at] = self._stand_in(int(real[at]), out[at : at + 1])
        return Filled(real, label)

    def waiting(self) -> str:
        """What keeps its threads, for a message."""
        return self._open.waiting()

    def close(self) -> None:
        """Lets go of the open shards."""
        self._open.close()

    def _stand_in(self, sample: int, out: Row) -> tuple[int, int]:
        """Decodes the next good sample after a bad one into the only row of `out`; returns its number and label."""
        while True:
            sample = self._quarantine.stand_in(sample)
            opened = self._open(int(self._index.shard_of(np.array([sample], np.int64))[0]))
            number = np.array([sample - opened.start], np.int64)
            if not self._decode(opened, number, np.zeros(1, np.int64), out, None):
                return sample, int(opened.table["label"][number[0]])

    def _decode(
        self,
        opened: Opened,
        number: NDArray[np.int64],
        place: NDArray[np.int64],
        out: Row,
        stop: threading.Event | None,
    ) -> list[int]:
        """Reads and decodes samples of a shard one by one; returns the places of the bad ones. Here goes the time of a
        stream: plain lists, and as few calls a sample as can be."""
        if not len(number):
            return []
        rows = opened.table[number]
        decode, kinds = self._modality.decode, self._kinds
        offset, size, field = rows["offset"].tolist(), rows["size"].tolist(), rows["field"].tolist()
        places = place.tolist()
        bad: list[int] = []
        first = 0
        for last in _ends(rows):
            if stop is not None and stop.is_set():
                raise Stopped
            begin = offset[first]
            chunk = self._read(opened, begin, offset[last - 1] + size[last - 1] - begin, int(number[first]))
            for i in range(first, last):
                at = offset[i] - begin
                data = chunk if last - first == 1 else chunk[at : at + size[i]]
                try:
                    decode(data, kinds[field[i]], out[places[i]])
                except Undecodable as error:
                    self._quarantine.add(opened.start + int(number[i]), str(error))
                    bad.append(places[i])
                except MemoryError as error:  # of this machine, not of the bytes: no reason to take another sample
                    what = f"{self._where(opened, int(number[i]))}: there is no memory to decode it"
                    raise ValueError(f"{what}; lower data.limits.megapixels or data.readers") from error
                except Exception as error:
                    what = f"{self._where(opened, int(number[i]))}: {error or type(error).__name__}"
                    raise RuntimeError(what) from error
            first = last
        return bad

    def _copy(
        self, opened: Opened, number: NDArray[np.int64], place: NDArray[np.int64], out: Row
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Copies samples whose rows lie in the shard as they are, all at once, out of its mapping; returns which are
        left: their numbers in the shard and their places."""
        layout = self._layout(opened)
        if layout is None:
            return number, place
        if not opened.whole():
            raise self._cut(opened, int(number[0]))
        rows = out.view(np.uint8).reshape(len(out), -1)
        left = []
        step = max(1, GATHERED // layout.size)
        for i in range(0, len(number), step):
            block, to = layout.block[number[i : i + step]], place[i : i + step]
            members = layout.members[block]
            equal = (members[:, : len(layout.header)] == layout.header).all(axis=1)
            if not (equal.all() and block.all()):
                equal &= block > 0
                left.append(i + (~equal).nonzero()[0])
                members, to = members[equal], to[equal]
            rows[to] = members[:, len(layout.header) :]
        some = np.concatenate(left) if left else np.empty(0, np.int64)
        return number[some], place[some]

    def _layout(self, opened: Opened) -> Layout | None:
        """How the rows of a shard lie in it, judged by its first sample of a kind that may be plain; None where they do
        not."""
        if not opened.looked:
            table = opened.table
            may = self._plain[table["field"]].nonzero()[0]
            if len(may):
                first = table[may[0]]
                data = self._read(opened, int(first["offset"]), int(first["size"]), int(may[0]))
                header = self._modality.plain(data, self._kinds[first["field"]])
                if header is not None:
                    opened.layout = _lay_out(opened, first, np.frombuffer(data[:header], np.uint8))
            opened.looked = True
        return opened.layout

    def _read(self, opened: Opened, offset: int, size: int, number: int) -> bytes:
        try:
            data = os.pread(opened.fd, size, offset)
        except OSError as error:
            raise OSError(f"{self._where(opened, number)}: {error}") from error
        if len(data) != size:
            raise self._cut(opened, number)
        return data

    def _cut(self, opened: Opened, number: int) -> ValueError:
        return ValueError(f"{self._where(opened, number)}: the shard was cut short while it was read; copy it again")

    def _where(self, opened: Opened, number: int) -> str:
        return self._index.where(opened.start + number)


def _lay_out(opened: Opened, first: np.void, header: NDArray[np.uint8]) -> Layout:
    table = opened.table
    size = int(first["size"])
    alike = (table["size"] == size) & (table["field"] == first["field"]) & (table["offset"] % tar.BLOCK == 0)
    return Layout(size, header, opened.map(size), np.where(alike, table["offset"] // tar.BLOCK, 0))


def _ends(rows: Rows) -> list[int]:
    """Where each read ends: samples of a shard that all but touch each other come with one."""
    offset = rows["offset"]
    gap = offset[1:] - (offset[:-1] + rows["size"][:-1])
    apart = (gap < 0) | (gap > GAP) | (offset[1:] >> REACH != offset[:-1] >> REACH)
    return [*(apart.nonzero()[0] + 1).tolist(), len(rows)]

"""A shard's table, NAME.idx.npy beside NAME.tar: where each of its samples lies. numpy.load reads it too."""

import hashlib
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.data import tar

ROW = np.dtype(
    [
        ("begin", "<i8"),
        ("end", "<i8"),
        ("offset", "<i8"),
        ("size", "<i8"),
        ("key", "<u8"),
        ("label", "<i4"),
        ("field", "u1"),
    ]
)
"""A sample. begin, end: its bytes in the tar, from its first header to the padding of its last member. offset, size:
the image's data. key: `key_hash`. label: class number, -1 for none. field: number of the image's field in
Index.fields."""

Rows = NDArray[np.void]
HEADER = 256  # bytes before the rows, in a file
LONGEST_NAME = 200  # bytes of a shard's, so that its table's and a fetched one's have room in the 255 of a file system
_NAME = re.compile(r"[^./\x00-\x1f\x7f-\x9f\ud800-\udfff][^/\x00-\x1f\x7f-\x9f\ud800-\udfff]*\.tar")
KEPT = 128 << 20  # bytes of tables that are held: 2.9 million samples


class Shard(NamedTuple):
    name: str
    samples: int
    bytes: int
    sha256: str
    """Of the whole file; empty while that is not known, as no index has been made yet."""
    table: str
    """sha256 of the file of its table."""


class Span(NamedTuple):
    """Smallest and largest value over a split, in pixels or channels."""

    low: int
    high: int

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low} to {self.high}"


class Spans(NamedTuple):
    """Of the images of a shard or a split; None where no image's header could be read."""

    height: Span | None = None
    width: Span | None = None
    channels: Span | None = None

    def join(self, other: "Spans") -> "Spans":
        return Spans(*(_join(mine, its) for mine, its in zip(self, other, strict=True)))


def _join(mine: Span | None, its: Span | None) -> Span | None:
    if mine is None or its is None:
        return mine or its
    return Span(min(mine.low, its.low), max(mine.high, its.high))


def spans_of(shapes: set[tuple[int, int, int]]) -> Spans:
    """shapes: the (height, width, channels) that occur."""
    return Spans(*(Span(min(values), max(values)) for values in zip(*shapes, strict=True))) if shapes else Spans()


def merged(fields: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """Every name once, sorted: what the numbers in `field` stand for."""
    names = tuple(sorted({name for group in fields for name in group}))
    if len(names) > 256:
        raise ValueError(f"{len(names)} names of image fields ({', '.join(names[:3])}, ...); name the images alike")
    return names


def name_fault(name: str) -> str | None:
    """Why no shard may be called so: it must be a plain, visible file of its folder, and steer no terminal."""
    if not _NAME.fullmatch(name):
        return f"{tar.shown(name):.60} is no name for a shard: plain text that ends in .tar, without a dot first"
    if len(name.encode()) > LONGEST_NAME:
        return f"{name:.60}... is too long a name for a shard: at most {LONGEST_NAME} bytes"
    return None


def table_name(shard: str) -> str:
    """train-00000.tar: train-00000.idx.npy"""
    return f"{PurePath(shard).stem}.idx.npy"


def key_hash(key: str) -> int:
    """First 8 bytes of BLAKE2b of the key, as an unsigned number."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def table_bytes(samples: int) -> int:
    """Size of the file of a table."""
    return HEADER + samples * ROW.itemsize


def encode(rows: Rows) -> bytes:
    """The file of a table: .npy, format version 1.0."""
    assert rows.dtype == ROW
    return _header(len(rows)) + rows.tobytes()


def decode(data: bytes) -> Rows:
    """What `encode` wrote, read-only. ValueError for anything else: the header is compared, never evaluated."""
    samples = max(0, len(data) - HEADER) // ROW.itemsize
    if data[:HEADER] != _header(samples) or len(data) != table_bytes(samples):
        raise ValueError("is no table of samples")
    return np.frombuffer(data, ROW, offset=HEADER)


def _header(samples: int) -> bytes:
    """Of one length for any number of samples, so that the size of a file gives the number."""
    text = f"{{'descr': {ROW.descr!r}, 'fortran_order': False, 'shape': ({samples},), }}"
    rest = HEADER - 10
    return b"\x93NUMPY\x01\x00" + rest.to_bytes(2, "little") + text.ljust(rest - 1).encode() + b"\n"


def fault(rows: Rows, shard: Shard, *, classes: int, fields: int) -> str | None:
    """What of a table cannot be: so nothing outside the shard is ever read, and nothing of another sample."""
    begin, end, offset, size = (rows[name] for name in ("begin", "end", "offset", "size"))
    if len(rows) != shard.samples:
        return f"holds {len(rows)} samples, index.json says {shard.samples}"
    if (
        len(rows)
        and not (
            begin[0] >= 0  # bounds first, then order: so that no difference of two wild numbers wraps round
            and (end <= shard.bytes).all()
            and (begin < end).all()
            and (end[:-1] <= begin[1:]).all()
            and ((begin < offset) & (offset <= end)).all()
            and (offset - begin >= tar.BLOCK).all()
            and not ((begin | offset) % tar.BLOCK).any()
            and ((size >= 0) & (size <= end - offset)).all()
        )
    ):
        return "places samples outside the shard or over each other"
    if len(rows) and not -1 <= rows["label"].min() <= rows["label"].max() < max(1, classes):
        return f"holds labels that are none of the {classes} classes of index.json"
    if len(rows) and rows["field"].max() >= fields:
        return f"holds a field that is none of the {fields} of index.json"
    return None


class Tables:
    """Tables that were read last, up to KEPT bytes; threads may share it."""

    def __init__(self, read: Callable[[int], Rows], *, kept: int = KEPT) -> None:
        self._read, self._kept = read, kept
        self._tables: OrderedDict[int, Rows] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __call__(self, shard: int) -> Rows:
        with self._lock:
            found = self._tables.get(shard)
            if found is not None:
                self._tables.move_to_end(shard)
                return found
        found = self._read(shard)  # outside the lock: it may wait for a network; two threads may read the same
        with self._lock:
            if shard not in self._tables:
                self._tables[shard] = found
                self._bytes += found.nbytes
            while self._bytes > self._kept and len(self._tables) > 1:
                self._bytes -= self._tables.popitem(last=False)[1].nbytes
        return found


def read_table(path: Path, shard: Shard, *, classes: int, fields: int) -> Rows:
    """A table from its file. ValueError: missing, damaged, of another shard."""
    again = "run `tandem data index` on the set"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: is missing; copy it beside its shard, or {again}") from None
    if hashlib.sha256(data).hexdigest() != shard.table:
        raise ValueError(f"{path}: does not belong to index.json; copy both again, or {again}")
    try:
        rows = decode(data)
        wrong = fault(rows, shard, classes=classes, fields=fields)
    except ValueError as error:
        wrong = str(error)
    if wrong:
        raise ValueError(f"{path}: {wrong}; {again}")
    return rows

"""One pass over a shard that somebody else made: its samples, their images' sizes, their labels, its sha256."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from trainer.data import decode, tar
from trainer.data.config import LimitsConfig, Reading
from trainer.data.table import ROW, Rows, Spans, key_hash, spans_of

IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp", "npy")
"""Extensions that are decoded; a field may have a prefix (`left.png`)."""
LABEL_FIELD = "cls"
_LOADED = "pkl pickle pyd pth pt ckpt p joblib dill cloudpickle"  # run what they hold, once they are loaded
_OTHER = "ten tenbin tb mp msg msgpack cbor npz h5 hdf5 mat"  # of webdataset's own decoders, and their like
_PACKED = "gz tgz bz2 xz lzma zst zstd lz4 br z zip 7z rar tar"  # may unpack to anything
_PROGRAMS = "ps eps py pyc pyo so dll dylib exe com bat cmd sh ps1 jar js wasm"
REFUSED = frozenset(f"{_LOADED} {_OTHER} {_PACKED} {_PROGRAMS}".split())
"""Extensions of members that nobody needs for training: passed over only where data.ignore lists the field."""
MOST_CLASSES = 1_000_000
LONGEST_TEXT = 256  # bytes of a class as text
HEADERS = (4 << 10, 64 << 10, tar.LONGEST_HEADER)  # bytes of an image that are looked at, until they say its size


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What of a sample counts. ValueError where a field is of a refused kind."""

    image: str = "auto"
    label: str = "auto"
    ignore: tuple[str, ...] = ()
    limits: LimitsConfig = field(default_factory=LimitsConfig)

    def __post_init__(self) -> None:
        for key, name in (("image", self.image), ("label", self.label.partition(":")[0])):
            if kind_of(name) in REFUSED:
                raise ValueError(f"data.{key}: {name} is of a kind that is never read; name another field")
        field, colon, key = self.label.partition(":")
        if colon and not (kind_of(field) == "json" and key):
            raise ValueError(f"data.label: {self.label} is none of auto, FIELD, json:KEY")

    @classmethod
    def of(cls, config: Reading) -> "Wanted":
        return cls(image=config.image, label=config.label, ignore=config.ignore, limits=config.limits)

    @property
    def reading(self) -> dict[str, Any]:
        """JSON, for index.json: what rows and labels depend on."""
        return {"image": self.image, "label": self.label, "ignore": sorted(self.ignore)}


class Scan(NamedTuple):
    """A shard as it was found."""

    rows: Rows
    """field: number into `fields`; label: number into `texts` where there are any."""
    fields: tuple[str, ...]
    texts: tuple[str, ...] | None
    """Classes as text; None where labels are numbers."""
    spans: Spans
    passed: int
    """Members without a field, which no reader sees."""
    bytes: int
    sha256: str


def kind_of(field: str) -> str:
    return field.rpartition(".")[2].lower()


def scan(descriptor: int, where: str, wanted: Wanted, *, advance: Callable[[int], None] | None = None) -> Scan:
    """One sequential pass over an open shard. where: its name for messages. advance: is told of bytes that were read.

    ValueError names the member: what must not be in a shard, a sample without its image, a field twice, a key that
    comes back, a label that is none; or the shard: cut short, damaged, empty.
    """
    digest = hashlib.sha256()
    passing = tar.Pass(descriptor, digest)
    samples = _Samples(where, wanted, passing.at, lambda member: os.pread(descriptor, member.size, member.offset))
    told = 0
    total = os.fstat(descriptor).st_size
    try:
        for member in tar.members(passing.at, where, total=total):
            samples.add(member)
            if advance is not None and passing.total - told >= tar.READ:
                advance(passing.total - told)
                told = passing.total
        samples.end()
    except tar.ShardCut:
        there = f"no end mark in its {total:,} bytes ({samples.whole} samples are there)"
        raise ValueError(f"{where}: is cut short: {there}; {tar.AGAIN}") from None
    if not passing.finish():
        raise ValueError(f"{where}: goes on after its end mark, as joined archives do; pack it again as one")
    if advance is not None:
        advance(passing.total - told)
    if not samples.rows:
        raise ValueError(f"{where}: holds no sample{samples.empty()}; make it again or remove it")
    return Scan(
        rows=np.array(samples.rows, ROW),
        fields=tuple(samples.fields),
        texts=tuple(samples.texts) if samples.texts else None,
        spans=spans_of(samples.shapes),
        passed=len(samples.passed),
        bytes=passing.total,
        sha256=digest.hexdigest(),
    )


class _Samples:
    """Members to samples: `add` each in the order of the tar, then `end`."""

    def __init__(self, where: str, wanted: Wanted, at: tar.At, all_of: Callable[[tar.Member], bytes]) -> None:
        """at: of the pass, for the beginning of a member. all_of: a whole one, of any size."""
        self.where, self.wanted, self.at, self.all_of = where, wanted, at, all_of
        self.rows: list[tuple[int, int, int, int, int, int, int]] = []
        self.fields: dict[str, int] = {}
        self.texts: dict[str, int] = {}
        self.shapes: set[tuple[int, int, int]] = set()
        self.passed: list[str] = []
        self.whole = 0
        """Samples of which a member is whole: for a message about a cut shard."""
        self._numbers = False  # whether labels are numbers
        self._keys: set[int] = set()
        self._key: str | None = None
        self._hash = 0
        self._first = self._end = 0
        self._found: list[str] = []  # fields of this sample
        self._image: tar.Member | None = None
        self._several = False
        self._label = -1
        label, _, self._label_key = wanted.label.partition(":")
        self._label_field = LABEL_FIELD if label == "auto" else label.lower()
        self._image_field = wanted.image.lower()
        self._ignore = {name.lower() for name in wanted.ignore}
        self._largest = int(wanted.limits.member_mb * 1e6)

    def add(self, member: tar.Member) -> None:
        field = member.field
        if not field:
            self.passed.append(member.key)
            return
        if member.key != self._key:
            self.end()
            self._begin(member)
        elif field in self._found:
            raise self._error(f"has the field {field} twice", "make the shard again with names of its own")
        self._found.append(field)
        self._end = member.end
        if field in self._ignore:
            return
        if field.rpartition(".")[2] in REFUSED:
            raise self._error(
                f"holds {tar.shown(field)}, of a kind that is never read",
                "take it out of the shard, or list it in data.ignore to pass it over",
            )
        if member.size > self._largest:
            raise self._error(
                f"holds {member.size:,} bytes in {tar.shown(field)}, data.limits.member_mb allows {self._largest:,}",
                "raise the limit or make the shard again",
            )
        if len(self._found) > self.wanted.limits.members:
            raise self._error(
                f"has more than {self.wanted.limits.members} members (data.limits.members)",
                "raise the limit or make the shard again",
            )
        if field == self._image_field or (self._image_field == "auto" and field.rpartition(".")[2] in IMAGE_FIELDS):
            self._several |= self._image is not None
            self._image = member
            self._inspect(member)
        if field == self._label_field:
            self._label = self._class_of(member)

    def _begin(self, member: tar.Member) -> None:
        self._hash = key_hash(member.key)
        self._key, self._first, self._found = member.key, member.begin, []
        self._image, self._several, self._label = None, False, -1
        if self._hash in self._keys:
            raise self._error(
                "comes back after other samples",
                "keep the members of a sample together: pack the shard again, with tar --sort=name",
            )
        self._keys.add(self._hash)
        self.whole += 1

    def end(self) -> None:
        """The sample is whole."""
        if self._key is None:
            return
        image, wanted = self._image, self.wanted.image
        if image is None or self._several:
            found = f"(found: {tar.shown(', '.join(self._found))})"
            if wanted != "auto":
                raise self._error(f"has no field {wanted} {found}", "name it in data.image")
            if image is None:
                raise self._error(f"has no image field {found}", f"images are {', '.join(IMAGE_FIELDS)}")
            raise self._error(f"has several image fields {found}", "name one in data.image")
        field = self.fields.setdefault(image.field, len(self.fields))
        if field > 255:
            raise self._error("has the 256th name of an image field", "name the images of a shard alike")
        self.rows.append((self._first, self._end, image.offset, image.size, self._hash, self._label, field))
        self._key = None

    def empty(self) -> str:
        """Why there may be no sample, in a message."""
        return f" (passed over: {', '.join(map(tar.shown, self.passed[:3]))})" if self.passed else ""

    def _inspect(self, member: tar.Member) -> None:
        for length in HEADERS:
            whole = member.size <= length
            shape = decode.shape(self.at(member.offset, min(length, member.size)), member.field, whole=whole)
            if whole or shape is not None:
                break
        else:
            shape = decode.shape(self.all_of(member), member.field)
        if shape is not None:
            self.shapes.add(shape)

    def _class_of(self, member: tar.Member) -> int:
        """The label as a number: of the class, or into `texts`."""
        value: int | str | bytes | None
        if self._label_key:
            value = self._json(member)
        else:
            value = self.at(member.offset, min(member.size, LONGEST_TEXT + 1)).strip()
            if value.isdigit() and len(value) <= decode.LONGEST_LABEL:
                value = int(value)
        if value is None:
            return -1
        if isinstance(value, int):
            if not 0 <= value < MOST_CLASSES:
                raise self._label_error(f"holds {value}, not a class number below {MOST_CLASSES:,}")
            self._numbers = True
            number = value
        else:
            if self.wanted.label == "auto":
                raise self._label_error(f"holds {value[:20]!r}, not a class number", "set data.label to cls")
            number = self.texts.setdefault(self._text(value), len(self.texts))
        if self._numbers and self.texts:
            raise self._label_error("holds text where others hold numbers, or the other way round")
        return number

    def _text(self, value: bytes | str) -> str:
        try:
            text = value.decode() if isinstance(value, bytes) else value
            if 0 < len(text.encode()) <= LONGEST_TEXT and text.isprintable():
                return text
        except UnicodeError:
            pass
        raise self._label_error(f"holds {value[:20]!r}, which is no name of a class")

    def _json(self, member: tar.Member) -> int | str | None:
        if member.size > tar.LONGEST_HEADER:
            raise self._label_error(f"has {member.size:,} bytes")
        try:
            content = json.loads(self.at(member.offset, member.size))
        except (ValueError, RecursionError) as error:
            raise self._label_error(f"is no JSON ({error})") from None
        value = content.get(self._label_key) if isinstance(content, dict) else None
        if isinstance(value, bool):
            return str(value).lower()
        if value is None or isinstance(value, (int, str)):
            return value
        raise self._label_error(f"holds {str(value)[:20]!r} as {self._label_key}, not a number or text of a class")

    def _error(self, what: str, advice: str) -> ValueError:
        return ValueError(f"{self.where}: key {tar.shown(self._key or '')} {what}; {advice}")

    def _label_error(self, what: str, advice: str = "") -> ValueError:
        advice = advice or "make the shard again, or name another field in data.label"
        return ValueError(
            f"{self.where}: the .{self._label_field} of key {tar.shown(self._key or '')} {what}; {advice}"
        )

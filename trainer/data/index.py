"""What a split holds: its shards, and where each sample lies in them.

    DEST/train/index.json      format, classes, image sizes, shards with samples, bytes and sha256, the report of the
    maker
    DEST/train/index.npz       offset, size, label, field of each sample, in the order of the shards
    DEST/train/train-00000.tar ...

Shards that others made have no index; `load` then scans their headers once.
"""

import hashlib
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.data import decode, tar
from trainer.data.convert import Undecodable

FORMAT = 1
UNFINISHED = ".unfinished"
"""Folder in DEST while `tandem data make` is at work there."""
IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp", "npy")
"""Extensions that are decoded; a field may have a prefix (`left.png`)."""
LABEL_FIELD = "cls"


class Shard(NamedTuple):
    name: str
    samples: int
    bytes: int
    sha256: str
    """Of the whole file; of its headers where the shard has no index."""


class Span(NamedTuple):
    """Smallest and largest value over a split, in pixels or channels."""

    low: int
    high: int

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low} to {self.high}"


@dataclass(frozen=True)
class Index:
    folder: Path
    shards: tuple[Shard, ...]
    classes: tuple[str, ...]
    height: Span | None
    """None where no image's header could be read."""
    width: Span | None
    channels: Span | None
    fields: tuple[str, ...]
    """Image fields; `field` holds numbers into it."""
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    label: NDArray[np.int64]
    """-1 where a sample has none."""
    field: NDArray[np.uint8]
    report: dict[str, Any]

    @property
    def samples(self) -> int:
        return len(self.offset)

    @property
    def starts(self) -> NDArray[np.int64]:
        """(shards + 1): the number of each shard's first sample."""
        return np.cumsum([0, *(shard.samples for shard in self.shards)], dtype=np.int64)

    @property
    def fingerprint(self) -> str:
        """Digest of the shards' names, sizes and digests: two splits with one fingerprint give the same stream."""
        rows = [[shard.name, shard.samples, shard.bytes, shard.sha256] for shard in self.shards]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def where(self, sample: int) -> str:
        """Shard and key of a sample, for a message; reads one header."""
        shard = int(np.searchsorted(self.starts, sample, "right")) - 1
        path = self.folder / self.shards[shard].name
        with path.open("rb") as file:
            file.seek(int(self.offset[sample]) - tar.BLOCK)
            name = file.read(100).split(b"\0", 1)[0].decode("utf-8", "backslashreplace")
        return f"{path}: {tar.split_name(name)[0]}"


def load(path: Path, split: str, *, image: str = "auto") -> Index:
    """The index of `path`/`split`, checked against the sizes of its shards (one stat a shard).

    image: the field that holds the image, or "auto" for the one with a known extension; only for shards without index.
    ValueError says what is missing, damaged or cut short, and what to do.
    """
    if not path.is_dir():
        raise ValueError(
            f"data.path: {path} does not exist; make it with `tandem data make fashion-mnist {path}` "
            f"or `tandem data make folder SRC {path}`"
        )
    if (path / UNFINISHED).exists():
        raise ValueError(f"data.path: {path} is unfinished; run the `tandem data make` command that began it again")
    folder = path / split
    if not folder.is_dir():
        found = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        raise ValueError(
            f"data.path: {path} has no {split} split (found: {', '.join(found) or 'nothing'}); "
            f"make it with `tandem data make`"
        )
    if (folder / "index.json").exists():
        index = _read(folder)
        if image != "auto" and image not in index.fields:
            raise ValueError(f"data.image: {image} is no field of {folder} (found: {', '.join(index.fields)})")
        return index
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise ValueError(
            f"data.path: {folder} holds no index.json and no .tar files; make them with `tandem data make`"
        )
    return build(folder, paths, image=image)


def build(folder: Path, paths: Sequence[Path], *, image: str) -> Index:
    """The index of shards that have none, from one scan of their headers and of their images' headers."""
    fields: list[str] = []
    rows: list[tuple[int, int, int, int]] = []
    shards, spans = [], Spans()
    for path in paths:
        members = _members(path)
        digest = hashlib.sha256(repr(members).encode()).hexdigest()
        samples: dict[str, dict[str, tar.Member]] = {}
        for found in members:
            sample = samples.setdefault(found.key, {})
            if found.field in sample:
                raise ValueError(
                    f"{path}: key {found.key} has the field {found.field or '(none)'} twice; "
                    "make the shard again with names of its own"
                )
            sample[found.field] = found
        if not samples:
            raise ValueError(f"{path}: holds no sample; make it again or remove it")
        with path.open("rb") as file:
            for key, sample in samples.items():
                name = _image_field(path, key, sample, image)
                if name not in fields:
                    fields.append(name)
                member = sample[name]
                rows.append((member.offset, member.size, _label(file, path, sample), fields.index(name)))
                file.seek(member.offset)
                shape = decode.shape(file.read(min(member.size, 1 << 16)), name)
                if shape is not None:
                    spans.add(*shape)
        shards.append(Shard(path.name, len(samples), path.stat().st_size, digest))
    table = np.array(rows, np.int64)
    names = [str(number) for number in range(int(table[:, 2].max()) + 1)]
    return Index(
        folder=folder, shards=tuple(shards), classes=tuple(names), height=spans.height, width=spans.width,
        channels=spans.channels, fields=tuple(fields), offset=table[:, 0], size=table[:, 1], label=table[:, 2],
        field=table[:, 3].astype(np.uint8), report={},
    )  # fmt: skip


class Spans:
    """Smallest and largest image of a split, as samples are added."""

    def __init__(self) -> None:
        self.height: Span | None = None
        self.width: Span | None = None
        self.channels: Span | None = None

    def add(self, height: int, width: int, channels: int) -> None:
        self.height = widen(self.height, height)
        self.width = widen(self.width, width)
        self.channels = widen(self.channels, channels)


def widen(span: Span | None, value: int) -> Span:
    return Span(value, value) if span is None else Span(min(span.low, value), max(span.high, value))


def _members(path: Path) -> list[tar.Member]:
    try:
        return tar.scan(path)
    except tar.ShardCut as cut:
        samples = len({member.key for member in cut.found})
        raise ValueError(
            f"{path}: is cut short: no end mark in its {path.stat().st_size:,} bytes ({samples} samples are there); "
            "copy it again or make it again"
        ) from None


def _image_field(path: Path, key: str, sample: dict[str, tar.Member], image: str) -> str:
    found = ", ".join(field or "(none)" for field in sample)
    if image != "auto":
        if image not in sample:
            raise ValueError(f"{path}: key {key} has no field {image} (found: {found}); name it in data.image")
        return image
    names = [field for field in sample if field.rpartition(".")[2].lower() in IMAGE_FIELDS]
    if len(names) != 1:
        what = "several image fields" if names else "no image field"
        raise ValueError(
            f"{path}: key {key} has {what} (found: {found}); "
            f"{'name one in data.image' if names else 'images are ' + ', '.join(IMAGE_FIELDS)}"
        )
    return names[0]


def _label(file: Any, path: Path, sample: dict[str, tar.Member]) -> int:
    if LABEL_FIELD not in sample:
        return -1
    member = sample[LABEL_FIELD]
    file.seek(member.offset)
    try:
        return decode.label(file.read(min(member.size, 64)))
    except Undecodable as error:
        raise ValueError(f"{path}: the .cls of key {member.key} {error}; make the shard again") from None


def _read(folder: Path) -> Index:
    path = folder / "index.json"
    again = "make the set again with `tandem data make`"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"{path}: is of format {content['format']}, this version reads {FORMAT}; {again}")
        shards = tuple(
            Shard(str(s["name"]), int(s["samples"]), int(s["bytes"]), str(s["sha256"])) for s in content["shards"]
        )
        spans = [Span(*content["image"][name]) for name in ("height", "width", "channels")]
        classes, fields = tuple(map(str, content["classes"])), tuple(map(str, content["image"]["fields"]))
        offsets = content["offsets"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is not readable ({type(error).__name__}: {error}); {again}") from None
    if any(Path(shard.name).name != shard.name for shard in shards):
        raise ValueError(f"{path}: names a shard outside its folder; {again}")
    for shard in shards:
        check_size(folder, shard)
    table = folder / "index.npz"
    try:
        data = table.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{table}: is missing; copy it beside index.json, or {again}") from None
    if hashlib.sha256(data).hexdigest() != offsets["sha256"]:
        raise ValueError(f"{table}: does not belong to index.json; copy both again, or {again}")
    try:
        with np.load(table, allow_pickle=False) as arrays:
            offset, size, label, field = (arrays[name] for name in ("offset", "size", "label", "field"))
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise ValueError(f"{table}: is not readable ({error}); {again}") from None
    if len(offset) != sum(shard.samples for shard in shards):
        raise ValueError(f"{table}: holds {len(offset)} samples, index.json {sum(s.samples for s in shards)}; {again}")
    if len(label) and not -1 <= label.min() <= label.max() < max(1, len(classes)):
        raise ValueError(f"{table}: holds labels that are none of the {len(classes)} classes of index.json; {again}")
    return Index(
        folder=folder, shards=shards, classes=classes, height=spans[0], width=spans[1], channels=spans[2],
        fields=fields, offset=offset, size=size, label=label, field=field, report=content.get("report", {}),
    )  # fmt: skip


def check_size(folder: Path, shard: Shard) -> None:
    """ValueError, with what is there, where a shard does not have the bytes that its index says."""
    path = folder / shard.name
    if not path.exists():
        raise ValueError(f"{path}: is missing ({shard.samples} samples, {shard.bytes:,} bytes); copy it again")
    found = path.stat().st_size
    if found == shard.bytes:
        return
    try:
        whole = f"{len({member.key for member in tar.scan(path)})} samples"
    except tar.ShardCut as cut:
        whole = f"about {len({member.key for member in cut.found})} samples"
    except ValueError:
        whole = "not a whole tar"
    raise ValueError(
        f"{path}: expected {shard.samples} samples in {shard.bytes:,} bytes, found {found:,} bytes ({whole}); "
        "copy the shard again or make the set again"
    )

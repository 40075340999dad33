"""A shard in the making: samples to members, members to a tar and its table, the tar to its name."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from trainer import durable
from trainer.data import build, tar
from trainer.data.part import UNFINISHED
from trainer.data.scan import IMAGE_FIELDS, LABEL_FIELD, kind_of
from trainer.data.table import ROW, key_hash, spans_of


class Packed(NamedTuple):
    """A sample that is ready to be written."""

    key: str
    """Holds no dot after its last slash."""
    field: str
    data: bytes
    label: int
    """-1 for none."""
    metadata: Mapping[str, Any] | None
    shape: tuple[int, int, int]
    """Height, width, channels."""
    converted: tuple[str, ...] = ()
    """What was done to the pixels, for the report."""
    extra: Mapping[str, bytes] = MappingProxyType({})
    """Further members by field; no .cls and no .json where `label` or `metadata` says them."""


class LeftOut(NamedTuple):
    name: str
    reason: str


def members(sample: Packed) -> list[bytes]:
    """Of the tar, the image first."""
    assert "." not in sample.key.rpartition("/")[2]
    found = [tar.member(f"{sample.key}.{sample.field}", sample.data)]
    found += [tar.member(f"{sample.key}.{field}", data) for field, data in sample.extra.items()]
    if sample.label >= 0:
        found.append(tar.member(f"{sample.key}.{LABEL_FIELD}", str(sample.label).encode()))
    if sample.metadata is not None:
        found.append(tar.member(f"{sample.key}.json", json.dumps(sample.metadata).encode()))
    return found


class Shard:
    """A shard in the making: the file lies aside until it is whole."""

    def __init__(self, folder: Path, split: str, number: int) -> None:
        self.split, self.path = split, folder / f"{split}-{number:05d}.tar"
        self.aside = folder / f".{self.path.name}.part"
        self.file = self.aside.open("wb")
        self.digest = hashlib.sha256()
        self.position = self.samples = 0
        self.rows: list[tuple[int, int, int, int, int, int, int]] = []
        self.fields: dict[str, int] = {}
        self.shapes: set[tuple[int, int, int]] = set()
        self.image: str | None = None  # where samples hold several
        self.converted: dict[str, int] = {}
        self.left_out: list[LeftOut] = []

    def add(self, sample: Packed, parts: Sequence[bytes]) -> None:
        begin, end = self.position, self.position + sum(map(len, parts))
        field = self.fields.setdefault(sample.field, len(self.fields))
        padded = -(-len(sample.data) // tar.BLOCK) * tar.BLOCK
        place = (begin, end, begin + len(parts[0]) - padded, len(sample.data))
        self.rows.append((*place, key_hash(sample.key), sample.label, field))
        self.shapes.add(sample.shape)
        if any(kind_of(name) in IMAGE_FIELDS for name in sample.extra):
            self.image = sample.field
        for what in sample.converted:
            self.converted[what] = self.converted.get(what, 0) + 1
        for data in parts:
            self._put(data)
        self.samples += 1

    def _put(self, data: bytes) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.position += len(data)

    def finish(self, dest: Path, state: dict[str, Any], *, following: int) -> None:
        """The shard gets its name, then its line in the state."""
        if self.samples:
            self._put(tar.end(self.position))
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            made = build.draft(
                dest / UNFINISHED, self.path.name, np.array(self.rows, ROW), size=self.position,
                sha256=self.digest.hexdigest(), fields=list(self.fields), texts=None, spans=spans_of(self.shapes),
            )  # fmt: skip
            self.aside.replace(self.path)
            durable.flush(self.path.parent)
            state["shards"][self.split].append(made)
        state["image"] = self.image or state["image"]
        for what, count in self.converted.items():
            state["converted"][what] = state["converted"].get(what, 0) + count
        state["left_out"] += [[f"{self.split}: {name}", reason] for name, reason in self.left_out]
        state["next"][self.split] = following
        save(dest, state)

    def discard(self) -> None:
        self.file.close()
        self.aside.unlink(missing_ok=True)


def save(dest: Path, state: Mapping[str, Any]) -> None:
    write(dest / UNFINISHED / "state.json", json.dumps(state).encode())


def write(path: Path, data: bytes) -> None:
    """Aside, flushed, renamed."""
    aside = path.with_name(f".{path.name}.part")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    durable.flush(path.parent)

"""A shard in the making: samples to members, members to a tar and its table, the tar to its name."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from tools.shards.state import State, Step
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
    """A shard in the making: it lies among the drafts until it is whole and noted."""

    def __init__(self, dest: Path, split: str, number: int) -> None:
        self.split, self.number = split, number
        self.path = dest / split / f"{split}-{number:05d}.tar"
        self.aside = dest / UNFINISHED / self.path.name
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

    def finish(self, state: State, *, following: int) -> None:
        """The shard gets its line in the state, then its name. ValueError: something has that name."""
        made = None
        if self.samples:
            self._put(tar.end(self.position))
            self.file.flush()
            os.fsync(self.file.fileno())
            made = build.draft(
                self.aside.parent, self.path.name, np.array(self.rows, ROW), size=self.position,
                sha256=self.digest.hexdigest(), fields=list(self.fields), texts=None, spans=spans_of(self.shapes),
            )  # fmt: skip
        left_out = [(f"{self.split}: {name}", reason) for name, reason in self.left_out]
        state.note(self.split, self.number, Step(following, made, self.image, self.converted, left_out))
        if made:
            into_place(self.aside, self.path)

    def close(self) -> None:
        self.file.close()


def into_place(aside: Path, path: Path) -> None:
    """A shard that is noted gets its name. ValueError: something has it."""
    if path.exists() or path.is_symlink():
        raise ValueError(f"{path}: is there already and not of this set; take it away, nothing is overwritten")
    aside.replace(path)
    durable.flush(path.parent)

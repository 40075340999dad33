"""Several sets as one: their classes and fields in common numbers."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.data.contents import Contents
from trainer.data.table import Spans, merged


class Numbers(NamedTuple):
    """From the numbers of one set to those of all; the last entry of `label` is -1, so that -1 stays -1."""

    label: NDArray[np.int32]
    field: NDArray[np.uint8]


class Joined(NamedTuple):
    classes: tuple[str, ...]
    fields: tuple[str, ...]
    spans: Spans
    numbers: tuple[Numbers, ...]


def join(names: Sequence[str], parts: Sequence[Contents]) -> Joined:
    """names: of the sets. Sets of one list of classes share it, and so do sets without classes; else class C of the set
    S becomes S/C."""
    lists = {part.classes for part in parts if part.classes}
    shared = len(lists) <= 1
    titles = short(names)
    own = [part.classes if shared else tuple(f"{title}/{name}" for name in part.classes)
           for title, part in zip(titles, parts, strict=True)]  # fmt: skip
    classes = next(iter(lists), ()) if shared else tuple(name for group in own for name in group)
    fields = merged(part.fields for part in parts)
    spans = Spans()
    for part in parts:
        spans = spans.join(part.spans)
    place = {name: number for number, name in enumerate(classes)}
    numbers = tuple(
        Numbers(
            np.array([*(place[name] for name in group), -1], np.int32),
            np.array([fields.index(name) for name in part.fields], np.uint8),
        )
        for group, part in zip(own, parts, strict=True)
    )
    return Joined(classes, fields, spans, numbers)


def short(names: Sequence[str]) -> list[str]:
    """Last parts of paths or URLs, as many as it takes to tell them apart; those of equal paths get their number."""
    parts = [name.rstrip("/").split("/") for name in names]
    for depth in range(1, max(map(len, parts)) + 1):
        titles = ["/".join(part[-depth:]) for part in parts]
        if len(set(titles)) == len(names):
            return titles
    return [f"{part[-1]}#{number}" for number, part in enumerate(parts)]

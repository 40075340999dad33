"""Which images of the splits of a set are the same, or nearly so: from their prints; pictures that may be near are
looked at again."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tools.shards import duplicates
from tools.shards.make import bar
from tools.shards.walk import Chunk, walk
from trainer.data.config import Reading
from trainer.data.index import Index

NAMED = 10
"""Groups or pairs that are named."""
AGAIN = 50_000
"""Samples that are read again at most, to compare their thumbnails (3 kB each)."""


class Split(NamedTuple):
    name: str
    index: Index
    prints: NDArray[np.void]
    """`measure.PRINT` of its samples."""


def find(splits: Sequence[Split], config: Reading, *, threads: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(exact, near), for a report. Reads samples that may be near again, with a progress bar."""
    prints = np.concatenate([split.prints for split in splits])
    of = np.repeat(np.arange(len(splits)), [len(split.prints) for split in splits])
    names = _Names(splits, prints["sample"], of)
    exact, single = _exact(prints["digest"], names)
    single = single[~prints["blank"][single]]  # of one colour: told apart from copies, as `blank`
    pairs = duplicates.near_pairs(prints["hash"][single])
    first, second = single[pairs.first], single[pairs.second]
    # the nearest first, as many as AGAIN samples make
    taken = len(first)
    if len(np.union1d(first, second)) > AGAIN:
        seen = np.unique(np.stack([first, second], axis=1).reshape(-1), return_index=True)[1]
        taken = int(np.sort(seen)[AGAIN]) // 2
    first, second = first[:taken], second[:taken]
    thumbs = _thumbnails(splits, config, names, np.union1d(first, second), threads=threads)
    far = [duplicates.difference(thumbs[a], thumbs[b]) for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    near = sorted(
        (distance, a, b)
        for distance, a, b in zip(far, first.tolist(), second.tolist(), strict=True)
        if distance <= duplicates.LEVELS
    )
    across = [(distance, a, b) for distance, a, b in near if of[a] != of[b]]
    return exact, {
        "pairs": len(near),
        "across_splits": len(across),
        "candidates": len(pairs.first),
        "compared": taken,
        "complete": pairs.all and taken == len(pairs.first),
        "named": [
            {"difference": round(distance, 2), "samples": [names(a), names(b)]}
            for distance, a, b in (*across, *(pair for pair in near if of[pair[1]] == of[pair[2]]))[:NAMED]
        ],
    }


def _exact(digests: NDArray[np.void], names: "_Names") -> tuple[dict[str, Any], NDArray[np.int64]]:
    """The report, and the places of images of which each stands for its copies."""
    groups = list(duplicates.groups(digests))
    across = [group for group in groups if len(set(names.of[group].tolist())) > 1]
    leaked = {split.name: 0 for split in names.splits}
    for group in across:
        for number in names.of[group].tolist():
            leaked[names.splits[number].name] += 1
    within = [group for group in groups if len(set(names.of[group].tolist())) == 1]
    single = np.ones(len(digests), np.bool_)
    for group in groups:
        single[group[1:]] = False
    return {
        "groups": len(groups),
        "copies": int(sum(len(group) - 1 for group in groups)),
        "across_splits": leaked if across else {},
        "labels_differ": sum(names.labels_differ(group) for group in groups),
        "named": [[names(place) for place in group[:NAMED].tolist()] for group in (*across, *within)[:NAMED]],
    }, np.flatnonzero(single)


class _Names:
    """What a place in the joined prints stands for."""

    def __init__(self, splits: Sequence[Split], samples: NDArray[np.int64], of: NDArray[np.int64]) -> None:
        self.splits, self.samples, self.of = splits, samples, of

    def __call__(self, place: int) -> dict[str, Any]:
        split, sample = self.splits[int(self.of[place])], int(self.samples[place])
        label = self.label(place)
        return {
            "split": split.name,
            "sample": sample,
            "where": split.index.where(sample),
            "class": split.index.classes[label] if 0 <= label < len(split.index.classes) else None,
        }

    def label(self, place: int) -> int:
        split = self.splits[int(self.of[place])]
        return int(split.index.rows(self.samples[place : place + 1])["label"][0])

    def labels_differ(self, group: NDArray[np.int64]) -> bool:
        return len({self.label(place) for place in group.tolist()}) > 1


def _thumbnails(
    splits: Sequence[Split], config: Reading, names: _Names, places: NDArray[np.int64], *, threads: int
) -> dict[int, NDArray[np.uint8]]:
    """Of the images at `places` (sorted) of the joined prints."""
    found: dict[int, NDArray[np.uint8]] = {}
    with bar(len(places), "comparing") as advance:
        for number, split in enumerate(splits):
            mine = places[names.of[places] == number]
            samples = names.samples[mine]
            thumbs = walk(split.index, config, look=_small, threads=threads, samples=samples, advance=advance)
            pictures = [picture for part in thumbs for picture in part]
            found.update(zip(mine.tolist(), pictures, strict=True))
    return found


def _small(chunk: Chunk) -> list[NDArray[np.uint8]]:
    return [duplicates.thumbnail(image) for image in chunk.images]

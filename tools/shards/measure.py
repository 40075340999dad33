"""What is counted of a split while its images pass: sums and 33 bytes a sample, no images."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from tools.shards import duplicates, tells
from tools.shards.walk import Chunk, walk
from trainer.data.config import Reading
from trainer.data.index import Index

PRINT = np.dtype([("sample", "<i8"), ("digest", "V16"), ("hash", "<u8"), ("blank", "?")])
"""Of an image: its number in the split, `duplicates.digest`, `duplicates.perceptual`, whether it is of one colour."""
SIDES = ("top", "right", "bottom", "left")


class Moments(NamedTuple):
    """Sums over pixels, a channel; levels 0 to 255."""

    pixels: int
    total: NDArray[np.float64]
    squares: NDArray[np.float64]

    def join(self, other: "Moments") -> "Moments":
        """A grey image counts in each channel where others have three."""
        channels = max(len(self.total), len(other.total))
        sums = [np.broadcast_to(part, channels) for part in (self.total, other.total, self.squares, other.squares)]
        return Moments(self.pixels + other.pixels, sums[0] + sums[1], sums[2] + sums[3])

    def mean(self) -> list[float]:
        """In [0, 1]."""
        return [float(value) for value in self.total / self.pixels / 255]

    def std(self) -> list[float]:
        variance = self.squares / self.pixels - (self.total / self.pixels) ** 2
        return [float(value) for value in np.sqrt(np.maximum(0, variance)) / 255]


@dataclass
class Measured:
    """Of some samples of a split; `+` joins those of two parts."""

    grid: tells.Grid | None
    """None: the images are too small."""
    images: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)
    unlabelled: int = 0
    heights: Counter[int] = field(default_factory=Counter)
    widths: Counter[int] = field(default_factory=Counter)
    channels: Counter[int] = field(default_factory=Counter)
    fields: Counter[int] = field(default_factory=Counter)
    smallest: int = 1 << 62
    """Bytes of an image as it is stored."""
    largest: int = 0
    bytes: int = 0
    moments: Moments = field(default_factory=lambda: Moments(0, np.zeros(1), np.zeros(1)))
    blank: int = 0
    grey: int = 0
    """Of three equal channels."""
    framed: int = 0
    plain: int = 0
    """On a plain ground."""
    frame_width: tuple[Counter[int], ...] = field(default_factory=lambda: tuple(Counter() for _ in SIDES))
    """At the top, right, bottom, left."""
    prints: list[NDArray[np.void]] = field(default_factory=list)

    def __iadd__(self, other: "Measured") -> "Measured":
        for name in ("images", "bad", "unlabelled", "bytes", "blank", "grey", "framed", "plain", "prints"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("heights", "widths", "channels", "fields"):
            getattr(self, name).update(getattr(other, name))
        for mine, its in zip(self.frame_width, other.frame_width, strict=True):
            mine.update(its)
        self.smallest, self.largest = min(self.smallest, other.smallest), max(self.largest, other.largest)
        self.moments = self.moments.join(other.moments)
        if self.grid is not None and other.grid is not None:
            self.grid = self.grid + other.grid
        return self


def measure(
    index: Index,
    config: Reading,
    *,
    threads: int,
    samples: NDArray[np.int64] | None,
    advance: Callable[[int], None],
) -> Measured:
    """Looks at the given samples (sorted numbers) of a split; None: at all."""
    side = min(index.height.low, index.width.low) if index.height and index.width else 0
    segment = tells.segment_of(side)
    found = Measured(grid=None if segment is None else tells.Grid(segment))
    look = partial(_look, segment=segment)
    for part in walk(index, config, look=look, threads=threads, samples=samples, advance=advance):
        found += part
    return found


def _look(chunk: Chunk, *, segment: int | None) -> Measured:
    found = Measured(grid=None if segment is None else tells.Grid(segment), images=len(chunk.images), bad=chunk.bad)
    if not chunk.images:
        return found
    found.unlabelled = int((chunk.rows["label"] < 0).sum())
    found.fields.update(chunk.rows["field"].tolist())
    size = chunk.rows["size"]
    found.smallest, found.largest, found.bytes = int(size.min()), int(size.max()), int(size.sum())
    prints = np.empty(len(chunk.images), PRINT)
    prints["sample"] = chunk.samples
    shapes: dict[tuple[int, ...], list[int]] = {}
    for place, image in enumerate(chunk.images):
        shapes.setdefault(image.shape, []).append(place)
        prints["digest"][place] = np.void(duplicates.digest(image))
    for (height, width, channels), places in shapes.items():
        found.heights[height] += len(places)
        found.widths[width] += len(places)
        found.channels[channels] += len(places)
        stack = np.stack([chunk.images[place] for place in places])
        prints["hash"][places], prints["blank"][places] = _measure(stack, found, segment)
    found.prints = [prints]
    return found


def _measure(
    stack: NDArray[np.uint8], found: Measured, segment: int | None
) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """Adds (n, H, W, C) images of one shape to `found`; returns their perceptual hashes, and which are of one
    colour."""
    count, height, width, channels = stack.shape
    mean, std = (part[:, 0] for part in cv2.meanStdDev(stack.reshape(count * height, width, channels)))
    pixels = count * height * width
    found.moments = found.moments.join(Moments(pixels, mean * pixels, (std**2 + mean**2) * pixels))
    blank = tells.blank(stack)
    found.blank += int(blank.sum())
    if channels == 3:
        found.grey += int(tells.grey_as_colour(stack).sum())
    grey = stack[..., 0] if channels == 1 else np.stack([cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in stack])
    frame = tells.frames(grey[~blank])
    found.framed += int(frame.width.any(axis=1).sum())
    found.plain += int(frame.plain.sum())
    for side, counter in enumerate(found.frame_width):
        counter.update(frame.width[frame.width[:, side] > 0, side].tolist())
    if found.grid is not None and segment is not None:
        found.grid = found.grid + tells.grid(grey, segment)
    thumbs = np.stack([duplicates.thumbnail(image)[..., 0] for image in grey])
    return duplicates.perceptual(thumbs), blank


def joined(prints: list[NDArray[np.void]]) -> NDArray[np.void]:
    return np.concatenate([np.empty(0, PRINT), *prints])


def spread_of(counts: Counter[int]) -> dict[str, int] | None:
    """Lowest, median and highest of counted values."""
    if not counts:
        return None
    values = sorted(counts)
    half = np.searchsorted(np.cumsum([counts[value] for value in values]), counts.total() / 2)
    return {"low": values[0], "median": values[int(half)], "high": values[-1]}

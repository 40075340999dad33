"""What images tell of their past, and a generator would learn: frames, and grids of compression or enlargement.

A grid is periodic. Along an axis the mean of |z|, z the mixed difference p(y,x) - p(y,x+1) - p(y+1,x) + p(y+1,x+1) (Fan
and de Queiroz 2003, Identification of bitmap compression history), is stronger at the borders of JPEG's blocks; and an
enlarged image has differences that come and go with the factor (Gallagher 2005, Detection of linear and cubic
interpolation in JPEG compressed images). A pattern of a network's upsampling is added to the pixels: it stands in the
mean of the differences themselves. So the spectrum of such a profile has peaks at multiples of 1/8 of a pixel's
frequency, and none in a natural image, wherever the grid begins.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

TOLERANCE = 16
"""Levels of grey that a frame's pixels may differ by, as JPEG leaves them: so 9 of 10 frames are seen at quality 75."""
FLAT = 8
"""Levels that the pixels of an image of one colour may differ by."""
EDGE = 0.9
"""Share of the pixels beside a frame that must have another level; beside an object on a plain ground few have."""
PERIODS = (8, 4, 2)
"""Pixels: blocks of JPEG, enlargement by 4 and by 2."""
DEPTH = 0.05
"""Amplitude of a grid, relative to the mean of the profile, from which on it is told. Clean images with texture have at
most 0.03, those that were tampered with 0.08 to 2 (tests/tools/test_shards_stats_tells.py)."""
DRAWN = 0.1
"""The same of images on a plain ground: their edges lie at the same places, and so are 0.28 deep along one axis, but at
most 0.07 along both (faces-drawn of 10 styles and 3 sizes, emoji of both styles)."""
ADDED = 0.2
"""The same in the differences themselves: edges of drawings have up to 0.15, photographs 0.11, two levels of a
chequered pattern 0.8."""
BLOCKS = 0.25
"""From which on JPEG's blocks are a fault: quality 85 gives up to 0.22, 75 from 0.24 on."""
CERTAIN = 4.0
"""Standard errors that an amplitude must be away from 0."""
FEWEST = 32
"""Images below which no grid is looked for."""
SEGMENT = 64
"""Pixels that a spectrum is taken of; the largest multiple of 8 where images are smaller, but at least 16."""
LARGEST = 512
"""Pixels of a side that are looked at."""


class Frames(NamedTuple):
    """Of n images."""

    width: NDArray[np.int64]
    """(n, 4): pixels of a frame at the top, right, bottom, left; 0 for none."""
    plain: NDArray[np.bool_]
    """Whether the outermost pixels of some side are of one level, which is no frame: a plain ground."""


def frames(grey: NDArray[np.uint8]) -> Frames:
    """grey: (n, H, W). A frame lies on two opposite sides, as letterboxes do, and ends at straight edges. In colours
    JPEG's frames have no such edges."""
    count, height, _ = grey.shape
    turned = grey.transpose(0, 2, 1)
    width = np.stack([_constant(side) for side in (grey, turned[:, ::-1], grey[:, ::-1], turned)], axis=1)
    width[width[:, 0] == height] = 0
    framed = np.zeros((count, 4), np.bool_)
    both = (width[:, :2] > 0) & (width[:, 2:] > 0)
    for place in np.flatnonzero(both.any(axis=1)).tolist():
        straight = _straight(grey[place], width[place])
        framed[place] = np.tile(both[place] & straight[:2] & straight[2:], 2)
    return Frames(np.where(framed, width, 0), ((width > 0) & ~framed).any(axis=1))


def _constant(grey: NDArray[np.uint8]) -> NDArray[np.int64]:
    """(n): lines from the first on that are of the level of its first pixel."""
    width = np.zeros(len(grey), np.int64)
    level = grey[:, 0, 0].astype(np.int16)
    active = np.arange(len(grey))
    for line in range(grey.shape[1]):
        other = np.abs(grey[active, line].astype(np.int16) - level[active, None]) > TOLERANCE
        active = active[~other.any(axis=1)]
        if not len(active):
            break
        width[active] += 1
    return width


def _straight(grey: NDArray[np.uint8], width: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(4): whether, inside the frame of (H, W), another level begins at once. JPEG may smear the first line: two are
    looked at."""
    top, right, bottom, left = width.tolist()
    inside = grey[top : grey.shape[0] - bottom, left : grey.shape[1] - right].astype(np.int16)
    if not inside.size:
        return np.zeros(4, np.bool_)
    other = np.abs(inside - int(grey[0, 0])) > TOLERANCE
    sides = (other, other.T[::-1], other[::-1], other.T)
    return np.array([side[:2].mean(axis=1).max() >= EDGE for side in sides], np.bool_)


def blank(images: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """(n): which of (n, H, W, C) are of one colour throughout."""
    found = _flat(images[:, ::16, ::16])  # few pixels say no of most
    found[found] = _flat(images[found])
    return found


def _flat(images: NDArray[np.uint8]) -> NDArray[np.bool_]:
    count, height, width, channels = images.shape
    pixels = images.reshape(count, height * width, channels)
    return (np.ptp(pixels, axis=1) <= FLAT).all(axis=1)


def grey_as_colour(images: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """(n): which of (n, H, W, 3) have equal channels."""
    first = images[..., :1]
    some = (images[:, ::16, ::16] == first[:, ::16, ::16]).all(axis=(1, 2, 3))
    some[some] = (images[some] == first[some]).all(axis=(1, 2, 3))
    return some


@dataclass
class Grid:
    """Sums over images of the power of a grid, above what its neighbours in the spectrum have; `+` joins two."""

    segment: int
    """Pixels a spectrum is taken of."""
    images: int = 0
    total: NDArray[np.float64] = field(default_factory=lambda: np.zeros((5, 4)))
    """(profile, frequency 1/8 to 4/8)."""
    squares: NDArray[np.float64] = field(default_factory=lambda: np.zeros((5, 4)))

    def __add__(self, other: "Grid") -> "Grid":
        return Grid(self.segment, self.images + other.images, self.total + other.total, self.squares + other.squares)

    def depth(self) -> NDArray[np.float64] | None:
        """(5, 4) amplitudes relative to the mean of the profile, 0 where they are not certain; None: too few images."""
        if self.images < FEWEST:
            return None
        mean = self.total / self.images
        variance = np.maximum(0, self.squares / self.images - mean**2)
        error = np.sqrt(variance / self.images)
        return np.sqrt(np.where(mean > CERTAIN * error, np.maximum(0, mean), 0))

    def found(self, *, drawn: bool = False) -> dict[int, float] | None:
        """Period in pixels to depth, of the grid there is, if any; None: too few images. drawn: most images are on a
        plain ground."""
        depth = self.depth()
        if depth is None:
            return None
        both = depth[:2].min(axis=0)  # |z|: any period; what is along one axis only are edges, no grid
        added = float(depth[2:, 3].max())  # patterns of period 2
        if both.max() >= (DRAWN if drawn else DEPTH):
            odd = max(both[0], both[2]) >= both.max() / 2  # multiples of 1/8
            return {8 if odd else 4 if both[1] >= both[3] / 2 else 2: float(depth[:2, both > 0].max())}
        return {2: added} if added >= ADDED else {}


def segment_of(side: int) -> int | None:
    """For images whose shorter side is `side`; None: too small to judge."""
    found = min(SEGMENT, (side - 1) // 8 * 8)
    return found if found >= 16 else None


def grid(grey: NDArray[np.uint8], segment: int) -> Grid:
    """grey: (n, H, W). Images without any texture are left out."""
    image = grey[:, :LARGEST, :LARGEST].astype(np.float32)
    across, down = np.diff(image, axis=2), np.diff(image, axis=1)
    mixed = np.diff(across, axis=1)
    rough = [np.abs(part).mean(axis=(1, 2)) for part in (mixed, across, down)]
    kept = rough[0] > 0.25  # a level in four pixels
    sign = np.where(np.arange(mixed.shape[1]) % 2, -1, 1).astype(np.float32)[:, None]
    strength = np.abs(mixed)
    profiles = (
        (strength.mean(axis=1), rough[0]),
        (strength.mean(axis=2), rough[0]),
        (across.mean(axis=1), rough[1]),
        (down.mean(axis=2), rough[2]),
        ((mixed * sign).mean(axis=1), rough[0]),  # a chequered pattern
    )
    power = np.stack([_excess(line[kept] / mean[kept, None], segment) for line, mean in profiles], axis=1)
    return Grid(segment, int(kept.sum()), power.sum(axis=0), (power**2).sum(axis=0))


def _excess(profile: NDArray[np.float32], segment: int) -> NDArray[np.float64]:
    """(n, length) to (n, 4): squared amplitude at 1/8, 2/8, 3/8 and 4/8, less the mean of its neighbours, averaged over
    segments."""
    count, length = profile.shape
    parts = profile[:, : length // segment * segment].reshape(count, length // segment, segment)
    parts = parts - parts.mean(axis=2, keepdims=True)
    window = np.hanning(segment + 1)[:segment] if segment >= 32 else np.ones(segment)
    power = np.abs(np.fft.rfft(parts * window, axis=2)) ** 2 * (2 / window.sum()) ** 2
    power = power.mean(axis=1)
    beside = (3, 4) if segment >= 64 else (2,) if segment >= 32 else (1,)  # outside the window's main lobe
    found = np.empty((count, 4))
    for multiple in range(1, 5):
        place = multiple * segment // 8
        near = [at for step in beside for at in (place - step, place + step) if 0 < at < segment // 2]
        found[:, multiple - 1] = power[:, place] - power[:, near].mean(axis=1)
    found[:, 3] /= 4  # at 4/8 a cosine has twice the amplitude in the spectrum
    return found

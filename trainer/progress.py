"""The one clock: images seen. Every interval, schedule, half-life and budget is in images, so a run means the same at
any batch size, world size and accumulation, before and after a resume.
"""

import math


def due(images: int, *, every: int, batch: int) -> bool:
    """Whether the update that ended at `images` crossed a multiple of `every` images; never when `every` is 0."""
    return every > 0 and images // every > (images - batch) // every


def ramp(images: int, *, start: int, length: int) -> float:
    """0 before `start`, 1 from `start + length` on, linear between; with length 0 a step at `start`."""
    if images < start:
        return 0.0
    return 1.0 if length == 0 else min(1.0, (images - start) / length)


def cyclic(images: int, *, period: int, rising: float = 0.5) -> float:
    """Fu et al. 2019: in each `period` a linear rise from 0 to 1 during its first `rising` share, then 1."""
    return min(1.0, (images % period) / (rising * period))


def decay(images: int, *, total: int, hold: float, floor: float, shape: str) -> float:
    """Factor of the learning rate: 1 during the first `hold` share of `total`, then "linear" or "cosine" down to
    `floor` at `total`; "constant" stays at 1."""
    assert shape in ("constant", "linear", "cosine")
    if shape == "constant" or total == 0 or images <= hold * total:
        return 1.0
    done = min(1.0, (images / total - hold) / (1.0 - hold))
    fall = done if shape == "linear" else 0.5 * (1.0 - math.cos(math.pi * done))
    return 1.0 - (1.0 - floor) * fall

"""Images that occur more than once: the same pixels, and nearly the same picture."""

import hashlib
from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

THUMB = 32
"""Pixels a side of the picture that is hashed and compared."""
BITS = 4
"""Of 64 that the hashes of two candidates may differ in."""
BLOCKS = 7
"""Parts of a hash. Two hashes that differ in at most 4 bits agree in at least 3 of 7 parts (Manku, Jain and Das Sarma
2007, Detecting near-duplicates for web crawling, section 3): so 35 sorted tables find every such pair."""
LEVELS = 8.0
"""Root of the mean squared difference of their thumbnails, up to which two images count as near."""
CROWD = 1_024
"""Neighbours in a table that a hash is compared with."""
ALIKE = 16
"""Equal hashes of which all are compared with others."""
MOST = 1_000_000
"""Pairs that are kept."""

_ROOT = np.sqrt(2 / THUMB) * np.cos(np.pi * (2 * np.arange(THUMB) + 1) * np.arange(8)[:, None] / (2 * THUMB))
_LOW: NDArray[np.float32] = _ROOT.astype(np.float32)  # (8, 32): the lowest rows of the DCT-II
_WEIGHTS = np.uint64(1) << np.arange(64, dtype=np.uint64)


def digest(image: NDArray[np.uint8]) -> bytes:
    """16 bytes of the sha256 of an image's pixels and shape: equal for equal images, whatever they were stored as."""
    found = hashlib.sha256(repr(image.shape).encode())
    found.update(np.ascontiguousarray(image))
    return found.digest()[:16]


def thumbnail(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 (32, 32, C) of (H, W, C): the mean of each part of a larger image, or a smaller one enlarged."""
    smaller = min(image.shape[:2]) >= THUMB
    way = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, (THUMB, THUMB), interpolation=way)).reshape(THUMB, THUMB, -1)


def perceptual(thumbs: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """(n, 32, 32) grey to (n) hashes of 64 bits: which of the lowest 8 x 8 frequencies of the DCT are above their
    median; near pictures differ in few bits (Zauner 2010, Implementation and Benchmarking of Perceptual Image Hash
    Functions, section 3.2.1; the mean level is left out)."""
    found = _LOW @ thumbs.astype(np.float32) @ _LOW.T
    found = found.reshape(len(thumbs), 64)
    found[:, 0] = 0
    found[np.abs(found) < 1e-2] = 0  # rounding errors of flat pictures
    above = found > np.median(found, axis=1, keepdims=True)
    return (above * _WEIGHTS).sum(axis=1, dtype=np.uint64)


class Pairs(NamedTuple):
    first: NDArray[np.int64]
    second: NDArray[np.int64]
    """Places in the array of hashes; first < second."""
    bits: NDArray[np.int64]
    """In which the two differ."""
    all: bool
    """Whether there are no more."""


def near_pairs(hashes: NDArray[np.uint64]) -> Pairs:
    """Pairs of hashes that differ in at most BITS bits, the nearest first. Of more than ALIKE equal ones the others are
    paired with the first alone. The time of 35 sorts: 1e6 hashes take seconds."""
    order = np.argsort(hashes, kind="stable")
    place = np.arange(len(order))
    begin = np.flatnonzero(np.diff(hashes[order], prepend=~hashes[order[:1]]))  # of equal ones
    rank = place - np.repeat(begin, np.diff(begin, append=len(order)))
    kept = order[rank < ALIKE]
    rest = place[rank >= ALIKE]
    equal = np.stack([order[rest - rank[rest]], order[rest]])
    close, whole = _close(hashes[kept])
    found = np.sort(np.concatenate([equal, kept[close]], axis=1), axis=0)
    bits = _popcount(hashes[found[0]] ^ hashes[found[1]])
    nearest = np.lexsort((found[1], found[0], bits))[:MOST]
    return Pairs(
        found[0, nearest], found[1, nearest], bits[nearest], whole and not len(rest) and found.shape[1] <= MOST
    )


def _close(values: NDArray[np.uint64]) -> tuple[NDArray[np.int64], bool]:
    """(2, m) places in `values` (sorted) of those that differ in at most BITS bits; and whether these are all."""
    edges = np.linspace(0, 64, BLOCKS + 1).astype(np.uint64)
    masks = [_ones(high) ^ _ones(low) for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)]
    found, whole, count = [np.empty(0, np.int64)], True, len(values)
    for chosen in combinations(masks, BLOCKS - BITS):
        keys = values & np.bitwise_or.reduce(np.array(chosen, np.uint64))
        order = np.argsort(keys, kind="stable")
        whole &= _neighbours(values[order], keys[order], order, found)
    codes = np.unique(np.concatenate(found))
    return np.stack([codes // max(1, count), codes % max(1, count)]), whole


def _neighbours(
    values: NDArray[np.uint64], keys: NDArray[np.uint64], order: NDArray[np.int64], found: list[NDArray[np.int64]]
) -> bool:
    """Adds the close pairs among equal keys to `found`, as first * count + second."""
    left = np.arange(len(keys))
    for step in range(1, CROWD + 1):
        left = left[left + step < len(keys)]
        left = left[keys[left] == keys[left + step]]
        if not len(left):
            return True
        hit = left[_popcount(values[left] ^ values[left + step]) <= BITS]
        pair = np.sort(np.stack([order[hit], order[hit + step]]), axis=0)
        found.append(pair[0] * len(keys) + pair[1])
        if sum(map(len, found)) > 4 * MOST:  # each pair stands in up to 35 tables
            return False
    return False


def _ones(bits: int) -> int:
    return (1 << bits) - 1


def _popcount(words: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Bits that are set (numpy.bitwise_count needs numpy 2)."""
    octets = words.reshape(-1, 1).view(np.uint8)
    return np.unpackbits(octets, axis=1).sum(axis=1, dtype=np.int64)


def groups(digests: NDArray[np.void]) -> Iterator[NDArray[np.int64]]:
    """Places of equal digests, for each that occurs more than once, in the order of their first places."""
    _, first, code, counts = np.unique(digests, return_index=True, return_inverse=True, return_counts=True)
    order = np.argsort(code.reshape(-1), kind="stable")
    ends = np.cumsum(counts)
    for group in sorted(np.flatnonzero(counts > 1).tolist(), key=lambda group: int(first[group])):
        yield order[ends[group] - counts[group] : ends[group]]


def difference(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Root of the mean squared difference of two thumbnails, in levels; grey against colour as colour."""
    return float(np.sqrt(np.mean((one.astype(np.float32) - other.astype(np.float32)) ** 2)))

"""Copies: the same pixels by their digest, nearly the same by a hash and a look; against brute force."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.tools.pictures import enlarged, jpeg, leaves
from tools.shards import duplicates

words = st.integers(0, 2**64 - 1)


@given(
    bases=st.lists(words, min_size=1, max_size=4),
    flips=st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 63), max_size=6)), max_size=40),
)
@settings(max_examples=100, deadline=None)
def test_every_near_pair_is_found_and_no_other(bases: list[int], flips: list[tuple[int, list[int]]]) -> None:
    hashes = list(bases)
    for number, bits in flips:
        word = bases[number % len(bases)]
        for bit in bits:
            word ^= 1 << bit
        if hashes.count(word) < duplicates.ALIKE:
            hashes.append(word)
    expected = {
        (a, b): distance
        for a, b in combinations(range(len(hashes)), 2)
        if (distance := bin(hashes[a] ^ hashes[b]).count("1")) <= duplicates.BITS
    }
    found = duplicates.near_pairs(np.array(hashes, np.uint64))
    pairs = list(zip(found.first.tolist(), found.second.tolist(), strict=True))
    assert dict(zip(pairs, found.bits.tolist(), strict=True)) == expected and len(pairs) == len(expected)
    assert found.bits.tolist() == sorted(found.bits.tolist()) and found.all


def test_a_crowd_of_equal_hashes_costs_pairs_with_the_first_only() -> None:
    found = duplicates.near_pairs(np.full(5_000, 7, np.uint64))
    assert set(np.concatenate([found.first, found.second]).tolist()) == set(range(5_000))
    assert len(found.first) < 10_000 and not found.all
    assert len(duplicates.near_pairs(np.empty(0, np.uint64)).first) == 0


@given(st.lists(st.integers(0, 6), max_size=40))
def test_groups_are_the_places_of_equal_digests(codes: list[int]) -> None:
    digests = np.array([bytes([code]) * 16 for code in codes], "V16").reshape(-1)
    found = [group.tolist() for group in duplicates.groups(digests)]
    expected = [[place for place, one in enumerate(codes) if one == code] for code in dict.fromkeys(codes)]
    assert found == [group for group in expected if len(group) > 1]


def test_a_digest_is_of_pixels_and_shape() -> None:
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    turned = np.ascontiguousarray(image.transpose(1, 0, 2)).transpose(1, 0, 2)  # the same pixels, another layout
    assert duplicates.digest(image) == duplicates.digest(turned)
    assert duplicates.digest(image) != duplicates.digest(image.reshape(4, 2, 3))
    other = image.copy()
    other[1, 3, 2] ^= 1
    assert duplicates.digest(image) != duplicates.digest(other)


@pytest.mark.parametrize(
    ("what", "least"),
    [("recompressed", 0.7), ("half the size", 0.8), ("enlarged", 0.9), ("brighter", 0.9)],
)
def test_near_copies_have_near_hashes_and_thumbnails(what: str, least: float) -> None:
    images = leaves(np.random.default_rng(1), 128, 60)
    change = {
        "recompressed": lambda image: jpeg(image, 50),
        "half the size": lambda image: np.asarray(Image.fromarray(image).resize((64, 64), Image.Resampling.LANCZOS)),
        "enlarged": lambda image: enlarged(image, 2, Image.Resampling.BICUBIC),
        "brighter": lambda image: np.clip(image.astype(int) + 5, 0, 255).astype(np.uint8),
    }[what]
    thumbs = [duplicates.thumbnail(image) for image in images]
    others = [duplicates.thumbnail(change(image)) for image in images]
    hashes = duplicates.perceptual(np.stack([thumb[..., 1] for thumb in [*thumbs, *others]]))
    found = duplicates.near_pairs(hashes)
    pairs = [(a, b) for a, b in zip(found.first.tolist(), found.second.tolist(), strict=True)]
    assert sum(b - a == 60 for a, b in pairs) >= least * 60
    assert sum(b - a != 60 for a, b in pairs) <= 3  # other images are far away
    far = [duplicates.difference(a, b) for a, b in zip(thumbs, others, strict=True)]
    assert np.mean([distance <= duplicates.LEVELS for distance in far]) >= 0.95
    strangers = [duplicates.difference(a, b) for a, b in zip(thumbs, [*thumbs[1:], thumbs[0]], strict=True)]
    assert min(strangers) > duplicates.LEVELS


def test_a_set_of_one_picture_ends_with_as_many_pairs_as_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "MOST", 1_000)
    hashes = np.arange(4_000, dtype=np.uint64)  # all of them agree in 52 bits
    found = duplicates.near_pairs(hashes)
    assert len(found.first) == 1_000 and not found.all
    assert (found.first < found.second).all() and (found.bits <= duplicates.BITS).all()

"""Frames and grids: told where they were planted, and not in clean images. The thresholds of tools/shards/tells.py are
derived here."""

from collections.abc import Callable

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.tools.pictures import Pixels, enlarged, jpeg, leaves
from tools.shards import tells

COUNT = 120
Way = Image.Resampling


def grey(images: list[Pixels]) -> np.ndarray:
    return np.stack([cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in images])


def judged(images: list[Pixels]) -> tells.Grid:
    segment = tells.segment_of(min(images[0].shape[:2]))
    assert segment is not None
    return tells.grid(grey(images), segment)


@pytest.fixture(scope="module")
def clean() -> dict[int, list[Pixels]]:
    generator = np.random.default_rng(0)
    return {size: leaves(generator, size, COUNT) for size in (16, 28, 32, 64, 128)}


def chequered(image: Pixels) -> Pixels:
    sign = np.indices(image.shape[:2]).sum(axis=0) % 2 * 2 - 1
    return np.clip(image + 2 * sign[..., None], 0, 255).astype(np.uint8)


def striped(image: Pixels) -> Pixels:
    return np.clip(image + 2 * (np.arange(image.shape[1]) % 2 * 2 - 1)[:, None], 0, 255).astype(np.uint8)


# what was done, to images of which size, the period that it leaves
TAMPERED: dict[str, tuple[Callable[[Pixels], Pixels], int, int]] = {
    "quality 85": (lambda image: jpeg(image, 85), 128, 8),
    "quality 75": (lambda image: jpeg(image, 75), 64, 8),
    "quality 50": (lambda image: jpeg(image, 50), 64, 8),
    "quality 50, shifted": (lambda image: jpeg(image, 50)[3:, 5:], 128, 8),
    "quality 10, small": (lambda image: jpeg(image, 10), 28, 8),
    "pixels twice": (lambda image: enlarged(image, 2, Way.NEAREST), 32, 2),
    "pixels twice, small": (lambda image: enlarged(image, 2, Way.NEAREST), 16, 2),
    "pixels four times": (lambda image: enlarged(image, 4, Way.NEAREST), 32, 4),
    "bilinear twice": (lambda image: enlarged(image, 2, Way.BILINEAR), 64, 2),
    "bilinear four times": (lambda image: enlarged(image, 4, Way.BILINEAR), 32, 4),
    "bicubic twice": (lambda image: enlarged(image, 2, Way.BICUBIC), 64, 2),
    "Lanczos twice": (lambda image: enlarged(image, 2, Way.LANCZOS), 64, 2),
    "chequered": (chequered, 64, 2),
    "striped": (striped, 64, 2),
}


def test_clean_images_have_no_grid_of_any_period(clean: dict[int, list[Pixels]]) -> None:
    for size in (28, 32, 64, 128):
        grid = judged(clean[size])
        assert grid.found() == {}
        raw = np.sqrt(np.maximum(0, grid.total / grid.images))
        assert raw[:2].max() < tells.DEPTH and raw[2:, 3].max() < tells.DEPTH  # even without asking how certain it is


@pytest.mark.parametrize("what", TAMPERED)
def test_a_grid_is_told_with_its_period_and_well_above_the_threshold(what: str, clean: dict[int, list[Pixels]]) -> None:
    tamper, size, period = TAMPERED[what]
    found = judged([tamper(image) for image in clean[size]]).found()
    assert found is not None and list(found) == [period]
    assert found[period] > 1.5 * tells.DEPTH


def faces(generator: np.random.Generator, size: int, count: int) -> list[Pixels]:
    """Drawings on a plain ground, in one frame of reference: eyes and shoulders are at the same columns in all."""
    found = []
    for _ in range(count):
        image = np.full((4 * size, 4 * size, 3), 255, np.uint8)  # drawn large and reduced: smooth edges
        skin, hair, dress = (tuple(int(part) for part in generator.integers(40, 230, 3)) for _ in range(3))
        unit = size // 2
        top = int(generator.integers(0, unit))
        shoulder = 5 * unit + int(generator.integers(0, unit))
        cv2.rectangle(image, (2 * unit, shoulder), (6 * unit - 1, 8 * unit), dress, -1)
        cv2.ellipse(image, (4 * unit, 3 * unit + top), (2 * unit, 2 * unit), 0, 0, 360, hair, -1)
        cv2.ellipse(image, (4 * unit, 4 * unit + top // 2), (unit, unit + top // 2), 0, 0, 360, skin, -1)
        for eye in (3 * unit, 4 * unit):
            height = 3 * unit + int(generator.integers(0, unit))
            cv2.rectangle(image, (eye + unit // 4, height), (eye + unit // 2, height + unit // 3), (20, 20, 20), -1)
        found.append(np.asarray(cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)))
    return found


@pytest.mark.parametrize("size", [64, 128])
def test_drawings_in_one_frame_of_reference_have_no_grid(size: int) -> None:
    drawn = faces(np.random.default_rng(1), size, COUNT)
    assert tells.frames(grey(drawn)).plain.all()
    depth = judged(drawn).depth()
    assert depth is not None and depth[:2].max() > tells.DEPTH  # along one axis
    assert judged(drawn).found(drawn=True) == {}


@pytest.mark.parametrize(
    ("factor", "way"), [(2, Way.NEAREST), (2, Way.BILINEAR), (2, Way.BICUBIC), (4, Way.NEAREST), (4, Way.BICUBIC)]
)
def test_enlarged_drawings_have_the_grid_of_their_factor(factor: int, way: Way) -> None:
    drawn = [enlarged(image, factor, way) for image in faces(np.random.default_rng(1), 32, COUNT)]
    assert list(judged(drawn).found(drawn=True) or {}) == [factor]


def test_strong_compression_is_told_from_good_quality(clean: dict[int, list[Pixels]]) -> None:
    depth = {q: (judged([jpeg(image, q) for image in clean[128]]).found() or {}).get(8, 0) for q in (95, 85, 50, 10)}
    assert depth[95] < depth[85] < tells.BLOCKS < depth[50] < depth[10]


def test_a_tenth_of_enlarged_images_is_enough(clean: dict[int, list[Pixels]]) -> None:
    images = [
        enlarged(image[:32, :32], 2, Way.NEAREST) if number % 10 == 0 else image
        for number, image in enumerate(clean[64])
    ]
    found = judged(images).found()
    # a tenth of the squared amplitude; four standard errors need some dozens of such images
    assert found == {} or list(found) == [2]
    assert list(judged(images * 8).found() or {}) == [2]


def test_few_images_or_flat_ones_are_not_judged(clean: dict[int, list[Pixels]]) -> None:
    assert judged(clean[64][: tells.FEWEST - 1]).found() is None
    assert judged([np.full((64, 64, 3), 7, np.uint8)] * COUNT).found() is None
    assert tells.segment_of(16) is None and tells.segment_of(17) == 16 and tells.segment_of(4000) == 64


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_frame_has_the_width_that_was_planted(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(8, 40)), data.draw(st.integers(8, 40))
    sides = [data.draw(st.integers(0, (side - 4) // 2)) for side in (height, width, height, width)]
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    image = generator.integers(100, 256, (height, width), np.uint8)
    top, right, bottom, left = sides
    inside = image[top : height - bottom, left : width - right].copy()
    image[...] = data.draw(st.integers(0, 80))
    image[top : height - bottom, left : width - right] = inside
    found = tells.frames(image[None])
    pairs = [top > 0 and bottom > 0, left > 0 and right > 0]
    assert found.width[0].tolist() == [top * pairs[0], right * pairs[1], bottom * pairs[0], left * pairs[1]]
    assert found.plain[0] == any((side > 0) and not pair for side, pair in zip(sides, pairs * 2, strict=True))


@pytest.mark.parametrize(("top", "bottom"), [(16, 24), (13, 13), (20, 19)])
@pytest.mark.parametrize("quality", [95, 75])
def test_a_letterbox_is_told_through_jpeg(top: int, bottom: int, quality: int, clean: dict[int, list[Pixels]]) -> None:
    boxed = [image.copy() for image in clean[128][:40]]
    for image in boxed:
        image[:top] = image[-bottom:] = 0
    found = tells.frames(grey([jpeg(image, quality) for image in boxed]))
    told = found.width[found.width.any(axis=1)]
    assert len(told) > 0.8 * len(boxed)
    assert np.abs(np.median(told, axis=0) - [top, 0, bottom, 0]).max() <= 1
    assert not found.width[:, 1::2].any()


def test_an_object_on_a_plain_ground_has_no_frame(clean: dict[int, list[Pixels]]) -> None:
    ground = [np.full((64, 64, 3), 255, np.uint8) for _ in range(40)]
    for number, image in enumerate(ground):
        cv2.ellipse(image, (32, 32), (12 + number % 9, 20), 30.0 * number, 0, 360, (200, 40, 40), -1)
    found = tells.frames(grey(ground))
    assert not found.width.any() and found.plain.all()
    found = tells.frames(grey(clean[64]))
    assert not found.width.any() and not found.plain.any()


def test_an_image_of_one_colour_is_blank_and_has_no_frame(clean: dict[int, list[Pixels]]) -> None:
    flat = [np.full((64, 64, 3), (9, 200, 100), np.uint8) for _ in range(3)]
    flat[1][5, 5, 1] += tells.FLAT
    flat[2][5, 5, 1] += tells.FLAT + 1
    assert tells.blank(np.stack(flat)).tolist() == [True, True, False]
    found = tells.frames(grey(flat))
    assert not found.width.any() and not found.plain.any()
    assert not tells.blank(np.stack(clean[64])).any()


def test_grey_is_seen_in_colour() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 1), np.uint8).repeat(3, axis=3)
    images[1, 7, 9, 2] ^= 1
    images[2, 0, 0, 0] ^= 128
    assert tells.grey_as_colour(images).tolist() == [True, False, False]

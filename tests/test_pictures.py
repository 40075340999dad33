"""Sheets of images and PNG files: every pixel where it belongs, nothing overwritten unasked."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from trainer.pictures import grid, pairs, png, readable_zoom, write_png


def numbered(count: int, height: int = 2, width: int = 3, channels: int = 1) -> np.ndarray:
    """Images that differ in every pixel, none of it white."""
    return (
        (np.arange(count * height * width * channels, dtype=np.int64) % 255)
        .astype(np.uint8)
        .reshape(count, height, width, channels)
    )


@settings(deadline=None)  # cores are shared
@given(
    count=st.integers(1, 7),
    columns=st.integers(1, 5),
    padding=st.integers(0, 3),
    zoom=st.integers(1, 3),
    channels=st.sampled_from([1, 3]),
)
def test_every_image_lies_in_its_place_enlarged_and_all_else_is_white(
    count: int, columns: int, padding: int, zoom: int, channels: int
) -> None:
    images = numbered(count, channels=channels)
    sheet = grid(images, columns=columns, padding=padding, zoom=zoom).copy()
    height, width = 2 * zoom + padding, 3 * zoom + padding
    assert sheet.shape == (-(-count // columns) * height + padding, columns * width + padding, channels)
    for index in range(count):
        top, left = padding + index // columns * height, padding + index % columns * width
        place = sheet[top : top + 2 * zoom, left : left + 3 * zoom]
        for y in range(zoom):
            for x in range(zoom):
                assert np.array_equal(place[y::zoom, x::zoom], images[index])
        place[:] = 255
    assert (sheet == 255).all()


def test_a_tensor_and_an_array_make_the_same_sheet() -> None:
    images = numbered(4, channels=3)
    assert np.array_equal(grid(torch.from_numpy(images), columns=2), grid(images, columns=2))


def test_reconstructions_lie_under_their_images() -> None:
    real, copies = numbered(5), 200 - numbered(5) // 2
    sheet = pairs(real, copies, columns=3, padding=0)
    factor = readable_zoom(2, 3)
    rows = sheet[::factor, ::factor].reshape(4, 2, 3, 3, 1).swapaxes(1, 2)  # row, column, height, width, channel
    assert np.array_equal(rows[0], real[:3]) and np.array_equal(rows[1], copies[:3])
    assert np.array_equal(rows[2, :2], real[3:]) and np.array_equal(rows[3, :2], copies[3:])
    assert (rows[2:, 2] == 255).all()


def test_images_and_reconstructions_of_other_shapes_are_a_bug() -> None:
    with pytest.raises(AssertionError, match="real images"):
        pairs(numbered(4), numbered(3), columns=2)


@pytest.mark.parametrize(("side", "zoom"), [(1, 64), (28, 3), (32, 2), (63, 2), (64, 1), (128, 1)])
def test_small_images_are_enlarged_until_they_can_be_seen(side: int, zoom: int) -> None:
    assert readable_zoom(side, side * 2) == readable_zoom(side * 2, side) == zoom


@pytest.mark.parametrize("images", [numbered(1).astype(np.float32), numbered(1)[0], numbered(1, channels=2)])
def test_what_is_no_uint8_image_of_1_or_3_channels_is_a_bug(images: np.ndarray) -> None:
    with pytest.raises(AssertionError):
        grid(images, columns=1)


@pytest.mark.parametrize("channels", [1, 3])
def test_all_256_levels_survive_a_png(tmp_path: Path, channels: int) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(channels, axis=2)
    path = write_png(tmp_path / "new" / "folder" / "levels.png", levels)
    with Image.open(path) as image:
        assert image.mode == {1: "L", 3: "RGB"}[channels]
        assert np.array_equal(np.array(image).reshape(16, 16, channels), levels)
    assert [file.name for file in path.parent.iterdir()] == ["levels.png"]
    assert path.read_bytes() == png(levels)


def test_a_picture_is_overwritten_only_when_that_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    first, second = numbered(2)
    write_png(path, first)
    with pytest.raises(ValueError, match=r"a\.png exists"):
        write_png(path, second)
    assert path.read_bytes() == png(first)
    write_png(path, second, overwrite=True)
    assert path.read_bytes() == png(second)


def test_a_failed_write_leaves_the_old_picture_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_png(tmp_path / "a.png", numbered(1)[0])
    before = path.read_bytes()

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="picture not written") as caught:
        write_png(path, numbered(2)[1], overwrite=True)
    assert caught.value.filename == str(path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"] and path.read_bytes() == before


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="picture not written") as caught:
        write_png(tmp_path / "file" / "a.png", numbered(1)[0])
    assert caught.value.filename == str(tmp_path / "file" / "a.png")

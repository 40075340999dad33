"""Pictures for people: sheets of images as one uint8 array, and PNG files. Shapes are NHWC and HWC, C is 1 or 3."""

import io
import os
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

Picture: TypeAlias = npt.NDArray[np.uint8]

WHITE = 255
READABLE = 64  # pixels: a smaller image is shown enlarged


def grid(images: Tensor | Picture, *, columns: int, padding: int = 2, zoom: int | None = None) -> Picture:
    """Images (N, H, W, C) uint8, row by row in a sheet of `columns`: (rows * (zoom * H + padding) + padding, ..., C).

    `padding` pixels of white lie between them and around the sheet; places without an image are white. `zoom` repeats
    every pixel that many times each way (nearest neighbour: pixels stay what they are); None takes `readable_zoom`.
    """
    array = _array(images)
    count, height, width, channels = array.shape
    assert count >= 1 and columns >= 1 and padding >= 0
    factor = readable_zoom(height, width) if zoom is None else zoom
    assert factor >= 1
    array = array.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = height * factor + padding, width * factor + padding
    rows = -(-count // columns)
    sheet = np.full((rows * height + padding, columns * width + padding, channels), WHITE, dtype=np.uint8)
    for index, image in enumerate(array):
        top, left = index // columns * height + padding, index % columns * width + padding
        sheet[top : top + image.shape[0], left : left + image.shape[1]] = image
    return sheet


def pairs(real: Tensor | Picture, reconstruction: Tensor | Picture, *, columns: int, padding: int = 2) -> Picture:
    """Images (N, H, W, C) over their reconstructions: a row of real ones, then the row of theirs, and so on.

    A last row that `columns` does not fill stays short in both.
    """
    above, below = _array(real), _array(reconstruction)
    assert above.shape == below.shape, f"{above.shape} real images, {below.shape} reconstructions"
    blank = np.full((-len(above) % columns, *above.shape[1:]), WHITE, dtype=np.uint8)
    rows: list[Picture] = []
    for start in range(0, len(above), columns):
        for images in (above, below):
            row = images[start : start + columns]
            rows.append(row if len(row) == columns else np.concatenate([row, blank]))
    return grid(np.concatenate(rows), columns=columns, padding=padding)


def readable_zoom(height: int, width: int) -> int:
    """The whole factor that makes the shorter side at least 64 pixels: 3 for 28, 2 for 32, 1 for 64 and more."""
    return -(-READABLE // min(height, width))


def png(picture: Picture) -> bytes:
    """A picture (H, W, C) uint8 as a PNG file: 8-bit grey for 1 channel, RGB for 3. Lossless."""
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] in (1, 3), (
        picture.dtype,
        picture.shape,
    )
    buffer = io.BytesIO()
    Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture).save(buffer, format="PNG")
    return buffer.getvalue()


def write_png(path: Path, picture: Picture, *, overwrite: bool = False) -> Path:
    """Writes a picture (H, W, C) uint8 aside and renames it, so that a viewer never sees half of one; returns `path`.

    ValueError if `path` exists, unless `overwrite`; OSError names `path`.
    """
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists; give another name, or allow overwriting")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(png(picture))
        temporary.replace(path)
    except OSError as error:
        if temporary.exists():
            temporary.unlink()
        raise OSError(error.errno, f"picture not written ({error.strerror})", str(path)) from error
    return path


def _array(images: Tensor | Picture) -> Picture:
    array = images.detach().cpu().numpy() if isinstance(images, Tensor) else images
    assert array.dtype == np.uint8 and array.ndim == 4 and array.shape[3] in (1, 3), (array.dtype, array.shape)
    return array

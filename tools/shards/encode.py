"""An image as bytes for a shard."""

import io
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.lib import format as npy_format
from numpy.typing import NDArray
from PIL import Image

from trainer.data.convert import Undecodable

SMALL = 64
"""Pixels: images that are no larger are stored as they are (.npy), which reads 50 times faster than PNG."""
JPEG_QUALITY = 95
WEBP_SIDE = 16_383  # pixels: 14 bits of its header


def npy(image: NDArray[np.uint8]) -> bytes:
    """uint8 (H, W, C) as an .npy file, version 1.0: 128 bytes of header, then the pixels."""
    file = io.BytesIO()
    npy_format.write_array(file, np.ascontiguousarray(image), version=(1, 0), allow_pickle=False)
    return file.getvalue()


class Encoded(NamedTuple):
    field: str
    data: bytes
    shape: tuple[int, int, int]
    """Height, width, channels as stored."""


def encode(image: NDArray[np.uint8], form: str) -> Encoded:
    """A uint8 (H, W, C) image as one of tools.shards.options.FORMATS.

    auto: npy up to 64 x 64, else JPEG of quality 95 without chroma loss. Undecodable: too large for its format.
    """
    height, width, channels = image.shape
    if form == "auto":
        form = "npy" if max(height, width) <= SMALL else "jpg"
    if form == "npy":
        return Encoded("npy", npy(image), (height, width, channels))
    if form == "jpg":
        colour = "GRAY" if channels == 1 else "RGB"
        data = simplejpeg.encode_jpeg(
            np.ascontiguousarray(image), quality=JPEG_QUALITY, colorspace=colour, colorsubsampling="444"
        )
        return Encoded("jpg", data, (height, width, channels))
    if form == "webp" and max(height, width) > WEBP_SIDE:
        raise Undecodable(f"has {width} x {height} pixels, webp holds {WEBP_SIDE:,} a side")
    picture = Image.fromarray(image[..., 0] if channels == 1 else image)
    file = io.BytesIO()
    if form == "png":
        picture.save(file, "PNG", compress_level=6)
        return Encoded("png", file.getvalue(), (height, width, channels))
    assert form == "webp"
    picture.save(file, "WEBP", lossless=True, quality=50, method=4)
    return Encoded("webp", file.getvalue(), (height, width, 3))  # it stores no grey

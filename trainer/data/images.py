"""Images as rows of a batch, uint8 (H, W, C): decoded in place where the decoder can."""

import math
import struct
import zlib
from typing import Any

import cv2
import numpy as np
import simplejpeg

from trainer.data import convert, decode
from trainer.data.config import DataConfig
from trainer.data.convert import Undecodable
from trainer.data.index import Index
from trainer.data.modality import Row

GAP = 3  # with 3 or more one does not see which (Pillow, Image.resize, reducing_gap)
_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"  # the last chunk of every PNG


class Images:
    """A modality: images of one size, or of any size where they are scaled to one here."""

    plain_kinds = ("npy",)

    def __init__(self, shape: tuple[int, int, int], *, background: tuple[int, int, int], limit: int | None = None):
        """shape: of a row. limit: pixels that an image of another size may have, as it is then scaled; None:
        other sizes are bad."""
        self.shape, self.dtype = shape, np.dtype(np.uint8)
        self._background, self._limit = background, limit
        self._size = shape[:2]
        self._space = "GRAY" if shape[2] == 1 else "RGB"
        grey = cv2.IMREAD_GRAYSCALE
        self._heads = {_png_head(*self._size, colour=0): grey if shape[2] == 1 else cv2.IMREAD_COLOR_RGB}
        if shape[2] == 3:
            self._heads[_png_head(*self._size, colour=2)] = cv2.IMREAD_COLOR_RGB

    def decode(self, data: bytes, kind: str, row: Row) -> None:
        """The common files at once; what is unusual or damaged goes to decode.py, which judges it."""
        if kind in ("jpg", "jpeg"):
            if self._jpeg(data, row):
                return
        elif kind == "png" and self._png(data, row):
            return
        height, width, channels = self.shape
        limit = height * width if self._limit is None else self._limit
        image = decode.decode(data, kind, channels=channels, max_pixels=limit, background=self._background)
        if image.shape[:2] != self._size:
            if self._limit is None:
                raise Undecodable(f"is {image.shape[0]} x {image.shape[1]}, the set holds {height} x {width}")
            image = convert.resize(image, self._size)
        row[...] = image

    def plain(self, data: bytes, kind: str) -> int | None:
        """Of .npy files of this shape."""
        try:
            header, shape = decode.npy_header(data)
        except Undecodable:
            return None
        return header if shape == self.shape and len(data) - header == int(np.prod(shape)) else None

    def _jpeg(self, data: bytes, row: Row) -> bool:
        """Whether it is an upright JPEG in grey or colour, whole, of this size or to be scaled to it; now in the
        row."""
        try:
            height, width, colour, _ = simplejpeg.decode_jpeg_header(data)
            if colour not in ("YCbCr", "RGB", "Gray") or (self.shape[2] == 1 and colour != "Gray"):
                return False
            if decode.orientation(data) != 1 or convert.scans(data) > convert.MOST_SCANS:
                return False
            if (height, width) == self._size:
                simplejpeg.decode_jpeg(data, self._space, buffer=row)
                return True
            if self._limit is None or height * width > self._limit:
                return False
            least, factor = self._reduced(height, width)
            image = simplejpeg.decode_jpeg(
                data, self._space, min_height=least[0], min_width=least[1], min_factor=factor
            )
        except ValueError:
            return False
        row[...] = convert.resize(image, self._size)
        return True

    def _reduced(self, height: int, width: int) -> tuple[tuple[int, int], int]:
        """How far the cosine transform may scale a JPEG down, which saves most of the work on a photograph: by 2 or
        more, and so that GAP times the size that is wanted is left to the filter of `resize`. Returns the least size
        and the least factor."""
        scale = GAP * max(self._size[0] / height, self._size[1] / width)
        least = (math.ceil(scale * height), math.ceil(scale * width))
        if 2 * least[0] > height or 2 * least[1] > width:
            return (0, 0), 1
        return least, 2

    def _png(self, data: bytes, row: Row) -> bool:
        """Whether it is a PNG of this size and 8 bit, of a header, one chunk of pixels and an end, whole, now in the
        row. Small images are written so. The checksum is compared here, as libpng tells the terminal of a wrong
        one."""
        flags = self._heads.get(data[:33])
        if flags is None or data[37:41] != b"IDAT" or data[-12:] != _END:
            return False
        if zlib.crc32(memoryview(data)[37:-16]) != int.from_bytes(data[-16:-12], "big"):
            return False
        if int.from_bytes(data[33:37], "big") != len(data) - 57:
            return False
        try:
            image: Any = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        except cv2.error:
            return False
        if image is None:
            return False
        if image.ndim == 2:
            row = row[..., 0]
        row[...] = image
        return True


def _png_head(height: int, width: int, *, colour: int) -> bytes:
    """Signature and IHDR of a PNG of 8 bit, not interlaced; colour 0 is grey, 2 RGB (PNG, 3rd edition, 11.2.1)."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0d" + chunk + struct.pack(">I", zlib.crc32(chunk))


def images_of(index: Index, config: DataConfig) -> Images:
    """The images of a split as the stream gives them: of their own size, which the device fits to the config's; scaled
    to the config's where sizes differ and `fit` is resize.

    ValueError where the config asks for a size or for channels that the data does not have.
    """
    height, width, channels = config.shape
    where = ", ".join(part.store.name for part in index.parts)
    if index.height is None or index.width is None or index.channels is None:
        raise ValueError(f"data.path: no image in {where} can be read; make the set again")
    if channels == 1 and index.channels.high > 1:
        raise ValueError(
            f"data.channels: 1 is not what {where} holds ({index.channels} channels); set data.channels to 3, "
            "or make the set again with `tandem data make folder SRC DEST --channels 1`"
        )
    if channels == 3 and index.channels.high == 1:
        raise ValueError(
            f"data.channels: 3 is not what {where} holds (grey images); set data.channels to 1, "
            "or make the set again with `tandem data make folder SRC DEST --channels 3`"
        )
    found = f"{index.height} x {index.width}"
    stored = (index.height.low, index.width.low)
    limit = int(config.limits.megapixels * 1e6)
    if stored[0] * stored[1] > limit:
        raise ValueError(
            f"data.limits.megapixels: {config.limits.megapixels:g} allows no image of {where} ({found}, height x "
            "width); raise it, or make the set again with `tandem data make folder SRC DEST --size N`"
        )
    if stored != (index.height.high, index.width.high):
        if config.fit != "resize":
            raise ValueError(
                f"data.fit: {config.fit} does not go with images of different sizes, as {where} holds ({found}, "
                "height x width); take data.fit=resize, which scales them as they are read, or make the set again "
                "with `tandem data make folder SRC DEST --size N`"
            )
        return Images((height, width, channels), background=config.background, limit=limit)
    if config.fit == "exact" and stored != (height, width):
        raise ValueError(
            f"data.size: {height} x {width} is not what {where} holds ({found}, height x width); "
            f"set data.size to {stored[0] if stored[0] == stored[1] else list(stored)}, take data.fit=resize, "
            "or make the set again with `tandem data make folder SRC DEST --size N`"
        )
    if config.fit in ("center", "random") and (stored[0] < height or stored[1] < width):
        raise ValueError(
            f"data.fit: {config.fit} cuts {height} x {width} out of an image, and {where} holds {found} "
            "(height x width); take data.fit=resize, or a smaller data.size"
        )
    return Images((*stored, channels), background=config.background)

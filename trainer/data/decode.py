"""Image bytes to pixels, by an allow-list of extensions: nothing here runs what it reads, and limits act before
decoding."""

import re
import struct
import zlib
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from trainer.data import convert, exif
from trainer.data.convert import Undecodable

Pixels = NDArray[np.uint8]
_WHITE = (255, 255, 255)
_NPY_MAGIC = b"\x93NUMPY"
_NPY_HEADER = re.compile(
    rb"\{'descr': '[|<>=]?u1', 'fortran_order': False, 'shape': \((\d{1,9}), (\d{1,9})(?:, ([13]))?,?\),? *\}\s*"
)
LONGEST_LABEL = 18  # digits: fits int64
_JPEG = b"\xff\xd8"
_PNG = b"\x89PNG\r\n\x1a\n"
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # a bad image is named once, by us, with its key


def decode(
    data: bytes, field: str, *, channels: int | None, max_pixels: int, background: tuple[int, int, int] = _WHITE
) -> Pixels:
    """uint8 (H, W, C) of an image. Turned as its EXIF tag says, 16 bit reduced to 8, transparency laid on `background`.

    field: the name after the key; its last extension chooses the decoder. channels: 1, 3, or None for as it is.
    Undecodable says what is wrong; more than `max_pixels` is refused before decoding.
    """
    fast = DECODERS.get(field.rpartition(".")[2].lower())
    if fast is None:
        raise Undecodable(f"the field {field} is none of {', '.join(DECODERS)}")
    if not data:
        raise Undecodable("is empty")
    header = _header(data, field)
    if header is not None:
        convert.allow(*header[:2], max_pixels=max_pixels)
    try:
        image = fast(data, channels)
        if image is None:
            image = convert.pixels(convert.open_image(data, max_pixels=max_pixels), data, background=background).image
    except (ValueError, ArithmeticError, LookupError, struct.error, cv2.error) as error:
        raise Undecodable(f"cannot be decoded ({convert.text(error)})") from error
    if channels is not None and image.shape[2] != channels:
        if channels == 1:
            raise Undecodable("is a colour image where data.channels is 1")
        image = np.repeat(image, channels, axis=2)
    return image


def shape(data: bytes, field: str, *, whole: bool = True) -> tuple[int, int, int] | None:
    """Height, width (as turned by EXIF), channels of what `decode` gives, from the bytes of an image or (not `whole`)
    its first ones; None where they do not say, or it is bad."""
    try:
        found = _header(data, field)
        if found is None:
            return convert.shape(data) if whole else None
        convert.allow(*found[:2])
        if not whole and data[:2] != _JPEG and not field.lower().endswith("npy"):
            return None  # in PNG and WebP the tag may stand last
        height, width, channels = found
        return (width, height, channels) if orientation(data) >= exif.LAID else found
    except Undecodable:
        return None


def _header(data: bytes, field: str) -> tuple[int, int, int] | None:
    """Height, width, channels as stored; None where the format's reader must find out. Undecodable: not of this
    format."""
    kind = field.rpartition(".")[2].lower()
    if kind == "npy":
        return npy_header(data)[1]
    if data[:2] == _JPEG:
        try:
            height, width, colour, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError as error:
            raise Undecodable(f"is no whole JPEG ({error})") from None
        return height, width, 1 if colour.upper() == "GRAY" else 3
    if data[:8] == _PNG and data[12:16] == b"IHDR" and len(data) >= 33:
        width, height = struct.unpack(">II", data[16:24])
        return height, width, 1 if data[25] in (0, 4) else 3
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and len(data) >= 30:
        return _webp_header(data)
    return None


def _webp_header(data: bytes) -> tuple[int, int, int] | None:
    """RFC 9649, sections 2.5 to 2.7."""
    kind = data[12:16]
    if kind == b"VP8X":
        return int.from_bytes(data[27:30], "little") + 1, int.from_bytes(data[24:27], "little") + 1, 3
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1, 3
    if kind == b"VP8 ":
        width, height = struct.unpack("<HH", data[26:30])
        return height & 0x3FFF, width & 0x3FFF, 3
    return None


def npy_header(data: bytes) -> tuple[int, tuple[int, int, int]]:
    """(bytes before the pixels, (H, W, C)) of an .npy file of uint8 (H, W) or (H, W, 1 or 3). Undecodable for any
    other:
    the header is matched, never evaluated."""
    if data[:6] != _NPY_MAGIC or len(data) < 12:
        raise Undecodable("is no .npy file")
    wide = data[6] > 1
    start = 12 if wide else 10
    end = start + int.from_bytes(data[8:start], "little")
    found = _NPY_HEADER.fullmatch(data[start:end]) if end <= 4096 else None
    if found is None:
        raise Undecodable("is no .npy file of uint8 pixels (height, width, 1 or 3)")
    height, width, channels = (int(part or 1) for part in found.groups())
    convert.allow(height, width)
    return end, (height, width, channels)


def orientation(data: bytes) -> int:
    """As the EXIF of a JPEG, PNG or WebP says, 1 to 8; 1 where there is none. Undecodable: there is one that cannot be
    read."""
    found: int | None = 1
    if data[:2] == _JPEG:
        found = exif.of_jpeg(data)
    elif data[:8] == _PNG:
        found = exif.of_png(data)
    elif data[:4] == b"RIFF":
        found = exif.of_webp(data)
    return convert.orientation(data) if found is None else found


def _jpeg(data: bytes, channels: int | None) -> Pixels | None:
    if data[:2] != _JPEG or orientation(data) != 1 or convert.scans(data) > convert.MOST_SCANS:
        return None
    try:
        colour = simplejpeg.decode_jpeg_header(data)[2].upper()
        if colour not in ("GRAY", "YCBCR", "RGB"):
            return None  # CMYK and YCCK: inks
        grey = colour == "GRAY" and channels != 3
        return np.asarray(simplejpeg.decode_jpeg(data, "GRAY" if grey else "RGB"))
    except ValueError:
        return None  # a recoverable fault is judged by the careful path, the same on every machine


def _png(data: bytes, channels: int | None) -> Pixels | None:
    if data[:8] != _PNG or len(data) < 33 or data[24] != 8 or data[25] not in (0, 2):
        return None  # 16 bit, palettes, alpha
    kinds = _png_chunks(data)
    if kinds is None or not kinds.isdisjoint((b"tRNS", b"acTL", b"eXIf")):
        return None
    return opencv(data, grey=data[25] == 0 and channels != 3)


def _png_chunks(data: bytes) -> set[bytes] | None:
    """The kinds of chunk of a PNG; None where one is cut short or changed, of which libpng would tell the terminal."""
    kinds: set[bytes] = set()
    view, at = memoryview(data), 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(view[at : at + 4], "big")
        if zlib.crc32(view[at + 4 : end]).to_bytes(4, "big") != view[end : end + 4]:
            return None
        kinds.add(data[at + 4 : at + 8])
        if data[at + 4 : at + 8] == b"IEND":
            return kinds
        at = end + 4
    return None


def _webp(data: bytes, channels: int | None) -> Pixels | None:
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or data[12:16] == b"VP8X":
        return None  # VP8X: alpha, animation, EXIF
    if data[12:16] == b"VP8L" and len(data) > 24 and data[24] & 0x10:
        return None  # alpha_is_used
    return opencv(data, grey=False)


def opencv(data: bytes, *, grey: bool) -> Pixels | None:
    flags = cv2.IMREAD_GRAYSCALE if grey else cv2.IMREAD_COLOR_RGB
    try:
        image: Any = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        return None
    if image is None or image.dtype != np.uint8:
        return None
    return np.asarray(image[..., None] if image.ndim == 2 else image)


def _npy(data: bytes, channels: int | None) -> Pixels:
    start, shape = npy_header(data)
    if len(data) - start != shape[0] * shape[1] * shape[2]:
        raise Undecodable(f"holds {len(data) - start:,} bytes of pixels, its header says {shape}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


DECODERS: dict[str, Callable[[bytes, int | None], Pixels | None]] = {
    "jpg": _jpeg,
    "jpeg": _jpeg,
    "png": _png,
    "webp": _webp,
    "npy": _npy,
}
"""Extension -> fast decoder; None hands the image to the careful path (Pillow). A new kind is one function and its
line."""


def label(data: bytes) -> int:
    """A .cls field: a class number as text. Undecodable for anything else."""
    text = data.strip()
    if len(text) > LONGEST_LABEL or not text.isdigit():
        raise Undecodable(f"holds {text[:20]!r}, not a class number")
    return int(text)

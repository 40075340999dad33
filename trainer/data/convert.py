"""The careful path from any image file to uint8 pixels: what a viewer would show, or a reason why not (cases of the
field:
16 bit, palettes with alpha, inks, turned photographs, cut files, bombs)."""

import io
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from trainer.data.config import LONGEST
from trainer.data.exif import FILL, LAID

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What may be opened, by content: readers that start other programs (EPS) or read little-used formats are left out."""
REDUCED = "reduced from 16 to 8 bit"
TURNED = "turned as EXIF says"
FLATTENED = "transparency laid on the background"
INKS = "CMYK to RGB"
SCALED = "float scaled from the given range"
MOST_SCANS = 100
"""Of a JPEG: encoders write 10, and each costs a pass over all of its pixels (CVE-2017-9614 and its like)."""
_WIDE = 16  # times the wanted side that is scaled before the centre is cut out
_NO_EXIF = ("XML:com.adobe.xmp", "xmp", "Raw profile type exif")  # where Pillow looks for an orientation too


class Undecodable(Exception):
    """An image that cannot be used. The text follows its name: `is empty`."""


class Converted(NamedTuple):
    image: NDArray[np.uint8]
    """(H, W, 1 or 3)."""
    notes: tuple[str, ...]
    """What was done to the pixels."""


def allow(height: int, width: int, *, max_pixels: int | None = None) -> None:
    """Undecodable where an image says that it is of no size, or of too large a one."""
    if not (1 <= height <= LONGEST and 1 <= width <= LONGEST):
        raise Undecodable(f"has {height} x {width} pixels, a side has 1 to {LONGEST:,}")
    if max_pixels is not None and height * width > max_pixels:
        raise Undecodable(f"has {height} x {width} pixels, at most {max_pixels:,} are allowed")


def open_image(data: bytes, *, max_pixels: int) -> Image.Image:
    """The decoded image. Undecodable: no image, cut short, larger than `max_pixels` or of more than MOST_SCANS scans
    (seen before decoding), animated."""
    image = _opened(data)
    allow(image.height, image.width, max_pixels=max_pixels)
    if (found := scans(data)) > MOST_SCANS:
        raise Undecodable(f"has {found} scans, at most {MOST_SCANS} are allowed")
    try:
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":  # MPO: a camera's JPEG with a preview behind it
            raise Undecodable(f"holds {frames} images (animated or several pages)")
        image.load()
    except (Undecodable, MemoryError):
        raise
    except Exception as error:
        raise Undecodable(f"cannot be decoded wholly ({text(error)})") from error
    return image


def shape(data: bytes) -> tuple[int, int, int]:
    """Height, width (turned), channels of what `pixels` will give, by the header. Undecodable as `open_image`."""
    image = _opened(data)
    allow(image.height, image.width)
    sides = image.width, image.height
    channels = 1 if image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I") else 3
    return (*(sides if orientation_of(image) >= LAID else sides[::-1]), channels)


def _opened(data: bytes) -> Image.Image:
    """By its header, not decoded yet."""
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise Undecodable(f"is no image of a known format ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError as error:
        raise Undecodable(f"is too large: {error}") from None
    except Exception as error:
        raise Undecodable(f"cannot be read ({text(error)})") from error
    return image


def scans(data: bytes) -> int:
    """Passes over the pixels that decoding a JPEG may take, or more; 1 of anything else. libjpeg reads one where all
    channels come in the first, and else as many as there are."""
    if data[:2] != b"\xff\xd8":
        return 1
    at, channels = 2, -1
    while data[at : at + 1] == b"\xff" and at + 9 < len(data):
        kind = data[at + 1]
        if kind == FILL:
            at += 1
            continue
        if kind in (0xC0, 0xC1):  # frames that are not progressive (ITU-T T.81, B.2.2)
            channels = data[at + 9]
        elif kind == 0xDA:
            if data[at + 4] == channels:
                return 1
            break
        at += 2 + (data[at + 2] << 8 | data[at + 3])
    return data.count(b"\xff\xda")  # among pixels no ff is followed by da


def orientation(data: bytes) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none or it cannot be read."""
    with _opened(data) as image:
        try:
            return orientation_of(image)
        except Exception as error:
            raise Undecodable(f"cannot be read ({text(error)})") from error


def pixels(
    image: Image.Image,
    data: bytes,
    *,
    background: tuple[int, int, int],
    float_range: tuple[float, float] | None = None,
) -> Converted:
    """uint8 (H, W, 1) for grey, (H, W, 3) for anything else. data: the file's bytes, which say more than the image
    does.

    16 bit: v >> 8. Transparent pixels show `background`, never the hidden colour. ICC profiles are not applied.
    """
    notes = []
    deep = _bits(image, data) == 16
    transparency = image.info.get("transparency")
    if deep and image.mode == "RGB" and transparency is not None:
        raise Undecodable("is a 16-bit colour image with one transparent value, which is not supported")
    try:
        if orientation_of(image) != 1:  # first: it leaves EXIF alone to look at
            notes.append(TURNED)
        turned = ImageOps.exif_transpose(image)
        found, more = _by_mode(turned, background=background, transparency=transparency, float_range=float_range)
    except (Undecodable, MemoryError):
        raise
    except Exception as error:
        raise Undecodable(f"cannot be converted from mode {image.mode} ({text(error)})") from error
    if deep and REDUCED not in more:
        notes.append(REDUCED)
    return Converted(np.ascontiguousarray(found), (*notes, *more))


def orientation_of(image: Image.Image) -> int:
    """By EXIF alone, as the fast decoders and viewers do it."""
    for name in _NO_EXIF:
        image.info.pop(name, None)
    found = image.getexif().get(ExifTags.Base.Orientation, 1)
    return found if found in range(1, 9) else 1


def _by_mode(
    image: Image.Image,
    *,
    background: tuple[int, int, int],
    transparency: object,
    float_range: tuple[float, float] | None,
) -> tuple[NDArray[np.uint8], list[str]]:
    mode = image.mode
    if mode == "F":
        values = np.asarray(image, np.float64)
        if float_range is None:
            raise Undecodable("is a float image; its range of values must be given")
        if not np.isfinite(values).all():
            raise Undecodable("is a float image with values that are not finite")
        low, high = float_range
        return np.clip((values - low) / (high - low) * 255, 0, 255).round().astype(np.uint8)[..., None], [SCALED]
    if mode.startswith("I"):
        whole = np.asarray(image).astype(np.int64)
        if whole.min() < 0 or whole.max() > 65_535:
            raise Undecodable("holds values outside 16 bit")
        level = (whole >> 8).astype(np.uint8)[..., None]
        if not isinstance(transparency, int):
            return level, [REDUCED]
        alpha = np.where(whole == transparency, 0, 255)[..., None]
        return _flatten(level, alpha, background), [REDUCED, FLATTENED]
    if mode in ("LA", "La"):
        pair = np.asarray(image.convert("LA"))
        return _flatten(pair[..., :1], pair[..., 1:], background), [FLATTENED]
    if mode in ("RGBA", "RGBa", "PA") or transparency is not None:
        # "1" and "L" with one transparent value become RGBA with equal colours
        four = np.asarray((image.convert("L") if mode == "1" else image).convert("RGBA"))
        colours = four[..., :1] if mode in ("1", "L") else four[..., :3]
        return _flatten(colours, four[..., 3:], background), [FLATTENED]
    if mode in ("1", "L"):
        return np.asarray(image.convert("L"))[..., None], []
    return np.asarray(image.convert("RGB")), [INKS] if mode == "CMYK" else []


def _flatten(
    colours: NDArray[np.uint8], alpha: NDArray[np.integer], background: tuple[int, int, int]
) -> NDArray[np.uint8]:
    """colours (H, W, 1 or 3) over `background`; grey stays grey on a grey background."""
    behind = np.array(background, np.uint32)
    if colours.shape[2] == 1 and len(set(background)) == 1:
        behind = behind[:1]
    share = alpha.astype(np.uint32)
    return ((colours.astype(np.uint32) * share + behind * (255 - share) + 127) // 255).astype(np.uint8)


def _bits(image: Image.Image, data: bytes) -> int:
    """Bits a channel in the file."""
    if image.format == "PNG":
        return data[24]
    if image.format == "TIFF":
        bits = image.tag_v2.get(258, (8,))  # type: ignore[attr-defined]  # BitsPerSample, TIFF 6.0
        return int(bits[0] if isinstance(bits, tuple) else bits)
    if image.format == "PPM" and image.mode == "I":
        return 16
    return 8


def text(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class Covering(NamedTuple):
    """How an image is scaled until a size is just covered: `part` of it to `scaled`, of which `centre` is cut out."""

    part: tuple[slice, slice]
    scaled: tuple[int, int]
    centre: tuple[slice, slice]


def covering(sides: tuple[int, int], size: tuple[int, int]) -> Covering:
    """sides, size: height, width. Of a strip only its middle is scaled: the whole of one of 60,000 x 1 would take 12 GB
    at 256 x 256."""
    scale = max(size[0] / sides[0], size[1] / sides[1])
    height, width = (min(side, math.ceil(_WIDE * want / scale)) for side, want in zip(sides, size, strict=True))
    scaled = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    return Covering(_middle(sides, (height, width)), scaled, _middle(scaled, size))


def _middle(sides: tuple[int, int], size: tuple[int, int]) -> tuple[slice, slice]:
    top, left = (sides[0] - size[0]) // 2, (sides[1] - size[1]) // 2
    return slice(top, top + size[0]), slice(left, left + size[1])


def resize(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Scales (Lanczos, antialiased) until `size` (height, width) is just covered, then crops the centre."""
    part, scaled, centre = covering((image.shape[0], image.shape[1]), size)
    image = image[part]
    if scaled != image.shape[:2]:
        grey = image.shape[2] == 1
        picture = Image.fromarray(image[..., 0] if grey else image)
        image = np.asarray(picture.resize((scaled[1], scaled[0]), Image.Resampling.LANCZOS))
        image = image[..., None] if grey else image
    return np.ascontiguousarray(image[centre])


def with_channels(image: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    """Grey repeated, or colour to grey by ITU-R 601 luma."""
    if image.shape[2] == channels:
        return image
    if channels == 3:
        return np.repeat(image, 3, axis=2)
    return np.asarray(Image.fromarray(image).convert("L"))[..., None]

"""Files that were made to hurt, or that no maker of sets thinks of: bad by name, cheap, and seen the same by the scan
and by the reader."""

import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from trainer.data import ShardsConfig, Stream, convert
from trainer.data import index as indices
from trainer.data.convert import Undecodable
from trainer.data.decode import decode, orientation, shape
from trainer.data.device import cover
from trainer.data.images import Images

LIMIT = 64_000_000


def saved(image: np.ndarray | Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(file, form, **options)
    return file.getvalue()


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def npy(*sides: int) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.zeros(sides, np.uint8), allow_pickle=False)
    return file.getvalue()


@pytest.fixture
def write(tmp_path: Path, tar_of: Callable[..., Path]) -> Callable[..., Path]:
    """write(field, images): a set of one split, an image a sample."""

    def write(field: str, images: list[bytes]) -> Path:
        tar_of(tmp_path / "set" / "train" / "0.tar", [(f"{n:03d}.{field}", data) for n, data in enumerate(images)])
        return tmp_path / "set"

    return write


def stream(path: Path, **options: Any) -> Stream:
    config = ShardsConfig(path=path, readers=1, prefetch=1, cache_mb=0, **options)
    return Stream(config, split="train", batch=2, rank=0, world=1, seed=0)


# ------------------------------------------------------------------ sides of nothing, and of too much
@pytest.mark.parametrize("sides", [(0, 28), (28, 0), (0, 0, 3), (65_536, 1), (1, 65_536)])
def test_an_image_without_pixels_or_with_an_endless_side_is_bad(sides: tuple[int, ...]) -> None:
    with pytest.raises(Undecodable, match=rf"^has {sides[0]} x {sides[1]} pixels, a side has 1 to 65,535"):
        decode(npy(*sides), "npy", channels=None, max_pixels=LIMIT)
    assert shape(npy(*sides), "npy") is None


def test_one_image_without_pixels_is_one_bad_sample(write: Callable[..., Path]) -> None:
    path = write("npy", [npy(8, 9, 3), npy(0, 9, 3), npy(9, 8, 3), npy(8, 8, 3)])
    one = stream(path, size=8, fit="resize")
    seen = [next(one.batches(start)).index.tolist() for start in (0, 2)]
    assert one.bad == 1 and 1 not in seen[0] + seen[1]
    assert "has 0 x 9 pixels" in one.news()[0].reason


def test_a_set_of_images_without_pixels_is_refused(write: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"^data\.path: no image in .* can be read"):
        stream(write("npy", [npy(0, 28)] * 3), size=28, channels=1, fit="resize")


def wide_png(width: int) -> bytes:
    """1 pixel high, of one grey; Pillow is not asked."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, 1, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(width + 1), 9)),
        (b"IEND", b""),
    ]
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("read", ["decode", "open_image"])
def test_a_side_that_no_camera_has_is_refused_before_decoding(read: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(Undecodable, match="has 1 x 3000000 pixels, a side has 1 to 65,535"):
        if read == "decode":
            decode(wide_png(3_000_000), "png", channels=None, max_pixels=LIMIT)
        else:
            convert.open_image(wide_png(3_000_000), max_pixels=LIMIT)


@pytest.mark.parametrize("turned", [False, True])
def test_scaling_a_strip_takes_no_more_memory_than_a_picture_does(turned: bool) -> None:
    strip = np.arange(60_000, dtype=np.uint8)[None, :, None].repeat(3, 2)
    strip = strip.transpose(1, 0, 2) if turned else strip
    tracemalloc.start()
    found = convert.resize(strip, (256, 256))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.shape == (256, 256, 3)
    assert peak < 100 * found.nbytes  # of the whole strip it would be 60,000 times
    whole = torch.from_numpy(strip.copy()).permute(2, 0, 1)[None].float()
    assert cover(whole, (16, 16)).shape == (1, 3, 16, 16)


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 90), width=st.integers(1, 90), wanted=st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_scaling_gives_the_wanted_size_of_any_other(height: int, width: int, wanted: tuple[int, int]) -> None:
    image = noise(height, width)
    assert convert.resize(image, wanted).shape == (*wanted, 3)
    scaled = cover(torch.from_numpy(image).permute(2, 0, 1)[None].float(), wanted)
    assert scaled.shape == (1, 3, *wanted)


@pytest.mark.parametrize("sides", [(8, 2_000), (2_000, 8)])
def test_of_a_strip_the_centre_is_kept(sides: tuple[int, int]) -> None:
    bright = np.zeros((*sides, 3), np.uint8)
    bright[tuple(slice(side // 2 - 4, side // 2 + 4) for side in sides)] = 200  # the middle square
    assert (convert.resize(bright, (4, 4)) > 150).all()
    assert (cover(torch.from_numpy(bright).permute(2, 0, 1)[None].float(), (4, 4)) > 150).all()


# ------------------------------------------------------------------ a JPEG of a thousand scans
def scans(count: int, *, progressive: bool = True) -> bytes:
    """A JPEG whose last scan comes `count` times more."""
    data = saved(noise(16, 16), "JPEG", progressive=progressive)
    last = data.rfind(b"\xff\xc4") if progressive else data.rfind(b"\xff\xda")
    return data[:-2] + data[last:-2] * count + data[-2:]


def readings(data: bytes) -> dict[str, Callable[[], object]]:
    modality = Images((16, 16, 3), background=(255, 255, 255))
    scaled = Images((4, 4, 3), background=(255, 255, 255), limit=LIMIT)
    return {
        "decode": lambda: decode(data, "jpg", channels=3, max_pixels=LIMIT),
        "misnamed": lambda: decode(data, "png", channels=3, max_pixels=LIMIT),
        "open_image": lambda: convert.open_image(data, max_pixels=LIMIT),
        "row": lambda: modality.decode(data, "jpg", np.empty((16, 16, 3), np.uint8)),
        "scaled": lambda: scaled.decode(data, "jpg", np.empty((4, 4, 3), np.uint8)),
    }


@pytest.mark.parametrize("read", list(readings(b"")))
def test_a_jpeg_of_many_scans_is_bad_before_it_is_decoded(read: str) -> None:
    with pytest.raises(Undecodable, match=r"^has 3\d\d scans, at most 100 are allowed"):
        readings(scans(300))[read]()
    readings(scans(20))[read]()


def filled(jpeg: bytes) -> bytes:
    """With fill bytes before its first marker (ITU-T T.81, B.1.1.2)."""
    return jpeg[:2] + b"\xff" * 3 + jpeg[2:]


def test_fill_bytes_hide_no_scans() -> None:
    with pytest.raises(Undecodable, match="scans"):
        decode(filled(scans(300)), "jpg", channels=3, max_pixels=LIMIT)
    assert convert.scans(filled(scans(300, progressive=False))) == 1


def test_a_plain_jpeg_has_one_scan_whatever_follows_it() -> None:
    """As libjpeg reads it; and its bytes need not be searched."""
    plain = scans(300, progressive=False)
    assert convert.scans(plain) == 1
    first = plain.index(b"\xff\xda")
    one_channel = plain[: first + 4] + b"\x01" + plain[first + 5 :]
    assert convert.scans(one_channel) > 300  # then it reads all


# ------------------------------------------------------------------ F1-4: PNG and WebP are turned too
def turned_by(tag: int) -> bytes:
    exif = Image.Exif()
    exif[274] = tag
    return exif.tobytes()


def late(png: bytes) -> bytes:
    """With its eXIf chunk moved behind the pixels."""
    at = png.index(b"eXIf") - 4
    end = at + 12 + int.from_bytes(png[at : at + 4], "big")
    return png[:at] + png[end:-12] + png[at:end] + png[-12:]


@pytest.mark.parametrize("form", ["png", "late png", "webp", "jpeg", "filled jpeg"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_what_lies_on_its_side_is_indexed_as_it_stands(form: str, tag: int) -> None:
    kind = form.split()[-1]
    data = saved(noise(20, 40), kind.upper(), exif=turned_by(tag))
    data = {"late png": late, "filled jpeg": filled}.get(form, bytes)(data)
    assert orientation(data) == tag
    expected = (40, 20, 3) if tag >= 5 else (20, 40, 3)
    assert decode(data, kind, channels=3, max_pixels=LIMIT).shape == expected
    assert (
        convert.pixels(convert.open_image(data, max_pixels=LIMIT), data, background=(0, 0, 0)).image.shape == expected
    )
    assert shape(data, kind) == expected
    assert shape(data[:-1], kind, whole=False) in (None, expected)  # never the other one


@pytest.mark.parametrize("form", ["png", "webp", "jpeg"])
def test_a_set_that_lies_on_its_side_is_read_at_the_size_that_it_shows(write: Callable[..., Path], form: str) -> None:
    path = write(form, [saved(noise(100, 140), form.upper(), exif=turned_by(6), **LARGE[form])] * 3)
    one = stream(path, size=(140, 100))
    assert next(one.batches(0)).data.shape == (2, 140, 100, 3)
    assert one.bad == 0


LARGE: dict[str, dict[str, object]] = {"png": {}, "webp": {"lossless": True}, "jpeg": {}}  # more than the first 4 KB


@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "CMYK"])
def test_what_is_no_exif_turns_nothing(form: str, mode: str) -> None:
    """XMP says it too; no browser listens to it, and the fast decoders do not."""
    if (mode == "CMYK") != (form == "JPEG" and mode != "RGB"):
        return
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    options: dict[str, object] = {"xmp": xmp}
    if form == "PNG":
        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", xmp.decode())
        tag = b"Exif\0\0" + turned_by(6).removeprefix(b"Exif\0\0")  # as ImageMagick writes it
        info.add_text("Raw profile type exif", f"\nexif\n{len(tag):8}\n{tag.hex()}\n")
        options = {"pnginfo": info}
    data = saved(Image.fromarray(noise(20, 40)).convert(mode), form, **options)
    image = convert.open_image(data, max_pixels=LIMIT)
    assert convert.pixels(image, data, background=(0, 0, 0)).image.shape == (20, 40, 3)
    assert decode(data, form.lower(), channels=3, max_pixels=LIMIT).shape == (20, 40, 3)
    assert shape(data, form.lower()) == (20, 40, 3)


# ------------------------------------------------------------------ fields that name another format
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("field", ["png", "jpg", "webp"])
@pytest.mark.parametrize("sides", [(20, 24), (200, 240)])
def test_a_set_whose_fields_are_misnamed_is_read(
    write: Callable[..., Path], form: str, field: str, sides: tuple[int, int]
) -> None:
    """By every reader of ours, whatever the name says."""
    path = write(field, [saved(noise(*sides), form)] * 3)
    index = indices.load(ShardsConfig(path=path, size=sides), "train")
    assert (str(index.height), str(index.width), str(index.channels)) == (str(sides[0]), str(sides[1]), "3")
    one = stream(path, size=sides)
    assert next(one.batches(0)).data.shape == (2, *sides, 3)
    assert one.bad == 0

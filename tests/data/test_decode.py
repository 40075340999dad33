"""What images look like in the wild, and the pixels that they owe."""

import io
import struct
import zlib
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from numpy.lib import format as npy_format
from PIL import Image

from trainer.data import convert
from trainer.data.convert import Undecodable
from trainer.data.decode import decode, label, orientation, shape
from trainer.data.images import Images

LIMIT = 1 << 20
RAMP = (np.arange(256) * 257).astype(np.uint16)[None].repeat(4, 0)


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


def careful(data: bytes, background: tuple[int, int, int] = (255, 255, 255), **options: object) -> convert.Converted:
    picture = convert.open_image(data, max_pixels=LIMIT)
    return convert.pixels(picture, data, background=background, **options)  # type: ignore[arg-type]


# ------------------------------------------------------------------ the right pixels, fast and careful
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("form", ["png", "webp", "npy"])
def test_lossless_formats_give_the_pixels_back(form: str, channels: int) -> None:
    image = noise(9, 14, channels)
    picture = Image.fromarray(image[..., 0] if channels == 1 else image)
    if form == "npy":
        file = io.BytesIO()
        npy_format.write_array(file, image, allow_pickle=False)
        data = file.getvalue()
    else:
        data = saved(picture, form.upper(), **({"lossless": True} if form == "webp" else {}))
    asked = 3 if form == "webp" else channels  # webp has no grey
    expected = np.repeat(image, 3, 2) if form == "webp" and channels == 1 else image
    found = decode(data, form, channels=asked, max_pixels=LIMIT)
    assert found.dtype == np.uint8
    assert np.array_equal(found, expected)
    assert shape(data, form) == (9, 14, asked)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_a_jpeg_is_what_pillow_shows(channels: int, subsampling: int) -> None:
    # a smooth picture: decoders differ by rounding there, and by chroma upsampling at edges only
    grid = np.add.outer(np.arange(40), np.arange(30)).astype(np.uint8) * 3
    image = np.stack([grid, 255 - grid, grid // 2], 2)[..., :channels]
    data = saved(
        Image.fromarray(image[..., 0] if channels == 1 else image), "JPEG", quality=95, subsampling=subsampling
    )
    found = decode(data, "jpg", channels=channels, max_pixels=LIMIT)
    expected = np.asarray(Image.open(io.BytesIO(data))).reshape(40, 30, channels)
    assert np.abs(found.astype(int) - expected).max() <= 2
    assert shape(data, "jpg") == (40, 30, channels)


def test_grey_is_repeated_where_colour_is_asked_for() -> None:
    image = noise(5, 6, 1)
    for form in ("png", "jpeg"):
        data = saved(Image.fromarray(image[..., 0]), form.upper())
        found = decode(data, form, channels=3, max_pixels=LIMIT)
        assert found.shape == (5, 6, 3)
        assert (found == found[..., :1]).all()


def test_colour_is_refused_where_grey_is_asked_for() -> None:
    with pytest.raises(Undecodable, match=r"colour image where data\.channels is 1"):
        decode(saved(Image.fromarray(noise(4, 4)), "PNG"), "png", channels=1, max_pixels=LIMIT)


def test_a_field_may_have_a_prefix_and_upper_case() -> None:
    data = saved(Image.fromarray(noise(4, 4)), "PNG")
    assert decode(data, "left.PNG", channels=3, max_pixels=LIMIT).shape == (4, 4, 3)


# ------------------------------------------------------------------ F1-1: 16 bit
def test_a_16_bit_grey_png_keeps_all_levels() -> None:
    data = saved(Image.fromarray(RAMP), "PNG")
    found = decode(data, "png", channels=1, max_pixels=LIMIT)
    assert np.array_equal(found[..., 0], np.arange(256, dtype=np.uint8)[None].repeat(4, 0))
    assert careful(data).notes == (convert.REDUCED,)


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_16_bit_tiff_of_either_byte_order_keeps_all_levels(order: str) -> None:
    image = Image.fromarray(RAMP)
    if order == ">":
        image = Image.frombytes("I;16B", (256, 4), RAMP.astype(">u2").tobytes())
    data = saved(image, "TIFF")
    assert data[:2] == (b"II" if order == "<" else b"MM")
    found = careful(data)
    assert np.array_equal(found.image[..., 0], np.arange(256, dtype=np.uint8)[None].repeat(4, 0))
    assert found.notes == (convert.REDUCED,)


def test_mode_i_is_16_bit_and_more_is_refused() -> None:
    wide = saved(Image.fromarray(RAMP.astype(np.int32)), "TIFF")
    assert Image.open(io.BytesIO(wide)).mode == "I"
    assert np.array_equal(careful(wide).image[0, :, 0], np.arange(256))
    for value in (-1, 65_536):
        with pytest.raises(Undecodable, match="outside 16 bit"):
            careful(saved(Image.fromarray(np.full((2, 2), value, np.int32)), "TIFF"))


def test_16_bit_colour_is_reduced_and_noted() -> None:
    deep = np.stack([RAMP, RAMP[:, ::-1], RAMP], 2)
    ok, data = cv2.imencode(".png", deep[..., ::-1])
    assert ok
    found = careful(data.tobytes())
    assert np.array_equal(found.image[0, :, 0], np.arange(256))
    assert np.array_equal(found.image[0, :, 1], np.arange(255, -1, -1))
    assert found.notes == (convert.REDUCED,)
    assert np.array_equal(decode(data.tobytes(), "png", channels=3, max_pixels=LIMIT), found.image)


def test_a_float_image_needs_its_range() -> None:
    data = saved(Image.fromarray(np.linspace(-1, 2, 7, dtype=np.float32)[None]), "TIFF")
    with pytest.raises(Undecodable, match=r"range of values"):
        careful(data)
    assert careful(data, float_range=(0, 1)).image[0, :, 0].tolist() == [0, 0, 0, 128, 255, 255, 255]


# ------------------------------------------------------------------ F1-2: transparency
def hidden_magenta(kind: str) -> bytes:
    """6 x 1: opaque green at the left, the rest transparent with a hidden colour."""
    if kind == "P":
        image = Image.new("P", (6, 1), 0)
        image.putpalette([255, 0, 255, 0, 255, 0])
        image.putpixel((0, 0), 1)
        return saved(image, "PNG", transparency=b"\x00\xff")
    if kind == "P index":
        image = Image.new("P", (6, 1), 0)
        image.putpalette([255, 0, 255, 0, 255, 0])
        image.putpixel((0, 0), 1)
        return saved(image, "PNG", transparency=0)
    if kind == "RGB":
        image = Image.new("RGB", (6, 1), (255, 0, 255))
        image.putpixel((0, 0), (0, 255, 0))
        return saved(image, "PNG", transparency=(255, 0, 255))
    image = Image.new("RGBA", (6, 1), (255, 0, 255, 0))
    image.putpixel((0, 0), (0, 255, 0, 255))
    return saved(image, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))


@pytest.mark.parametrize("kind", ["P", "P index", "RGB", "PNG", "WEBP"])
@pytest.mark.parametrize("background", [(255, 255, 255), (10, 20, 30)])
def test_transparent_pixels_show_the_background(kind: str, background: tuple[int, int, int]) -> None:
    field = "webp" if kind == "WEBP" else "png"
    found = decode(hidden_magenta(kind), field, channels=3, max_pixels=LIMIT, background=background)
    assert found[0].tolist() == [[0, 255, 0], *[list(background)] * 5]
    assert careful(hidden_magenta(kind)).notes == (convert.FLATTENED,)


@pytest.mark.parametrize("kind", ["L", "1", "LA", "I;16"])
def test_transparent_grey_stays_grey_on_a_grey_background(kind: str) -> None:
    if kind == "LA":
        image = Image.new("LA", (3, 1), (7, 0))
        image.putpixel((0, 0), (0, 255))
        data = saved(image, "PNG")
    elif kind == "I;16":
        data = saved(Image.fromarray(np.array([[0, 1799, 1799]], np.uint16)), "PNG", transparency=1799)
    else:
        hidden = 7 if kind == "L" else 1
        image = Image.new(kind, (3, 1), hidden)
        image.putpixel((0, 0), 0)
        data = saved(image, "PNG", transparency=255 if kind == "1" else hidden)
    found = decode(data, "png", channels=1, max_pixels=LIMIT, background=(99, 99, 99))
    assert found[0, :, 0].tolist() == [0, 99, 99]
    coloured = careful(data, background=(255, 0, 0)).image
    assert coloured.tolist() == [[[0, 0, 0], [255, 0, 0], [255, 0, 0]]]


def test_half_transparent_pixels_are_mixed() -> None:
    data = saved(Image.new("RGBA", (1, 1), (100, 0, 200, 51)), "PNG")  # 51 / 255 = 1 / 5
    found = decode(data, "png", channels=3, max_pixels=LIMIT, background=(0, 250, 100))
    assert found[0, 0].tolist() == [20, 200, 120]


# ------------------------------------------------------------------ F1-3: inks
def test_a_cmyk_jpeg_is_red_where_a_viewer_shows_red() -> None:
    data = saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    found = decode(data, "jpg", channels=3, max_pixels=LIMIT)
    assert np.abs(found.astype(int) - (255, 0, 0)).max() <= 8
    assert careful(data).notes == (convert.INKS,)
    assert shape(data, "jpg") == (16, 16, 3)


# ------------------------------------------------------------------ F1-4: turned photographs
def corner(orientation: int) -> bytes:
    """40 wide, 20 high as stored, red in the stored top left corner."""
    image = Image.new("RGB", (40, 20), (255, 255, 255))
    image.paste((255, 0, 0), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[274] = orientation
    return saved(image, "JPEG", quality=95, subsampling=0, exif=exif)


@pytest.mark.parametrize(
    ("orientation", "size", "place"),  # place of the red corner as a viewer shows it (EXIF 2.3, tag 274)
    [
        (1, (20, 40), (0, 0)), (2, (20, 40), (0, -1)), (3, (20, 40), (-1, -1)), (4, (20, 40), (-1, 0)),
        (5, (40, 20), (0, 0)), (6, (40, 20), (0, -1)), (7, (40, 20), (-1, -1)), (8, (40, 20), (-1, 0)),
    ],
)  # fmt: skip
def test_a_photograph_stands_as_its_tag_says(orientation: int, size: tuple[int, int], place: tuple[int, int]) -> None:
    data = corner(orientation)
    found = decode(data, "jpg", channels=3, max_pixels=LIMIT).astype(int)
    assert found.shape == (*size, 3)
    assert shape(data, "jpg") == (*size, 3)
    for row in (0, -1):
        for column in (0, -1):
            red = np.abs(found[row, column] - (255, 0, 0)).max() < 30
            assert red == ((row, column) == place)
    assert careful(data).notes == ((convert.TURNED,) if orientation > 1 else ())


def tiff(order: str, *entries: tuple[int, int, int, int], count: int | None = None) -> bytes:
    """The body of an EXIF segment: one directory of (tag, type, number of values, value)."""
    mark = b"II*\0" if order == "<" else b"MM\0*"
    rows = b"".join(struct.pack(f"{order}HHIHH", tag, kind, n, value, 0) for tag, kind, n, value in entries)
    return mark + struct.pack(f"{order}IH", 8, len(entries) if count is None else count) + rows + bytes(4)


def with_segments(*segments: tuple[int, bytes]) -> bytes:
    """A JPEG with these (marker, body) before its own segments."""
    plain = saved(Image.fromarray(noise(20, 40)), "JPEG")
    extra = b"".join(struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body for marker, body in segments)
    return plain[:2] + extra + plain[2:]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    "before",
    [(), ((0xE0, b"JFXX\0\0"),), ((0xE2, b"ICC" + bytes(60_000)), (0xFE, b"a comment with Exif\0\0II*\0 inside"))],
)
def test_the_tag_is_found_behind_other_segments_as_pillow_finds_it(
    order: str, before: tuple[tuple[int, bytes], ...]
) -> None:
    for value in range(1, 9):
        body = tiff(order, (271, 3, 1, 7), (274, 3, 1, value), (282, 3, 1, 1))
        data = with_segments(*before, (0xE1, b"Exif\0\0" + body))
        assert orientation(data) == value == convert.orientation(data)
    assert orientation(with_segments(*before)) == 1


@pytest.mark.parametrize(
    "body",
    [
        b"", b"XX*\0" + bytes(20), tiff("<", (271, 3, 1, 7)), tiff("<", (274, 3, 1, 9)), tiff("<", (274, 2, 1, 6)),
        tiff("<", (271, 3, 1, 7), count=9), b"II*\0\xff\xff\xff\xff",
    ],
)  # fmt: skip
def test_a_tag_that_says_nothing_sensible_is_none(body: bytes) -> None:
    data = with_segments((0xE1, b"Exif\0\0" + body))
    try:
        assert orientation(data) == 1
        assert decode(data, "jpg", channels=3, max_pixels=LIMIT).shape == (20, 40, 3)
    except Undecodable as error:
        assert "cannot be read" in str(error)


# ------------------------------------------------------------------ F1-5: damage and bombs
JPEG = saved(Image.fromarray(noise(64, 64)), "JPEG", quality=95)
PNG = saved(Image.fromarray(noise(64, 64)), "PNG")
WEBP = saved(Image.fromarray(noise(64, 64)), "WEBP", lossless=True)


@pytest.mark.parametrize(("data", "field"), [(JPEG, "jpg"), (PNG, "png"), (WEBP, "webp")])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_cut_file_is_bad(data: bytes, field: str, share: float) -> None:
    with pytest.raises(Undecodable):
        decode(data[: int(share * len(data))], field, channels=3, max_pixels=LIMIT)


@pytest.mark.parametrize("field", ["jpg", "png", "webp", "npy"])
@pytest.mark.parametrize("data", [b"", b"a text file, not an image\n" * 10, b"\xff\xd8\xff", bytes(1000)])
def test_what_is_no_image_is_bad(field: str, data: bytes) -> None:
    with pytest.raises(Undecodable):
        decode(data, field, channels=3, max_pixels=LIMIT)
    assert shape(data, field) is None


@pytest.mark.parametrize("flipped", range(40, len(PNG) - 20, len(PNG) // 12))
def test_a_changed_byte_never_gives_wrong_pixels_in_a_png(flipped: int) -> None:
    data = bytearray(PNG)
    data[flipped] ^= 0x40
    try:
        found = decode(bytes(data), "png", channels=3, max_pixels=LIMIT)
    except Undecodable:
        return
    assert np.array_equal(found, noise(64, 64))


def bomb(side: int) -> bytes:
    """A 1-bit PNG of zeros, written row by row: `side` x `side` pixels in a few kB."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))]
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(side // 8 + 1)) for _ in range(side)) + packer.flush()
    chunks += [(b"IDAT", rows), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def test_the_pixel_limit_acts_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bomb(20_000)
    assert len(data) < 60_000

    def touched(*_: object, **__: object) -> None:
        raise AssertionError("the bomb was decoded")

    monkeypatch.setattr(cv2, "imdecode", touched)
    monkeypatch.setattr(Image, "open", touched)
    with pytest.raises(Undecodable, match="20000 x 20000 pixels"):
        decode(data, "png", channels=1, max_pixels=LIMIT)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_is_bad(form: str) -> None:
    frames = [Image.new("RGB", (8, 8), (c, 0, 0)) for c in (0, 100, 200)]
    data = saved(frames[0], form, save_all=True, append_images=frames[1:])
    with pytest.raises(Undecodable, match="holds 3 images"):
        careful(data)
    if form in ("WEBP", "PNG"):
        with pytest.raises(Undecodable, match="holds 3 images"):
            decode(data, form.lower(), channels=3, max_pixels=LIMIT)


def test_a_format_that_could_start_a_program_is_not_opened() -> None:
    with pytest.raises(Undecodable, match="no image of a known format"):
        careful(saved(Image.new("RGB", (4, 4)), "EPS"))


FORMATS = {
    "JPEG": {"quality": 90},
    "PNG": {},
    "WEBP": {"quality": 80},
    "GIF": {},
    "TIFF": {"compression": "tiff_lzw"},
    "BMP": {},
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_damaged_bytes_give_pixels_or_a_reason_and_nothing_else(form: str, mode: str) -> None:
    rng = np.random.default_rng(len(form))
    whole = saved(
        Image.fromarray(noise(24, 20)).convert("RGB" if (form, mode) == ("JPEG", "P") else mode), form, **FORMATS[form]
    )  # type: ignore[arg-type]
    reasons = 0
    for _ in range(60):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), rng.integers(1, 6)):
            data[at] = rng.integers(0, 256)
        hurt = bytes(data[: rng.integers(1, len(data))] if rng.random() < 0.3 else data)
        try:
            careful(hurt)
        except Undecodable:
            reasons += 1
        for field in ("jpg", "png", "webp", "npy"):
            shape(hurt, field)
            try:
                found = decode(hurt, field, channels=3, max_pixels=24 * 20)
            except Undecodable as error:
                assert "\n" not in str(error)
            else:
                assert found.dtype == np.uint8
                assert found.shape[0] * found.shape[1] <= 24 * 20
    assert reasons > 5


# ------------------------------------------------------------------ rows of a batch
def into_row(data: bytes, kind: str, shape: tuple[int, int, int], limit: int | None = None) -> np.ndarray:
    """What a row of a batch holds after decoding."""
    batch = np.full((3, *shape), 77, np.uint8)
    Images(shape, background=(9, 8, 7), limit=limit).decode(data, kind, batch[1])
    assert (batch[0] == 77).all()
    assert (batch[2] == 77).all()
    return batch[1]


def wild() -> dict[str, tuple[bytes, str]]:
    """Files of 20 x 40 (and some others), common, unusual and damaged."""
    colour, grey = Image.fromarray(noise(20, 40)), Image.fromarray(noise(20, 40, 1)[..., 0])
    whole = {
        "jpeg": (saved(colour, "JPEG", quality=90), "jpg"),
        "grey jpeg": (saved(grey, "JPEG"), "jpeg"),
        "progressive": (saved(colour, "JPEG", progressive=True), "jpg"),
        "inks": (saved(colour.convert("CMYK"), "JPEG"), "jpg"),
        **{f"turned {n}": (corner(n), "jpg") for n in (1, 3, 6)},
        "png": (saved(colour, "PNG"), "png"),
        "grey png": (saved(grey, "PNG"), "png"),
        "deep png": (saved(Image.fromarray(RAMP[:, :40].repeat(5, 0)), "PNG"), "png"),
        "palette": (saved(colour.convert("P"), "PNG"), "png"),
        "alpha": (saved(colour.convert("RGBA"), "PNG"), "png"),
        "one bit": (saved(grey.convert("1"), "PNG"), "png"),
        "one transparent value": (saved(grey, "PNG", transparency=3), "png"),
        "described png": (saved(colour, "PNG", dpi=(72, 72)), "png"),
        "webp": (saved(colour, "WEBP", lossless=True), "webp"),
        "npy": (dumped(noise(20, 40)), "npy"),
        "grey npy": (dumped(noise(20, 40, 1)[..., 0]), "npy"),
        "a png named jpg": (saved(colour, "PNG"), "jpg"),
        "a jpeg named png": (saved(colour, "JPEG"), "png"),
        "smaller": (saved(colour.resize((10, 5)), "PNG"), "png"),
        "larger": (saved(colour.resize((80, 40)), "JPEG"), "jpg"),
    }
    hurt = {f"{name}, cut": (data[: len(data) * 2 // 3], kind) for name, (data, kind) in whole.items()}
    flipped = {}
    for name, (data, kind) in whole.items():
        changed = bytearray(data)
        changed[len(data) * 3 // 5] ^= 0x55
        flipped[f"{name}, changed"] = (bytes(changed), kind)
    return {**whole, **hurt, **flipped, "empty": (b"", "png"), "text": (b"no image", "jpg"), "zip": (b"PK", "zip")}


@pytest.mark.parametrize("channels", [1, 3])
def test_a_row_holds_what_decoding_gives_or_the_sample_is_bad_for_the_same_files(channels: int) -> None:
    good = 0
    for name, (data, kind) in wild().items():
        try:
            expected = decode(data, kind, channels=channels, max_pixels=800, background=(9, 8, 7))
        except Undecodable:
            expected = None
        if expected is None or expected.shape != (20, 40, channels):
            with pytest.raises(Undecodable):
                into_row(data, kind, (20, 40, channels))
        else:
            good += 1
            assert np.array_equal(into_row(data, kind, (20, 40, channels)), expected), name
    assert good >= (6 if channels == 1 else 16)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_other_sizes_are_scaled_into_the_row_where_that_is_asked_for(channels: int) -> None:
    good = 0
    for name, (data, kind) in wild().items():
        try:
            whole = decode(data, kind, channels=channels, max_pixels=LIMIT, background=(9, 8, 7))
        except Undecodable:
            with pytest.raises(Undecodable):
                into_row(data, kind, (16, 16, channels), limit=LIMIT)
        else:
            good += 1
            assert np.array_equal(
                into_row(data, kind, (16, 16, channels), limit=LIMIT), convert.resize(whole, (16, 16))
            ), name
    assert good >= (7 if channels == 1 else 20)
    with pytest.raises(Undecodable, match="20 x 40 pixels, at most 799"):
        into_row(PNG_20_40, "png", (16, 16, 3), limit=799)


PNG_20_40 = saved(Image.fromarray(noise(20, 40)), "PNG")


def test_a_large_jpeg_is_scaled_as_it_is_decoded_and_looks_the_same() -> None:
    small = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    image = Image.fromarray(small).resize((1200, 900), Image.Resampling.BICUBIC)
    data = saved(image, "JPEG", quality=95)
    found = into_row(data, "jpg", (48, 64, 3), limit=1200 * 900)
    expected = convert.resize(decode(data, "jpg", channels=3, max_pixels=1200 * 900), (48, 64))
    assert np.abs(found.astype(int) - expected).max() <= 3
    with pytest.raises(Undecodable, match="900 x 1200 pixels"):
        into_row(data, "jpg", (48, 64, 3), limit=1200 * 900 - 1)


def test_decoders_say_nothing_of_damaged_files_themselves(capfd: pytest.CaptureFixture[str]) -> None:
    for data, kind in wild().values():
        for limit in (None, LIMIT):
            try:
                into_row(data, kind, (20, 40, 3), limit)
            except Undecodable:
                continue
    said = capfd.readouterr()
    assert said.out + said.err == ""


# ------------------------------------------------------------------ npy, cls, json
def dumped(array: np.ndarray, write: Callable[..., None] = npy_format.write_array) -> bytes:
    file = io.BytesIO()
    write(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 3), np.float32), np.zeros((2, 3), np.uint16), np.zeros(4, np.uint8), np.zeros((2, 3, 2), np.uint8),
        np.zeros((1, 2, 3, 1), np.uint8), np.asfortranarray(np.zeros((2, 3), np.uint8)),
        np.array([[{"an": "object"}]], object),
    ],
)  # fmt: skip
def test_an_npy_of_anything_but_pixels_is_bad(array: np.ndarray) -> None:
    with pytest.raises(Undecodable, match=r"no \.npy file of uint8 pixels"):
        decode(dumped(array), "npy", channels=None, max_pixels=LIMIT)


def test_an_npy_with_missing_or_more_bytes_is_bad() -> None:
    data = dumped(np.zeros((2, 3), np.uint8))
    for wrong in (data[:-1], data + b"\0"):
        with pytest.raises(Undecodable, match="bytes of pixels"):
            decode(wrong, "npy", channels=1, max_pixels=LIMIT)


def test_an_npy_header_is_matched_and_never_evaluated() -> None:
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (__import__('os').getpid(), 3), }\n"
    data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(6)
    with pytest.raises(Undecodable):
        decode(data, "npy", channels=1, max_pixels=LIMIT)


@pytest.mark.parametrize("field", ["pyd", "pkl", "pth", "bin.gz", "", "json"])
def test_any_other_field_is_not_decoded(field: str) -> None:
    with pytest.raises(Undecodable, match="is none of"):
        decode(PNG, field, channels=3, max_pixels=LIMIT)


def test_labels_are_whole_numbers() -> None:
    assert label(b" 12\n") == 12
    for wrong in (b"", b"-1", b"1.5", b"cat", b"9" * 19, "²".encode()):
        with pytest.raises(Undecodable, match="not a class number"):
            label(wrong)


# ------------------------------------------------------------------ resizing
def test_resizing_is_antialiased_and_crops_the_centre() -> None:
    stripes = np.zeros((64, 128, 1), np.uint8)
    stripes[:, ::2] = 255  # the finest stripes: sampling without a filter would give all black or all white
    found = convert.resize(stripes, (16, 16))
    assert found.shape == (16, 16, 1)
    assert np.abs(found.astype(int) - 127).max() <= 2
    sides = np.zeros((10, 30, 3), np.uint8)
    sides[:, 10:20] = 200
    assert (convert.resize(sides, (10, 10)) == 200).all()


def test_resizing_to_the_same_size_changes_nothing() -> None:
    image = noise(12, 9)
    assert np.array_equal(convert.resize(image, (12, 9)), image)

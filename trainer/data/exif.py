"""How an image's EXIF tag says that it is to be turned, from the bytes of a file; and where such a tag may stand."""

import struct

_EXIF = b"Exif\0\0"
_ORIENTATION = 274  # EXIF 2.3, 4.6.4
FILL = 0xFF
"""May stand before a marker of a JPEG any number of times (ITU-T T.81, B.1.1.2)."""
LAID = 5
"""Orientations from here on lie on their side: height and width change places."""


def of_jpeg(data: bytes) -> int | None:
    """1 to 8; 1 where there is none, None where it cannot be told. Walks the few segments before the tables, where EXIF
    has to stand (EXIF 2.3, 4.5.4)."""
    at = 2
    while data[at : at + 1] == b"\xff" and len(data) >= at + 4:
        kind = data[at + 1]
        if kind == FILL:
            at += 1
            continue
        if kind == 0xE1 and data[at + 4 : at + 10] == _EXIF:
            return _tag(data, at + 10)
        if not (0xE0 <= kind <= 0xEF or kind == 0xFE):  # APP0 to APP15, comments
            return 1
        at += 2 + (data[at + 2] << 8 | data[at + 3])
    return 1


def of_png(data: bytes) -> int | None:
    """The same of a whole PNG, whose eXIf chunk may stand behind the pixels too (PNG, 3rd edition, 5.6)."""
    if data.find(b"eXIf") < 0:
        return 1
    at = 8
    while at + 12 <= len(data):
        if data[at + 4 : at + 8] == b"eXIf":
            return _tag(data, at + 8)
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    return 1


def of_webp(data: bytes) -> int | None:
    """The same of a whole WebP, where it stands last, and a flag at the beginning says so (RFC 9649, 2.7)."""
    if data[12:16] != b"VP8X" or not data[20] & 0x08:
        return 1
    at = 12
    while at + 8 <= len(data):
        if data[at : at + 4] == b"EXIF":
            start = at + 8
            return _tag(data, start + len(_EXIF) if data[start : start + len(_EXIF)] == _EXIF else start)
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        at += 8 + size + size % 2
    return 1


def _tag(data: bytes, start: int) -> int | None:
    """Of the first directory (TIFF 6.0, section 2); None where the directory is not as it should be."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[start : start + 4])
    if order is None:
        return None
    try:
        at = start + struct.unpack_from(f"{order}I", data, start + 4)[0]
        (count,) = struct.unpack_from(f"{order}H", data, at)
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag, kind, values, value = struct.unpack_from(f"{order}HHIH", data, entry)
            if tag == _ORIENTATION:
                return value if kind == 3 and values == 1 and 1 <= value <= 8 else None
    except struct.error:
        return None
    return 1

"""Tar shards: one scan of the headers, and the writing of plain ustar members. Member names never become paths."""

import os
from collections.abc import Iterator
from pathlib import Path
from tarfile import USTAR_FORMAT, TarInfo
from typing import NamedTuple

BLOCK = 512
RECORD = 10_240  # tar(1) pads an archive to whole records
LONGEST_HEADER = 1 << 20  # bytes of an extended header: names, no data
END = bytes(BLOCK)


class Member(NamedTuple):
    """A file inside a shard: its data is `size` bytes at `offset`; key and field as webdataset splits the name."""

    key: str
    field: str
    offset: int
    size: int


class ShardCut(Exception):
    """The shard ends before its end mark. `found` holds the members that are whole."""

    def __init__(self, found: list[Member]) -> None:
        super().__init__("ends before its end mark")
        self.found = found


def split_name(name: str) -> tuple[str, str]:
    """webdataset's rule: the field is what follows the first dot of the last part. A hidden or dotless name has no
    field."""
    folder, slash, base = name.rpartition("/")
    stem, dot, field = base.partition(".")
    return (f"{folder}{slash}{stem}", field) if stem and dot else (name, "")


def scan(path: Path) -> list[Member]:
    """The regular files of a tar, in order. Reads headers only. ShardCut where the file ends too early, ValueError
    where it is no tar or holds what a shard must not (sparse files)."""
    found: list[Member] = []
    for name, offset, size in _headers(path, found):
        key, field = split_name(name.removeprefix("./"))
        found.append(Member(key, field, offset, size))
    return found


def _headers(path: Path, found: list[Member]) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of each regular file; ustar, pax and GNU long names."""
    total = path.stat().st_size
    with path.open("rb") as file:
        descriptor = file.fileno()
        position = 0
        long_name: str | None = None
        long_size: int | None = None
        while True:
            header = os.pread(descriptor, BLOCK, position)
            if len(header) < BLOCK:
                raise ShardCut(found)
            if header == END:
                return
            _verify(header, path, position)
            kind = header[156:157]
            size = _number(header[124:136], path, position)
            data = position + BLOCK
            if kind in (b"x", b"g", b"L", b"K"):
                if size > LONGEST_HEADER:
                    raise ValueError(f"{path}: an extended header of {size} bytes at {position}; this is no shard")
                block = os.pread(descriptor, size, data)
                if len(block) < size:
                    raise ShardCut(found)
                if kind == b"L":
                    long_name = _text(block.rstrip(b"\0"))
                elif kind == b"x":
                    fields = _pax(block, path)
                    if any(key.startswith("GNU.sparse") for key in fields):
                        raise ValueError(f"{path}: holds a sparse file at {position}, which has no plain bytes to read")
                    long_name = fields.get("path", long_name)
                    long_size = int(fields["size"]) if "size" in fields else None
            else:
                size = size if long_size is None else long_size
                if kind == b"S":
                    raise ValueError(f"{path}: holds a sparse file at {position}, which has no plain bytes to read")
                if kind in (b"0", b"\0", b"7"):
                    if data + size > total:
                        raise ShardCut(found)
                    yield long_name or _name(header), data, size
                elif kind in (b"1", b"2", b"3", b"4", b"5", b"6"):
                    size = 0  # links, devices and folders have no data of ours
                long_name = long_size = None
            position = data + (size + BLOCK - 1) // BLOCK * BLOCK


def _verify(header: bytes, path: Path, position: int) -> None:
    """The header's own checksum: sum of its bytes, with the checksum's field as blanks (POSIX.1-2017, ustar)."""
    try:
        stated = int(header[148:156].strip(b"\0 ") or b"-1", 8)
    except ValueError:
        stated = -1
    if stated != sum(header) - sum(header[148:156]) + 8 * 32:
        what = "is no tar file" if position == 0 else f"is damaged at byte {position}"
        raise ValueError(f"{path}: {what}; copy it again or make it again")


def _number(field: bytes, path: Path, position: int) -> int:
    if field[0] == 0x80:  # GNU base-256, for files of 8 GiB and more
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.strip(b"\0 ") or b"0", 8)
    except ValueError:
        raise ValueError(f"{path}: is damaged at byte {position}; copy it again or make it again") from None


def _name(header: bytes) -> str:
    name = _text(header[:100].split(b"\0", 1)[0])
    prefix = _text(header[345:500].split(b"\0", 1)[0]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")


def _pax(block: bytes, path: Path) -> dict[str, str]:
    """{keyword: value} of `LENGTH keyword=value\\n` records."""
    fields, position = {}, 0
    while position < len(block) and block[position] != 0:
        digits, _, _ = block[position : position + 20].partition(b" ")
        if not digits.isdigit() or not (length := int(digits)):
            raise ValueError(f"{path}: a pax header is damaged; copy it again or make it again")
        key, _, value = block[position + len(digits) + 1 : position + length - 1].partition(b"=")
        fields[_text(key)] = _text(value)
        position += length
    return fields


def member(name: str, data: bytes) -> bytes:
    """A whole member: header, data, padding. Nothing in it depends on the clock or the user."""
    info = TarInfo(name)
    info.size = len(data)
    info.mode = 0o644
    return info.tobuf(USTAR_FORMAT) + data + bytes(-len(data) % BLOCK)


def end(position: int) -> bytes:
    """What closes an archive of `position` bytes: two empty blocks, padded to a record."""
    return bytes(2 * BLOCK + -(position + 2 * BLOCK) % RECORD)

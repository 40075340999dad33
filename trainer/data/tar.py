"""Tar shards: the headers of ustar, pax and GNU archives in one pass, and the writing of plain ustar members.

Member names never become paths. What a shard must not hold (links, devices, fifos, sparse files, absolute names, `..`)
is refused by name.
"""

import os
import re
import zlib
from collections.abc import Callable, Iterator
from tarfile import PAX_FORMAT, USTAR_FORMAT, TarInfo
from typing import Any, NamedTuple

from trainer.errors import shown as shown

BLOCK = 512
RECORD = 10_240  # tar(1) pads an archive to whole records
LONGEST_HEADER = 1 << 20  # bytes of an extended header: names, no data
END = bytes(BLOCK)
READ = 4 << 20  # bytes at a time in a pass over a whole shard
AGAIN = "copy it again or make it again"
_ADLER = 65_521  # modulus of Adler-32 (RFC 1950, section 8.2)
_FORBIDDEN = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a fifo",
    b"S": "a sparse file, which has no plain bytes to read",
}
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_META = re.compile(r"__[^/]*__(?:$|/)")  # webdataset passes such names over

At = Callable[[int, int], bytes]
"""at(position, length): the bytes there, fewer where the shard ends."""


class Member(NamedTuple):
    """A file inside a shard: its data is `size` bytes at `offset`, its headers and padding reach from `begin` to `end`.
    Key and field as webdataset splits the name, the field in lower case; no field: webdataset passes it over."""

    key: str
    field: str
    begin: int
    offset: int
    size: int
    end: int


class ShardCut(Exception):
    """The shard ends before its end mark. `found` holds the members that are whole, where a scan says so."""

    def __init__(self, found: list[Member] | None = None) -> None:
        super().__init__("ends before its end mark")
        self.found = found or []


def split_name(name: str) -> tuple[str, str]:
    """webdataset's rule: the field is what follows the first dot of the last part. Hidden and dotless names, and those
    in a folder like __meta__, have no field."""
    folder, slash, base = name.rpartition("/")
    stem, dot, field = base.partition(".")
    if not stem or not dot or (name[:2] == "__" and _META.match(name)):
        return name, ""
    return f"{folder}{slash}{stem}", field


def scan(descriptor: int, where: str) -> list[Member]:
    """The members of an open tar, in order. Reads headers only. where: its name, for messages. ShardCut where the file
    ends too early, ValueError where it is no tar or holds what a shard must not."""
    found: list[Member] = []
    total = os.fstat(descriptor).st_size
    try:
        found.extend(members(lambda at, length: os.pread(descriptor, length, at), where, total=total))
    except ShardCut:
        raise ShardCut(found) from None
    return found


def inside(data: bytes, where: str) -> list[Member]:
    """The members in the bytes of one sample (ROW's begin to end), with offsets into `data`. ValueError: damaged."""
    try:
        return list(members(lambda at, n: data[at : at + n], where, total=len(data), marked=False))
    except ShardCut:
        raise ValueError(f"{where}: ends before its last member; {AGAIN}") from None


def members(at: At, where: str, *, total: int, marked: bool = True) -> Iterator[Member]:
    """The regular files of an archive of `total` bytes, in order; `at` is asked for rising positions.

    where: the shard, for messages. marked: whether an end mark must follow the last member. ValueError, ShardCut."""
    position = begin = 0
    long_name: str | None = None
    long_size: int | None = None
    while True:
        header = at(position, BLOCK)
        if len(header) < BLOCK:
            if not header and not marked and position == begin:
                return
            raise ShardCut
        if header == END:
            return
        _verify(header, where, position)
        kind = header[156:157]
        size = _number(header[124:136], where, position)
        data = position + BLOCK
        if kind in b"xgLK":
            block = _extended(at(data, size) if size <= LONGEST_HEADER else None, size, where, position)
            if kind == b"L":
                long_name = _text(block.rstrip(b"\0"))
            elif kind == b"x":
                fields = _pax(block, where, position)
                long_name = fields.get("path", long_name)
                long_size = _number(fields["size"].encode(), where, position, 10) if "size" in fields else None
            elif kind == b"g" and {"path", "size"} & _pax(block, where, position).keys():
                raise ValueError(f"{where}: holds a name or a size for all members at {position}; this is no shard")
            position = data + -(-size // BLOCK) * BLOCK
            continue
        name = _name(header) if long_name is None else long_name
        while name.startswith("./"):
            name = name[2:]
        size = size if long_size is None else long_size
        _allow(name, kind, where, position)
        if kind == b"5" or (kind == b"\0" and name.endswith("/")):  # the latter is how version 7 wrote folders
            position = begin = data
        else:
            if data + size > total:
                raise ShardCut
            position = data + -(-size // BLOCK) * BLOCK
            key, field = split_name(name)
            yield Member(key, field.lower(), begin, data, size, position)
            begin = position
        long_name = long_size = None


def _allow(name: str, kind: bytes, where: str, position: int) -> None:
    """ValueError for what a shard must not hold."""
    if kind not in (b"0", b"\0", b"5", b"7"):
        what = _FORBIDDEN.get(kind, f"a member of the kind {kind!r}")
        raise ValueError(f"{where}: {shown(name)} is {what}, at byte {position}; pack it again, of plain files only")
    if name.startswith("/") or (".." in name and ".." in name.split("/")) or _CONTROL.search(name):
        what = "an absolute name" if name.startswith("/") else ".. in its name"
        what = "control characters in its name" if _CONTROL.search(name) else what
        raise ValueError(f"{where}: {shown(name)} has {what}, at byte {position}; pack it again with plain names")


def _verify(header: bytes, where: str, position: int) -> None:
    """The header's own checksum: sum of its bytes, with the checksum's field as blanks (POSIX.1-2017, ustar)."""
    try:
        stated = int(header[148:156].strip(b"\0 ") or b"-1", 8)
    except ValueError:
        stated = -1
    rest = 8 * 32 - sum(header[148:156])
    # the low half of Adler-32 is 1 + the sum of the bytes, modulo 65521: ten times as fast as sum()
    if stated >= 0 and (stated - rest + 1) % _ADLER == zlib.adler32(header) & 0xFFFF:
        return
    if stated == sum(header) + rest or stated == sum(byte - 256 * (byte > 127) for byte in header) + rest:
        return  # the latter is how some old programs summed: signed
    what = "is no tar file" if position == 0 else f"is damaged at byte {position}"
    if position == 0 and header[:2] in (b"\x1f\x8b", b"BZ", b"\xfd7", b"\x28\xb5"):
        what = "is compressed: unpack it to a plain tar, images are compressed already"
        raise ValueError(f"{where}: {what}")
    raise ValueError(f"{where}: {what}; {AGAIN}")


def _number(field: bytes, where: str, position: int, base: int = 8) -> int:
    if field[:1] == b"\x80":  # GNU base-256, for files of 8 GiB and more
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b"\0 ") or b"0"
    if not digits.isdigit():
        raise ValueError(f"{where}: is damaged at byte {position}; {AGAIN}")
    try:
        return int(digits, base)
    except ValueError:
        raise ValueError(f"{where}: is damaged at byte {position}; {AGAIN}") from None


def _name(header: bytes) -> str:
    name = _text(header[:100].split(b"\0", 1)[0])
    if header[345] and header[257:263] == b"ustar\0":
        prefix = _text(header[345:500].split(b"\0", 1)[0])
        return f"{prefix}/{name}"
    return name


def _text(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")


def _extended(block: bytes | None, size: int, where: str, position: int) -> bytes:
    if block is None:
        raise ValueError(f"{where}: an extended header of {size} bytes at {position}; this is no shard")
    if len(block) < size:
        raise ShardCut
    return block


def _pax(block: bytes, where: str, at: int) -> dict[str, str]:
    """{keyword: value} of `LENGTH keyword=value\\n` records. ValueError for those of a sparse file."""
    fields, position = {}, 0
    while position < len(block) and block[position] != 0:
        digits, _, _ = block[position : position + 20].partition(b" ")
        if not digits.isdigit() or not (length := int(digits)):
            raise ValueError(f"{where}: a pax header is damaged at byte {at}; {AGAIN}")
        key, _, value = block[position + len(digits) + 1 : position + length - 1].partition(b"=")
        if key.startswith(b"GNU.sparse"):
            raise ValueError(f"{where}: holds a sparse file at {at}, which has no plain bytes to read; pack it again")
        fields[_text(key)] = _text(value)
        position += length
    return fields


class Pass:
    """One pass over a whole shard in big blocks: `at` serves the scan, `digest` sums up every byte on the way."""

    def __init__(self, descriptor: int, digest: Any) -> None:
        """digest: of hashlib."""
        self.total = 0
        """Bytes read so far: after `finish`, of the shard."""
        self._descriptor, self._digest = descriptor, digest
        self._buffer = bytearray(READ + LONGEST_HEADER)
        self._view = memoryview(self._buffer)
        self._base = 0  # the shard's position of the buffer's first byte
        self._asked = 0

    def at(self, position: int, length: int) -> bytes:
        """At most LONGEST_HEADER bytes; no position below the last one."""
        assert self._asked <= position
        assert length <= LONGEST_HEADER
        self._asked = position
        while position + length > self.total and self._more(position):
            pass
        start = position - self._base
        return bytes(self._view[start : min(start + length, self.total - self._base)])

    def finish(self) -> bool:
        """Reads the rest; whether nothing but zeros follows the block that was asked for last."""
        clean = True
        while True:
            start = max(0, self._asked + BLOCK - self._base)
            rest = self._view[start : self.total - self._base]
            clean = clean and not rest.tobytes().strip(b"\0")
            if not self._more(self.total):
                return clean

    def _more(self, keep: int) -> bool:
        """Reads the next block behind the bytes from `keep` on; False at the end of the shard."""
        kept = max(0, self.total - keep)
        start = self.total - kept - self._base
        self._buffer[:kept] = self._buffer[start : start + kept]
        self._base = self.total - kept
        part = self._view[kept : kept + READ]
        count = os.preadv(self._descriptor, [part], self.total)
        self._digest.update(part[:count])
        self.total += count
        return count > 0


def member(name: str, data: bytes) -> bytes:
    """A whole member: header, data, padding. Nothing in it depends on the clock or the user."""
    info = TarInfo(name)
    info.size = len(data)
    info.mode = 0o644
    try:
        header = info.tobuf(USTAR_FORMAT)
    except ValueError:  # a name that is too long for it
        header = info.tobuf(PAX_FORMAT)
    return header + data + bytes(-len(data) % BLOCK)


def end(position: int) -> bytes:
    """What closes an archive of `position` bytes: two empty blocks, padded to a record."""
    return bytes(2 * BLOCK + -(position + 2 * BLOCK) % RECORD)

"""A file of the cache while it is fetched: grows under its lock, and gets its name when it is whole and verified."""

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from trainer import durable
from trainer.data.store import OpenShard

DIGEST = re.compile(r".*\.([0-9a-f]{16})\.[^.]*", re.DOTALL)  # of a shard's name


class Stopped(OSError):
    """The store was closed; who waits for a shard then is told so."""

    def __init__(self) -> None:
        super().__init__("data.path: the stream was closed while a shard was fetched")


class Changed(Exception):
    """The source gives other bytes than the index says; the text completes `FILE: ...`."""


class NoRoom(ValueError):
    """The cache cannot take a file; the text says why and what to do."""


Grant = Callable[[int], int]
"""Asked whether a file may have so many bytes: raises ValueError, or returns how many it may have."""


Renaming = Callable[[], contextlib.AbstractContextManager[None]]


class Part:
    """A file that grows; this process holds its lock."""

    def __init__(
        self, path: Path, file: int, *, size: int | None, stopped: Callable[[], bool], renaming: Renaming
    ) -> None:
        """size: bytes that it will have; None: not known yet. renaming: held while the file gets its name."""
        self.path, self.size, self._file, self._stopped, self._renaming = path, size, file, stopped, renaming
        self.bytes = os.fstat(file).st_size
        self.grant: Grant | None = None
        """Asked as the file grows and no index gives its size."""
        self._granted = 0

    def write(self, block: bytes | memoryview) -> None:
        """Appends. Changed where that is more than the file may have, NoRoom where the disk is full."""
        if self._stopped():
            raise Stopped
        if self.size is not None and self.bytes + len(block) > self.size:
            raise Changed(f"gives more than the {self.size:,} bytes of its index")
        self._ask(self.bytes + len(block))
        rest = memoryview(block)
        while len(rest):
            with explained(self.path.parent):
                written = os.pwrite(self._file, rest, self.bytes)
            self.bytes += written
            rest = rest[written:]

    def expect(self, size: int) -> None:
        """Changed where the source's size is not the index's; taken over where none is known."""
        if self.size is None:
            self._ask(size)
            self.size = size
        elif self.size != size:
            raise Changed(f"has {size:,} bytes, its index says {self.size:,}")

    def _ask(self, size: int) -> None:
        if self.grant is not None and size > self._granted:
            self._granted = self.grant(size)

    def restart(self) -> None:
        os.ftruncate(self._file, 0)
        self.bytes = 0

    def sha256(self) -> str:
        return durable.sha256(self.path)

    def finish(self, path: Path, name: str) -> OpenShard:
        """Flushes it and gives it its name; it is now open for reading, and this object is done."""
        with explained(self.path.parent):
            os.fsync(self._file)
            path.parent.mkdir(exist_ok=True)
            if (marked := mark(path)) is not None:
                os.utime(self._file, (time.time(), marked))
            with self._renaming():
                self.path.replace(path)
            durable.flush(path.parent)
        fcntl.flock(self._file, fcntl.LOCK_SH)
        found, self._file = OpenShard(name, self._file), -1
        return found

    def close(self, *, remove: bool = False) -> None:
        """Gives the lock up. What was fetched stays, unless it is nothing or to be removed."""
        if self._file >= 0:
            if remove or not self.bytes:
                self.path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = -1


def mark(path: Path) -> int | None:
    """The time of last change, in s, that a verified shard of this name gets: whoever writes to it takes it away. None
    for a small file."""
    found = DIGEST.fullmatch(path.name)
    return int(found[1], 16) % 10**9 if found else None


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """A folder that cannot be written, or a full disk, as one line with the key."""
    try:
        yield
    except OSError as error:
        raise no_room(folder, error) from None


def no_room(folder: Path, error: OSError) -> NoRoom:
    return NoRoom(
        f"data.remote.cache: {folder} cannot be used ({error.strerror}); name another folder, or free its disk"
    )

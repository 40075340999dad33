"""A bounded folder of fetched files that the processes of a machine share.

    CACHE/remote/SOURCE/train-00000.DIGEST.tar             whole and verified: a name appears by rename only
    CACHE/remote/SOURCE/train-00000.DIGEST.tar.BYTES.part  being fetched, or left by a process that died: gone on with
    CACHE/remote/SOURCE/DIGEST-OF-index.json/...           small files of the set as that index knows it
    CACHE/remote.lock                                      held while room is made: no file changes its name then

Locks are flocks on these files themselves: an exclusive one on a .part is the right to fetch, a shared one on a whole
file says that it is read. The kernel gives both up when a process ends, however it ends, so none goes stale.
"""

import contextlib
import errno
import fcntl
import functools
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from trainer import durable
from trainer.data.growing import DIGEST, NoRoom, Part, Stopped, explained, mark, no_room
from trainer.data.store import OpenShard

_LOOK = 0.05  # s between looks at a file that another process fetches
_NO_FLOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
PART = ".part"


class _Entry(NamedTuple):
    used: int
    """Nanoseconds: when it was last opened."""
    bytes: int
    path: Path


class Cache:
    """The files of one source in the folder; the bound is that of all sources together."""

    def __init__(self, folder: Path, source: str, *, limit: int) -> None:
        """folder: data.remote.cache. source: a name for the source's own folder. limit: bytes."""
        self.root = folder.expanduser() / "remote"
        self.folder = self.root / source
        self.limit = limit

    def path(self, name: str, sha256: str) -> Path:
        """Where a file of the source with this digest lies. ValueError for a name that is not a plain one."""
        stem, _, kind = name.rpartition(".")
        if not stem or "/" in name or "\0" in name or name.startswith("."):
            raise ValueError(f"{name!r} is no name of a file of a set; make the index again with `tandem data index`")
        assert not sha256.strip("0123456789abcdef")  # contents.py has looked: no part of a path
        return self.folder / f"{stem}.{sha256[:16]}.{kind}"

    def open(self, path: Path, size: int, name: str) -> OpenShard | None:
        """A whole file, which now counts as the one used last; None where it is not there. name: for messages."""
        try:
            found = OpenShard(name, os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except FileNotFoundError:
            return None
        except (NotADirectoryError, PermissionError) as error:
            raise no_room(self.root, error) from None
        lock(found.fd, fcntl.LOCK_SH, self.root)
        if found.bytes != size or not _verified(path, found.fd):  # somebody cut or changed it
            path.unlink(missing_ok=True)
            return None
        touch(found.fd)
        return found

    def claim(self, path: Path, size: int | None, *, stopped: Callable[[], bool], patience: float) -> Part | None:
        """The right to fetch a file. Waits while another process (or thread) does so; None when that one has finished
        it. TimeoutError when it got nothing for `patience` seconds."""
        part = _part(path, size)
        grown, since = -1, time.monotonic()
        while True:
            with explained(self.root):
                part.parent.mkdir(parents=True, exist_ok=True)
                file = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            if lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB, self.root):
                renaming = functools.partial(self._still, fcntl.LOCK_SH)
                mine = Part(part, file, size=size, stopped=stopped, renaming=renaming)
                if not _is(part, file):  # renamed or removed between open and lock
                    mine.close()
                elif path.exists():
                    mine.close(remove=True)
                    return None
                else:
                    if size is not None and mine.bytes > size:
                        mine.restart()
                    return mine
                continue
            here = os.fstat(file).st_size
            os.close(file)
            if stopped():
                raise Stopped
            if here != grown:
                grown, since = here, time.monotonic()
            elif time.monotonic() - since > patience:
                raise TimeoutError(
                    f"{part}: another process fetches it and got nothing for {patience:.0f} s; end that process"
                )
            time.sleep(_LOOK)

    def begun(self, path: Path, size: int | None) -> int:
        """Bytes of a file that somebody fetches."""
        with contextlib.suppress(FileNotFoundError):
            return _part(path, size).stat().st_size
        return 0

    def fetching(self, part: Part) -> bool:
        """Whether files but this one are fetched now, by whomever; what was left behind could have been removed."""
        return any(entry.path.name.endswith(PART) and entry.path != part.path for entry in self._entries())

    def make_room(self, part: Part, size: int, *, keep: Collection[Path]) -> None:
        """Removes the files that were used longest ago, but for `keep`, until this one of `size` bytes fits: first
        those that nobody reads, then the others too (an open file stays whole for its readers). ValueError where that
        is not enough."""
        with self._still(fcntl.LOCK_EX):
            self._make_room(part, size, keep=keep)

    @contextlib.contextmanager
    def _still(self, kind: int) -> Iterator[None]:
        """Holds the lock of all names in the folder; waits for it."""
        with explained(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            file = os.open(self.root.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            lock(file, kind, self.root)
            yield
        finally:
            os.close(file)

    def _make_room(self, part: Part, size: int, *, keep: Collection[Path]) -> None:
        entries = sorted(self._entries())
        free = shutil.disk_usage(self.folder).free
        excess = sum(entry.bytes for entry in entries if entry.path != part.path) + size - self.limit
        missing = size - part.bytes - free
        entries = [entry for entry in entries if entry.path != part.path and entry.path not in keep]
        if max(excess, missing) <= sum(entry.bytes for entry in entries):
            for kind in (fcntl.LOCK_EX, fcntl.LOCK_SH):
                for entry in entries:
                    if max(excess, missing) <= 0:
                        return
                    if self._remove(entry.path, kind):
                        excess -= entry.bytes
                        missing -= entry.bytes
                entries = [entry for entry in entries if entry.path.exists()]
        if excess > 0:
            raise NoRoom(
                f"data.remote.cache_gb: {self.limit / 1e9:g} cannot hold the shards in use and {part.path.name} "
                f"({size / 1e9:.3g} GB), {excess / 1e9:.3g} GB too much; it must hold two windows of shards: raise it, "
                "or lower data.window"
            )
        if missing > 0:
            raise NoRoom(
                f"data.remote.cache: {self.root} has {free / 1e9:.3g} GB free, {part.path.name} needs "
                f"{size / 1e9:.3g}; free some or name a folder on another disk"
            )

    def _entries(self) -> list[_Entry]:
        """Files of all sources. One that is being fetched counts with the bytes that it will have."""
        found = []
        for folder, _, names in os.walk(self.root):
            for name in names:
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):  # another process removed it
                    state = path.stat()
                    planned = name.removesuffix(PART).rpartition(".")[2] if name.endswith(PART) else ""
                    size = max(state.st_size, int(planned) if planned.isdecimal() else 0)
                    found.append(_Entry(state.st_atime_ns, size, path))
        return found

    def _remove(self, path: Path, kind: int) -> bool:
        """Whether the file is gone now. One that somebody fetches stays, and one of another user; one that somebody
        reads where `kind` is LOCK_EX."""
        file = -1
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if not lock(file, kind | fcntl.LOCK_NB, self.root) or not _is(path, file):
                return False
            path.unlink()
        except FileNotFoundError:
            return True
        except PermissionError:
            return False
        finally:
            if file >= 0:
                os.close(file)
        return True


def _verified(path: Path, file: int) -> bool:
    """Whether nobody has written to the file since its sha256 was that of its name; takes the sha256 where that is not
    known, and marks it."""
    if int(os.fstat(file).st_mtime) == mark(path):
        return True
    found = DIGEST.fullmatch(path.name)
    if found is None or durable.sha256(path)[:16] != found[1]:
        return False
    with contextlib.suppress(OSError):  # another user's
        os.utime(file, (time.time(), int(mark(path) or 0)))
    return True


def _part(path: Path, size: int | None) -> Path:
    return path.with_name(f"{path.name}.{size or 0}{PART}")


def lock(file: int, kind: int, folder: Path) -> bool:
    """Whether the lock was taken; ValueError where the file system has none."""
    try:
        fcntl.flock(file, kind)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_FLOCK:
            raise ValueError(f"data.remote.cache: {folder} is on a disk without file locks; name another") from None
        raise
    return True


def touch(file: int | Path) -> None:
    """Notes that a file is used: its time of access, since a disk may be mounted without."""
    with contextlib.suppress(OSError):  # another user's file, or a read-only folder: it counts as older than it is
        state = file.stat() if isinstance(file, Path) else os.fstat(file)
        os.utime(file, ns=(time.time_ns(), state.st_mtime_ns))


def _is(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False

"""Where shards come from: a folder, a URL, a program. Whoever reads gets a descriptor of a whole file on this machine.

This file knows folders; remote.py and pipe.py fetch whole shards into the folder that cache.py keeps.
"""

import errno
import os
import re
import stat
import threading
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # index.py opens stores
    from trainer.data.config import DataConfig
    from trainer.data.index import Shard

PIPE = "pipe:"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)")
_STEP = 128 << 10  # bytes: Linux reads no more than the disk's read_ahead_kb (128 by default) for one call


class OpenShard:
    """A whole shard on this machine. Closes itself with its last reference: nobody reads a closed descriptor."""

    def __init__(self, name: str, fd: int) -> None:
        """name: for messages. fd: now owned by this object."""
        self.name, self.fd = name, fd
        self.bytes: int = os.fstat(fd).st_size

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        self.close()


class Store(Protocol):
    """A split at its source. Errors are ValueError or OSError and name the file and what to do. Thread-safe."""

    name: str
    """Folder or URL of the split, for messages; without secrets."""

    def file(self, name: str) -> Path:
        """A small file such as index.json, on this machine. FileNotFoundError where the source has none."""

    def shards(self) -> list[str]:
        """Names of the .tar files at the source but hidden ones, sorted: for building an index."""

    def open(self, shard: "Shard") -> OpenShard:
        """The shard, whole and verified; fetched or waited for where it is remote. An empty `shard.sha256` stands for
        an unknown shard (of a set without an index): its size and digest are not compared."""

    def prepare(self, shards: "Sequence[Shard]") -> None:
        """Says that these shards are read next (those of the current window first), and returns at once: they are read
        or fetched ahead. What fails then is raised by `open`. They stay on this machine until the next call, unless
        `open` needs their room."""

    def progress(self, shard: "Shard") -> str:
        """How much of a shard that is waited for is there, for a message; empty where that cannot be told."""

    def close(self) -> None:
        """Ends the threads. Open shards stay open."""


def open_store(config: "DataConfig", path: str | Path, split: str) -> Store:
    """The store of `path`/`split`. ValueError for a URL with a secret in it, or of a kind that is not installed."""
    text = str(path)
    if is_folder(path):
        return Local(Path(path).expanduser() / split)
    from trainer.data.fetched import Fetched  # imports this file

    if text.startswith(PIPE):
        from trainer.data.pipe import Program

        if not config.allow_pipe:
            raise ValueError(
                "data.path: pipe: starts a program; if you trust it, set data.allow_pipe: true in the YAML file itself"
            )
        return Fetched(Program(text.removeprefix(PIPE), split, timeout=config.remote.timeout), config.remote)
    from trainer.data.remote import Remote

    return Fetched(Remote(text, split, timeout=config.remote.timeout), config.remote)


def is_folder(path: str | Path) -> bool:
    """Whether `data.path` is a folder of this machine, not a URL or a program."""
    return not (str(path).startswith(PIPE) or _URL.match(str(path)))


def is_shard(name: str) -> bool:
    """Whether a file of a listing counts as a shard: as for a shell's *.tar, hidden ones such as macOS's ._0.tar do
    not."""
    return name.endswith(".tar") and not name.startswith(".")


def open_file(path: Path) -> int:
    """A descriptor for reading. ValueError for what is no file: opening a pipe would wait for a writer, for ever."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    kind = os.fstat(file).st_mode
    if stat.S_ISREG(kind):
        return file
    os.close(file)
    what = "a folder" if stat.S_ISDIR(kind) else "a pipe or a device"
    raise ValueError(f"{path}: is {what}, no file; take it away, or rename it if it is no shard")


class Local:
    """A folder of shards."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, str(folder)
        self._ahead = Readahead()

    def file(self, name: str) -> Path:
        path = self.folder / name
        if not path.is_file():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return path

    def shards(self) -> list[str]:
        return sorted(entry.name for entry in os.scandir(self.folder) if is_shard(entry.name))

    def open(self, shard: "Shard") -> OpenShard:
        path = self.folder / shard.name
        try:
            found = OpenShard(str(path), open_file(path))
        except FileNotFoundError:
            raise ValueError(
                f"{path}: is missing ({shard.samples:,} samples, {shard.bytes:,} bytes); copy it again"
            ) from None
        if shard.sha256 and found.bytes != shard.bytes:
            raise ValueError(
                f"{path}: has {found.bytes:,} bytes, its index says {shard.bytes:,}; "
                "copy it again, or renew the index with `tandem data index`"
            )
        return found

    def prepare(self, shards: "Sequence[Shard]") -> None:
        self._ahead.files([self.folder / shard.name for shard in shards])

    def progress(self, shard: "Shard") -> str:
        return ""

    def close(self) -> None:
        self._ahead.close()


class Readahead:
    """One thread that asks the kernel to read files before they are needed: a shuffled read of a cold disk costs five
    times a sequential one."""

    def __init__(self) -> None:
        self._waiting: SimpleQueue[list[Path] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    def files(self, paths: Sequence[Path]) -> None:
        """Returns at once. A file that is gone is left to whoever opens it."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="readahead", daemon=True)
            self._thread.start()
        self._waiting.put(list(paths))

    def close(self) -> None:
        if self._thread is not None:
            self._closed = True
            self._waiting.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (paths := self._waiting.get()) is not None:
            room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4  # of a window that memory cannot hold
            for path in paths:
                if self._closed or room <= 0:
                    break
                try:
                    file = open_file(path)
                except (OSError, ValueError):
                    continue  # `open` names it
                try:
                    room -= advise(file)
                finally:
                    os.close(file)


def advise(file: int) -> int:
    """Asks the kernel to read a whole file into its cache; returns its bytes."""
    size = os.fstat(file).st_size
    for start in range(0, size if hasattr(os, "posix_fadvise") else 0, _STEP):  # macOS has none
        os.posix_fadvise(file, start, _STEP, os.POSIX_FADV_WILLNEED)
    return size

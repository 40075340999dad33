"""Keeps two runs out of one folder."""

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType

LEASE = 120.0
"""Seconds after which a file server has given up the locks of a machine that is gone: 90 with NFS 4 as shipped."""
NO_FLOCK = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


class RunLock:
    """`with RunLock(folder):` ValueError, naming the holder's host and process, if another process is inside.

    An flock on `folder`/.lock: the kernel gives it up when the process ends, however it ends, so no lock goes stale.
    Linux turns flock into a byte-range lock on NFS, which holds over hosts. The file stays, empty: to remove it would
    let two processes lock two files of one name. Where the file system knows no flock, the file `folder`/.lock.holder,
    created exclusively, takes its place: one of a dead process on this host is taken over, one of another host must be
    removed by hand. Rank 0 only. A child made by fork inherits the lock and holds it as long as it lives.
    """

    def __init__(self, folder: Path, *, patience: float = 0.0) -> None:
        """patience: seconds to wait for another process, which may be gone with its machine."""
        self.folder, self.patience = folder, patience
        self._descriptor: int | None = None
        self._holder: Path | None = None

    def __enter__(self) -> "RunLock":
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / ".lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._take(descriptor)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise self._refusal(_read(path)) from error
            if error.errno not in NO_FLOCK:
                raise
            self._holder = self._exclusive_file()
            return self
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, _me(), 0)
        self._descriptor = descriptor
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = None
        if self._holder is not None:
            self._holder.unlink(missing_ok=True)
            self._holder = None

    def _take(self, descriptor: int) -> None:
        until = time.monotonic() + self.patience
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES) or time.monotonic() >= until:
                    raise
            time.sleep(min(1.0, self.patience / 10))

    def _exclusive_file(self) -> Path:
        path = self.folder / ".lock.holder"
        for _ in range(2):
            mine = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}")
            mine.write_bytes(_me())
            try:
                os.link(mine, path)  # creates the name with its content in one step, on NFS too
                return path
            except FileExistsError as error:
                holder = _read(path)
                if not _dead(holder):
                    raise self._refusal(holder, f" (if it is gone, remove {path})") from error
                self._take_away(path)
            finally:
                mine.unlink(missing_ok=True)
        raise self._refusal(_read(path))

    def _take_away(self, path: Path) -> None:
        """Removes a dead process's file. By renaming, so that of two that try one gets it and sees what it got."""
        taken = path.with_name(f"{path.name}.stale.{socket.gethostname()}.{os.getpid()}")
        try:
            path.rename(taken)
        except FileNotFoundError:
            return
        if not _dead(_read(taken)):  # another process was faster, and this is its new file
            os.link(taken, path)
        taken.unlink()

    def _refusal(self, holder: dict[str, str | int], advice: str = "") -> ValueError:
        who = f"process {holder['pid']} on {holder['host']}" if {"pid", "host"} <= holder.keys() else "another process"
        return ValueError(f"run: {self.folder} is in use by {who}{advice}; wait for it, or choose another `run` folder")


def _me() -> bytes:
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode()


def _read(path: Path) -> dict[str, str | int]:
    """{} for a file that is empty, gone, or not ours: the holder may be between taking the lock and signing it."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _dead(holder: dict[str, str | int]) -> bool:
    """Whether the holder ran on this host and is no more."""
    if holder.get("host") != socket.gethostname() or not isinstance(holder.get("pid"), int):
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False

"""Files from the network: resumed where they broke off, kept in a cache folder, whole or not there."""

import contextlib
import fcntl
import hashlib
import http.client
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

TIMEOUT = 60  # seconds without a byte
TRIES = 4
PARTIAL, BEYOND = 206, 416  # RFC 9110, 15.3.7 and 15.5.17


@contextlib.contextmanager
def kept(cache: Path) -> Iterator[Path]:
    """The cache folder, for one maker at a time; a second one waits, and then finds what the first fetched."""
    folder = cache.expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def download(url: str, path: Path) -> None:
    """`url` as `path`, which appears when it is whole. PATH.part is gone on with. OSError after some tries."""
    aside = path.with_name(f"{path.name}.part")
    for left in reversed(range(TRIES)):
        try:
            _append(url, aside)
        except urllib.error.HTTPError as error:
            if error.code == BEYOND:  # what is there is no beginning of it
                aside.unlink(missing_ok=True)
            if not left or (error.code < 500 and error.code != BEYOND):
                raise
        except (OSError, http.client.HTTPException) as error:
            if not left:
                raise OSError(f"{url}: {error}") from None
        else:
            aside.replace(path)
            return


def _append(url: str, aside: Path) -> None:
    there = aside.stat().st_size if aside.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={there}-"} if there else {})  # noqa: S310
    with urllib.request.urlopen(request, timeout=TIMEOUT) as source:  # noqa: S310
        with aside.open("ab" if source.status == PARTIAL else "wb") as file:
            shutil.copyfileobj(source, file)
        if source.length:  # bytes that were promised and did not come
            raise OSError(f"ended {source.length:,} bytes too early")


def sha512(path: Path) -> bytes:
    digest = hashlib.sha512()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()


def run(command: list[str], folder: Path) -> None:
    """A program in `folder`, without a shell or a keyboard. OSError has the last line that it said."""
    done = subprocess.run(
        command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise OSError(f"{command[0]} says: {lines[-1] if lines else f'exit code {done.returncode}'}")

"""A store whose shards are fetched whole into the cache of this machine: once for all its ranks, and ahead of need."""

import hashlib
import os
import random
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from trainer.data.cache import Cache, touch
from trainer.data.config import RemoteConfig
from trainer.data.growing import Changed, NoRoom, Part, Stopped
from trainer.data.store import OpenShard, advise

if TYPE_CHECKING:
    from trainer.data.index import Shard

T = TypeVar("T")
_LEAST = 64 << 10  # bytes that a request must bring in time, and that make a broken one count as a good one
_LONGEST = 60.0  # s of a pause
_STARTS = 60  # the first pause is this part of data.remote.timeout
_SMALL = 256 << 20  # bytes of index.json or a table: a million shards, or six million samples of one
_LOOK = 0.1  # s between looks for room
_STEP = 16 << 20  # bytes of a file of unknown size for which room is made at a time


class TryAgain(Exception):
    """A request failed in a way that may pass; the text completes `FILE: ...`."""

    def __init__(self, problem: str, *, pause: float = 0.0) -> None:
        """pause: seconds that the server asks for."""
        super().__init__(problem)
        self.pause = pause


class Pace:
    """The least that a request must bring: _LEAST bytes in each `timeout` seconds, until it is at its end. One byte now
    and then would hold all ranks for as long as a server likes."""

    def __init__(self, timeout: float) -> None:
        self._timeout, self._since, self._bytes = timeout, time.monotonic(), 0

    def __call__(self, count: int) -> None:
        """More bytes have come. TryAgain where they are too few."""
        self._bytes += count
        now = time.monotonic()
        if now - self._since <= self._timeout:
            return
        if self._bytes < _LEAST:
            raise TryAgain(f"gave {self._bytes:,} bytes in {self._timeout:g} s, fewer than {_LEAST:,}")
        self._since, self._bytes = now, 0


class Source(Protocol):
    name: str
    """Of the split, without secrets."""
    key: str
    """What no other source has; is kept as a digest."""

    def names(self) -> list[str]:
        """Of the .tar files."""

    def more(self, name: str, part: Part) -> bool:
        """One request: appends to `part` what comes next of the file; whether it is whole now. TryAgain, Changed,
        FileNotFoundError, or ValueError and OSError that say what to do."""


class Fetched:
    """A store over a source."""

    def __init__(self, source: Source, config: RemoteConfig) -> None:
        self.name, self._source, self._config = source.name, source, config
        readable = re.sub(r"[^A-Za-z0-9._-]+", "-", source.name)[-80:].lstrip(".-")
        key = hashlib.sha256(source.key.encode()).hexdigest()[:16]
        self._cache = Cache(config.cache, f"{readable}-{key}", limit=int(config.cache_gb * 1e9))
        self._index: Path | None = None
        self._unknown: dict[str, tuple[Path, int]] = {}  # shards that no index names: where they are now, bytes
        self._window: frozenset[Path] = frozenset()  # of the last `prepare`
        self._waiting: deque[Shard] = deque()
        self._news = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._closed = threading.Event()

    def file(self, name: str) -> Path:
        """index.json is fetched once by each process, since it may have changed; what belongs to it lies under its
        digest."""
        self._cache.path(name, "")  # a plain name
        if self._index is None or not self._index.exists():
            self._index = self._small("index.json", None)
        path = self._index.parent / name
        if not path.exists():
            return self._small(name, path)
        touch(path)
        return path

    def shards(self) -> list[str]:
        return sorted(self._retried(self.name, self._source.names))

    def open(self, shard: "Shard") -> OpenShard:
        return self._open(shard, needed=True)

    def _open(self, shard: "Shard", *, needed: bool) -> OpenShard:
        """needed: now, so that what is only prepared makes way for it."""
        where = f"{self.name}/{shard.name}"
        while True:  # once, unless another process removes the file in this moment
            path, size = self._place(shard)
            if found := self._cache.open(path, size, where) or self._fetch(shard, where, needed=needed):
                return found

    def prepare(self, shards: "Sequence[Shard]") -> None:
        window = {self._place(shard)[0]: shard for shard in shards}
        with self._news:
            self._window = frozenset(window)
            self._waiting = deque(window.values())
            self._news.notify_all()
            while len(self._threads) < min(self._config.ahead, len(self._waiting)) and not self._closed.is_set():
                self._threads.append(threading.Thread(target=self._run, name="fetch", daemon=True))
                self._threads[-1].start()

    def progress(self, shard: "Shard") -> str:
        path, size = self._place(shard)
        found = self._cache.begun(path, size if shard.sha256 else None)
        return f"{found:,} of {size:,} bytes" if shard.sha256 else f"{found:,} bytes"

    def close(self) -> None:
        """Does not wait for a request that stalls: its thread ends when the request does."""
        self._closed.set()
        with self._news:
            self._news.notify_all()

    def _run(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._waiting or self._closed.is_set())
                if self._closed.is_set():
                    return
                shard = self._waiting.popleft()
            try:
                advise(self._open(shard, needed=False).fd)
            except (OSError, ValueError):
                continue  # `open` tries again when the shard is needed, and says what is wrong

    def _place(self, shard: "Shard") -> tuple[Path, int]:
        """The file of a shard in the cache, and its bytes."""
        if not shard.sha256 and shard.name in self._unknown:
            return self._unknown[shard.name]
        return self._cache.path(shard.name, shard.sha256), shard.bytes

    def _fetch(self, shard: "Shard", where: str, *, needed: bool) -> OpenShard | None:
        """None where another process or thread has fetched it meanwhile."""
        path, size = self._place(shard)
        part = self._claim(path, size if shard.sha256 else None)
        if part is None:
            return None
        try:
            if not shard.sha256:
                if shard.name in self._unknown:  # fetched while this thread waited
                    return None
                part.restart()  # what another process left may be of another file
            if part.size is None:
                part.grant = lambda wanted: self._room(part, wanted + _STEP, needed=needed)
            else:
                self._room(part, part.size, needed=needed)
            if self._differs(part, shard, where) and (problem := self._differs(part, shard, where)):
                raise ValueError(
                    f"{where}: {problem}, and so it was when it was fetched again: it changed since its index was "
                    "made; copy the shard again, or the whole set with its index"
                )
            if not shard.sha256:
                path = self._cache.path(shard.name, part.sha256())
                self._unknown[shard.name] = path, part.bytes
                with self._news:
                    self._window |= {path}
            return part.finish(path, where)
        finally:
            part.close()

    def _room(self, part: Part, size: int, *, needed: bool) -> int:
        keep = self._window
        while True:
            try:
                self._cache.make_room(part, size, keep=keep)
            except NoRoom:
                if not needed or (not keep and not self._cache.fetching(part)):
                    raise
                if not keep and self._closed.wait(_LOOK):  # files that are fetched now can go when they are whole
                    raise Stopped from None
                keep = frozenset()
            else:
                return size

    def _differs(self, part: Part, shard: "Shard", where: str) -> str | None:
        """Fetches what is missing; in what the whole differs from its index. It is then forgotten."""
        try:
            self._complete(part, shard.name, where)
            digest = part.sha256() if shard.sha256 else ""
            if digest == shard.sha256:
                return None
            if part.bytes != shard.bytes:
                problem = f"has {part.bytes:,} bytes, its index says {shard.bytes:,}"
            else:
                problem = f"has the sha256 {digest[:16]}..., its index says {shard.sha256[:16]}..."
        except Changed as found:
            problem = str(found)
        except FileNotFoundError:
            raise ValueError(
                f"{where}: is missing ({shard.samples:,} samples, {shard.bytes:,} bytes); copy it again"
            ) from None
        part.restart()
        return problem

    def _small(self, name: str, path: Path | None) -> Path:
        """Fetches a small file. path: where to; None: under its own digest, by each process for itself."""
        own = self._cache.folder / f"{os.getpid()}-{threading.get_ident()}-{name}"
        part = self._claim(path or own, None)
        if part is None:
            assert path is not None
            return path  # another process or thread has fetched it meanwhile
        where = f"{self.name}/{name}"

        def small(wanted: int) -> int:
            if wanted > _SMALL:
                raise NoRoom(f"{where}: is larger than {_SMALL:,} bytes, which no index is")
            return _SMALL

        part.grant = small
        try:
            part.restart()  # what another process left may be of another file
            self._complete(part, name, where)
            path = path or self._cache.folder / part.sha256()[:16] / name
            part.finish(path, name).close()
            return path
        except Changed as problem:
            raise OSError(f"{self.name}/{name}: {problem}: it changed while it was fetched; start again") from None
        finally:
            part.close(remove=True)

    def _claim(self, path: Path, size: int | None) -> Part | None:
        tries = self._config.retries + 1
        patience = tries * (2 * self._config.timeout + _LONGEST)  # more than a process needs that is alive
        return self._cache.claim(path, size, stopped=self._closed.is_set, patience=patience)

    def _complete(self, part: Part, name: str, where: str) -> None:
        while not self._retried(where, lambda: self._source.more(name, part), lambda: part.bytes):
            pass

    def _retried(self, where: str, request: Callable[[], T], done: Callable[[], int] = lambda: 0) -> T:
        """The result of a request that may be made again. done: bytes so far; a request that broke but brought many
        does not count as failed."""
        failed = 0
        while not self._closed.is_set():
            before = done()
            try:
                return request()
            except TryAgain as problem:
                failed = 1 if done() - before >= _LEAST else failed + 1
                if failed > self._config.retries:
                    often = f", {failed} times in a row" if failed > 1 else ""
                    raise OSError(
                        f"{where}: {problem}{often}; see whether the server can be reached, then "
                        "start again: what was fetched is kept"
                    ) from None
                pause = min(self._config.timeout / _STARTS * 2 ** (failed - 1), _LONGEST)
                pause = max(pause * random.uniform(0.5, 1.5), min(problem.pause, _LONGEST))  # noqa: S311 spreads ranks
            self._closed.wait(pause)
        raise Stopped

"""Whether the shards of a folder are still those of its index: before the first step, cheap enough to be always on."""

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from trainer import durable
from trainer.data import tar
from trainer.data.bar import bar
from trainer.data.config import Reading
from trainer.data.store import OpenShard, open_file
from trainer.data.table import Shard, table_bytes, table_name

STATS = 8  # threads that ask for sizes: a network file system answers one question in a millisecond
HASHERS = min(4, os.cpu_count() or 1)
SHOWN = 3  # faults in a message
MARKS = "checked.json"


class Seen(NamedTuple):
    """A file's size in bytes and the time in ns of its last change; -1 where there is none.

    The later one of mtime and ctime: a copy may keep the old mtime (cp -p, rsync -t, tar -x), nobody sets a ctime. Of
    a symbolic link its own times count too: it may point at another, older file now."""

    bytes: int
    time: int


def cache_of(config: Reading, path: str | Path) -> Path:
    """The folder in `data.remote.cache` for what belongs beside the shards of `path` and cannot be there."""
    text = str(path) if "://" in str(path) else str(Path(path).expanduser().absolute())
    return Path(config.remote.cache).expanduser() / "index" / hashlib.sha256(text.encode()).hexdigest()[:16]


@contextlib.contextmanager
def locked(cache: Path) -> Iterator[None]:
    """One process of this machine at a time; the others wait. Without a lock where the cache cannot hold one: what
    they write is equal and gets its name when it is whole."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        file = os.open(cache / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError:
        yield
        return
    try:
        with contextlib.suppress(OSError):  # a file system without flock
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def verify(folder: Path, tables: Path, shards: Sequence[Shard], config: Reading, again: str) -> None:
    """ValueError where a shard is missing or not of its index's size, where a table is, and (`data.verify`: touched)
    where a shard was written after its table and its sha256 is another. folder: of the shards; tables: of theirs."""
    # where the index lies in the cache, a link on the way to the folder may lead to another one now
    led = _led(folder) if tables != folder else 0
    seen = _look([f"{folder}/{shard.name}" for shard in shards], led)
    beside = _look([f"{tables}/{table_name(shard.name)}" for shard in shards], None)
    faults = [fault for shard, found in zip(shards, seen, strict=True) if (fault := size_fault(folder, shard, found))]
    refuse(faults)
    for shard, found in zip(shards, beside, strict=True):
        if found.bytes != table_bytes(shard.samples):
            what = "is missing" if found.bytes < 0 else f"has {found.bytes:,} bytes, not those of its samples"
            faults.append(f"{tables / table_name(shard.name)}: {what}; copy it beside index.json, or {again}")
    refuse(faults)
    if config.verify == "size":
        return
    touched = [number for number in range(len(shards)) if seen[number].time >= beside[number].time]
    if touched:
        _compare(folder, tables, shards, touched, led, cache_of(config, folder))


def size_fault(folder: Path, shard: Shard, found: Seen) -> str | None:
    """What of a shard's size is not as its index says, with what is there."""
    if found.bytes == shard.bytes:
        return None
    path = folder / shard.name
    if found.bytes < 0:
        return f"{path}: is missing ({shard.samples} samples, {shard.bytes:,} bytes); copy it again"
    return (
        f"{path}: expected {shard.samples} samples in {shard.bytes:,} bytes, found {found.bytes:,} bytes "
        f"({_whole(path)}); copy the shard again, or renew the index with `tandem data index`"
    )


def _whole(path: Path) -> str:
    try:
        with contextlib.closing(OpenShard(str(path), open_file(path))) as file:
            return f"{len({member.key for member in tar.scan(file.fd, str(path))})} samples"
    except tar.ShardCut as cut:
        return f"about {len({member.key for member in cut.found})} samples"
    except ValueError:
        return "not a whole tar"


def _look(paths: Sequence[str], led: int | None) -> list[Seen]:
    """`_see` of each file, by threads in even parts."""
    part = max(64, -(-len(paths) // STATS))
    parts = [paths[start : start + part] for start in range(0, len(paths), part)]
    with ThreadPoolExecutor(STATS, thread_name_prefix="stat") as pool:
        return [one for some in pool.map(lambda some: [_see(path, led) for path in some], parts) for one in some]


def _see(path: str, led: int | None) -> Seen:
    """led: when a link on the way to it was made, which counts as the file's own links do; None: no link counts."""
    try:
        found = os.stat(path)  # noqa: PTH116  a hundred thousand of them
        times = [_time(found)]
        if led is not None:
            times += [led, _time(os.lstat(path))]
    except FileNotFoundError:
        return Seen(-1, -1)
    return Seen(found.st_size, max(times))


def _led(folder: Path) -> int:
    """The time in ns at which the last symbolic link on the way to a folder was made; 0 where there is none."""
    way = folder.absolute()
    return max([_time(part.lstat()) for part in (way, *way.parents) if part.is_symlink()], default=0)


def _time(found: os.stat_result) -> int:
    return max(found.st_mtime_ns, found.st_ctime_ns)


def _compare(folder: Path, tables: Path, shards: Sequence[Shard], touched: list[int], led: int, cache: Path) -> None:
    """By sha256, once: the time of a table, or a mark in the cache where that cannot be set, says that it was done."""
    with locked(cache):
        marks = _marks(cache)
        left = [number for number in touched if not _known(folder, tables, shards[number], led, marks)]
        faults = []
        with bar("comparing", len(left)) as advance, ThreadPoolExecutor(HASHERS, thread_name_prefix="sha256") as pool:
            digests = pool.map(lambda number: durable.sha256(folder / shards[number].name), left)
            for number, digest in zip(left, digests, strict=True):
                shard, path = shards[number], folder / shards[number].name
                if digest == shard.sha256:
                    _mark(tables / table_name(shard.name), _see(str(path), led), shard, marks)
                else:
                    advice = "copy the shard again, or renew the index with `tandem data index`"
                    faults.append(f"{path}: its bytes changed (another sha256 than in index.json); {advice}")
                advance(1)
        if marks:
            with contextlib.suppress(OSError):  # no cache either: the next run compares again
                aside = cache / f".{MARKS}.part"
                aside.write_text(json.dumps(marks), encoding="utf-8")
                aside.replace(cache / MARKS)
        refuse(faults)


def _known(folder: Path, tables: Path, shard: Shard, led: int, marks: Mapping[str, list[int | str]]) -> bool:
    """Whether another process has compared the shard since, or this one before."""
    seen = _see(f"{folder}/{shard.name}", led)
    later = _see(f"{tables}/{table_name(shard.name)}", None).time > seen.time
    return later or marks.get(shard.name) == [*seen, shard.sha256]


def _mark(table: Path, shard_seen: Seen, shard: Shard, marks: dict[str, list[int | str]]) -> None:
    late = time.time_ns()
    if shard_seen.time >= late:  # a shard from the future: its table must be of later
        late = shard_seen.time + 10**9
    try:
        os.utime(table, ns=(late, late))
    except OSError:  # a folder of somebody else
        marks[shard.name] = [*shard_seen, shard.sha256]


def _marks(cache: Path) -> dict[str, list[int | str]]:
    try:
        found = json.loads((cache / MARKS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def refuse(faults: Sequence[str]) -> None:
    """ValueError with the first of them, where there are any."""
    if faults:
        more = [f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
        raise ValueError("\n".join([*faults[:SHOWN], *more]))

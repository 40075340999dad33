"""Builds the index of shards that somebody else made: each is read once, in threads, its sha256 on the way."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer import durable
from trainer.data import contents, table
from trainer.data.bar import bar
from trainer.data.contents import Contents
from trainer.data.growing import explained
from trainer.data.scan import Wanted, scan
from trainer.data.store import Store
from trainer.data.table import Rows, Shard, Span, Spans

DRAFTS = ".indexing-"
"""Beginning of the name of a folder in the target while it is indexed; two machines that share it have one each."""
HELD = "lock"
"""File in it, locked as long as its process lives."""
WORKERS = min(4, os.cpu_count() or 1)  # threads that scan: hashing leaves the interpreter, parsing does not


class Draft(NamedTuple):
    """A shard whose table waits under a name of its own, until the fields and classes of all shards are known."""

    name: str
    samples: int
    bytes: int
    sha256: str
    fields: tuple[str, ...]
    """The table's `field` are numbers into it."""
    texts: tuple[str, ...] | None
    """The table's labels are numbers into it; None: they are class numbers."""
    highest: int
    """Largest class number; -1 where there is none."""
    spans: Spans

    @classmethod
    def of(cls, values: Sequence[Any]) -> "Draft":
        """From what JSON made of one."""
        name, samples, size, sha256, fields, texts, highest, spans = values
        known = (None if span is None else Span(*span) for span in spans)
        named = None if texts is None else tuple(texts)
        return cls(name, samples, size, sha256, tuple(fields), named, highest, Spans(*known))


@dataclass(frozen=True, kw_only=True)
class Split:
    """A split to index."""

    store: Store
    target: Path
    """Folder for its tables and index.json."""
    options: Mapping[str, Any]
    report: Mapping[str, Any]


def draft(
    folder: Path,
    name: str,
    rows: Rows,
    *,
    size: int,
    sha256: str,
    fields: Sequence[str],
    texts: Sequence[str] | None,
    spans: Spans,
) -> Draft:
    """Writes a shard's table into the folder of drafts."""
    path = folder / table.table_name(name)
    path.write_bytes(table.encode(rows))
    durable.flush(path)
    highest = -1 if texts is not None else int(rows["label"].max())
    named = None if texts is None else tuple(texts)
    return Draft(name, len(rows), size, sha256, tuple(fields), named, highest, spans)


def publish(
    target: Path,
    drafts: Sequence[Draft],
    *,
    folder: Path,
    classes: tuple[str, ...],
    reading: Mapping[str, Any] = contents.AS_MADE,
    options: Mapping[str, Any],
    report: Mapping[str, Any],
) -> None:
    """Writes the tables with the numbers that fields and classes have in all shards; index.json last. folder: of the
    drafts, which stay there, on the target's file system."""
    fields = table.merged(found.fields for found in drafts)
    number = {name: index for index, name in enumerate(classes)}
    spans = Spans()
    shards = []
    for found in drafts:
        name = table.table_name(found.name)
        rows = table.decode((folder / name).read_bytes()).copy()
        renumber(rows, found.fields, found.texts, fields=fields, classes=number)
        data = table.encode(rows)
        aside = folder / f"{name}.whole"
        aside.write_bytes(data)
        aside.replace(target / name)
        digest = hashlib.sha256(data).hexdigest()
        shards.append(Shard(found.name, found.samples, found.bytes, found.sha256, digest))
        spans = spans.join(found.spans)
    known = Contents(
        shards=tuple(shards), classes=classes, fields=fields, spans=spans, reading=reading, options=options,
        report=report,
    )  # fmt: skip
    contents.write(target / contents.NAME, known, aside=folder / contents.NAME)


def renumber(
    rows: Rows,
    found: Sequence[str],
    texts: Sequence[str] | None,
    *,
    fields: Sequence[str],
    classes: Mapping[str, int],
) -> None:
    """A shard's own numbers of fields and of classes as text become those of its set, in place. KeyError, ValueError:
    the set has no such class or field."""
    rows["field"] = _numbers([fields.index(field) for field in found])[rows["field"]]
    if texts is not None:
        names = _numbers([classes[text] for text in texts] + [-1])  # -1, no label, takes the last one
        rows["label"] = names[rows["label"]]


def build(
    splits: Sequence[Split], wanted: Wanted, *, classes: tuple[str, ...] | None = None, names: tuple[str, ...] = ()
) -> None:
    """Scans the shards of the splits and writes their tables and index.json; the splits get the same classes.

    classes: those of other splits of the set; None: as they are found, texts sorted, numbers by `names` where there are
    enough, else "0", "1", ... ValueError names the shard, key and field of what is wrong.
    """
    shards = [split.store.shards() for split in splits]
    for split, found in zip(splits, shards, strict=True):
        if not found:
            raise ValueError(f"data.path: {split.store.name} holds no .tar files; make them with `tandem data make`")
        for name in found:
            if fault := table.name_fault(name):
                raise ValueError(f"{split.store.name}: {fault}; rename it")
    with contextlib.ExitStack() as stack:
        folders = [stack.enter_context(_drafts(split.target)) for split in splits]
        with bar("indexing", sum(map(len, shards))) as advance:
            scans = [_scan_all(*each, wanted, advance) for each in zip(splits, folders, shards, strict=True)]
        known = _classes(splits, [drafts for drafts, _ in scans], wanted, classes, names)
        for split, folder, (drafts, passed) in zip(splits, folders, scans, strict=True):
            publish(
                split.target,
                drafts,
                folder=folder,
                classes=known,
                reading=wanted.reading,
                options=split.options,
                report={**split.report, "passed_over": passed} if passed else split.report,
            )


@contextlib.contextmanager
def _drafts(target: Path) -> Iterator[Path]:
    with explained(target):  # beside the shards it is there; so this is the cache
        target.mkdir(parents=True, exist_ok=True)
    for left in target.glob(f"{DRAFTS}*"):
        if _abandoned(left):
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=DRAFTS, dir=target))
    file = os.open(folder / HELD, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        with contextlib.suppress(OSError):  # a file system without flock: nobody there takes it for abandoned
            fcntl.flock(file, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(file)
        shutil.rmtree(folder, ignore_errors=True)


def _abandoned(drafts: Path) -> bool:
    """Whether the process that made them is gone: the kernel gave its lock up. Without a lock nobody knows."""
    try:
        file = os.open(drafts / HELD, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(file)


def _scan_all(
    split: Split, folder: Path, names: Sequence[str], wanted: Wanted, advance: Callable[[float], None]
) -> tuple[list[Draft], int]:
    """Drafts in the order of the names, and the number of members that were passed over."""
    unknown = [Shard(name, 0, 0, "", "") for name in names]
    drafts: list[Draft] = []
    passed = 0
    waiting: deque[Future[tuple[Draft, int]]] = deque()
    with ThreadPoolExecutor(WORKERS, thread_name_prefix="index") as pool:
        try:
            for index, shard in enumerate(unknown):
                if index % WORKERS == 0:
                    split.store.prepare(unknown[index : index + 2 * WORKERS])
                waiting.append(pool.submit(_scan_one, split.store, folder, shard, wanted, advance))
                if len(waiting) > WORKERS or index == len(names) - 1:
                    for _ in range(1 if index < len(names) - 1 else len(waiting)):
                        found, count = waiting.popleft().result()
                        drafts.append(found)
                        passed += count
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return drafts, passed


def _scan_one(
    store: Store, folder: Path, shard: Shard, wanted: Wanted, advance: Callable[[float], None]
) -> tuple[Draft, int]:
    with contextlib.closing(store.open(shard)) as opened:
        share = 1 / max(1, opened.bytes)
        found = scan(opened.fd, f"{store.name}/{shard.name}", wanted, advance=lambda count: advance(count * share))
    made = draft(
        folder, shard.name, found.rows, size=found.bytes, sha256=found.sha256, fields=found.fields,
        texts=found.texts, spans=found.spans,
    )  # fmt: skip
    return made, found.passed


def _classes(
    splits: Sequence[Split],
    drafts: Sequence[Sequence[Draft]],
    wanted: Wanted,
    known: tuple[str, ...] | None,
    names: tuple[str, ...],
) -> tuple[str, ...]:
    every = [(split, found) for split, done in zip(splits, drafts, strict=True) for found in done]
    texts = sorted({text for _, found in every for text in found.texts or ()})
    highest = max(found.highest for _, found in every)
    if wanted.label != "auto" and not texts and highest < 0:
        raise ValueError(f"data.label: no sample of {splits[0].store.name} has {wanted.label}; name another or auto")
    if texts and highest >= 0:
        one = next(split for split, found in every if found.highest >= 0)
        raise ValueError(f"data.label: {wanted.label} is text in some shards and a number in others ({one.store.name})")
    if known is None:
        return tuple(texts) or (names if highest < len(names) else tuple(map(str, range(highest + 1))))
    strange = [text for text in texts if text not in set(known)] or ([str(highest)] if highest >= len(known) else [])
    if strange:
        raise ValueError(
            f"{splits[0].store.name}: class {strange[0]} is none of the {len(known)} of the set's other splits; "
            "index all of them again with `tandem data index`"
        )
    return known


def _numbers(values: Sequence[int]) -> NDArray[np.int64]:
    return np.array(values, np.int64)

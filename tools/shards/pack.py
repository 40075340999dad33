"""Writes shards and their index: in parallel, in a fixed order, resumable, never over anything that is there.

While at work, DEST holds .unfinished/ with what is done; every finished shard is noted there. The same command goes on
from the last whole shard and gives the same bytes as an uninterrupted one. The index is written last.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from trainer import durable
from trainer.data import build, tar
from trainer.data.contents import AS_MADE
from trainer.data.part import UNFINISHED
from trainer.data.scan import IMAGE_FIELDS, LABEL_FIELD, kind_of
from trainer.data.table import ROW, key_hash, spans_of

Item = TypeVar("Item")
Bar = Callable[..., contextlib.AbstractContextManager[Callable[[int], None]]]
"""bar(total, what): a progress bar; gives the function that moves it."""


class Packed(NamedTuple):
    """A sample that is ready to be written."""

    key: str
    """Holds no dot after its last slash."""
    field: str
    data: bytes
    label: int
    """-1 for none."""
    metadata: Mapping[str, Any] | None
    shape: tuple[int, int, int]
    """Height, width, channels."""
    converted: tuple[str, ...] = ()
    """What was done to the pixels, for the report."""
    extra: Mapping[str, bytes] = MappingProxyType({})
    """Further members by field; no .cls and no .json where `label` or `metadata` says them."""


class LeftOut(NamedTuple):
    name: str
    reason: str


@dataclass(frozen=True)
class Plan(Generic[Item]):
    splits: Mapping[str, Sequence[Item]]
    """What each split is made of, in the order of writing."""
    classes: tuple[str, ...]
    options: Mapping[str, Any]
    """JSON. What the bytes depend on: an unfinished set goes on only with equal ones."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """JSON, for the report."""


def pack(
    dest: Path,
    plan: Plan[Item],
    encode: Callable[[str, int, Item], Packed | LeftOut],
    *,
    shard_bytes: int,
    workers: int,
    max_bad: float,
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """Writes DEST/SPLIT/*.tar and the indices; returns the report. encode(split, number, item) runs in `workers`
    threads.

    ValueError: DEST is taken, or more than `max_bad` of the images are bad (then no index is written).
    """
    with _workplace(dest, plan) as state:
        advance(sum(state["next"].values()))
        for split, items in plan.splits.items():
            _pack_split(dest, split, items, encode, state, shard_bytes=shard_bytes, workers=workers, advance=advance)
        report = {**plan.notes, "converted": state["converted"], "left_out": state["left_out"]}
        _judge(dest, plan, state, max_bad)
        for split in sorted(plan.splits):
            _write_index(dest, split, plan, state, report)
        shutil.rmtree(dest / UNFINISHED)
    return report


def complete(dest: Path, splits: Sequence[str], options: Mapping[str, Any]) -> bool:
    """Whether DEST is finished and of these options. ValueError where it holds anything else: nothing is
    overwritten."""
    if (dest / UNFINISHED).exists() or not dest.exists():
        return False
    if not dest.is_dir():
        raise ValueError(f"{dest}: is a file; choose a folder for the shards")
    if not any(dest.iterdir()):
        return False
    paths = [dest / split / "index.json" for split in splits]
    if not all(path.exists() for path in paths):
        raise ValueError(f"{dest}: is not empty and not a set of shards; choose a new folder, nothing is overwritten")
    made = json.loads(paths[0].read_text(encoding="utf-8")).get("options")
    if made != _plain(options):
        raise ValueError(
            f"{dest}: holds a finished set that was made from something else or otherwise; "
            "choose a new folder or remove it, nothing is overwritten"
        )
    return True


@contextlib.contextmanager
def _workplace(dest: Path, plan: Plan[Item]) -> Iterator[dict[str, Any]]:
    """What is done so far, with DEST locked against a second maker."""
    work = dest / UNFINISHED
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{dest}: another `tandem data make` is at work there") from None
        path = work / "state.json"
        if path.exists():
            state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if state["options"] != _plain(plan.options):
                raise ValueError(
                    f"{dest}: holds an unfinished set that was begun from other files or with other options; "
                    "finish it with these, or remove the folder"
                )
        else:
            state = {
                "options": _plain(plan.options),
                "next": dict.fromkeys(plan.splits, 0),
                "shards": {split: [] for split in plan.splits},
                "image": "auto",
                "converted": {},
                "left_out": [],
            }
            _save(dest, state)
        yield state


def _plain(options: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(options))


def _save(dest: Path, state: Mapping[str, Any]) -> None:
    _write(dest / UNFINISHED / "state.json", json.dumps(state).encode())


def _write(path: Path, data: bytes) -> None:
    """Aside, flushed, renamed."""
    aside = path.with_name(f".{path.name}.part")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    durable.flush(path.parent)


def _pack_split(
    dest: Path,
    split: str,
    items: Sequence[Item],
    encode: Callable[[str, int, Item], Packed | LeftOut],
    state: dict[str, Any],
    *,
    shard_bytes: int,
    workers: int,
    advance: Callable[[int], None],
) -> None:
    folder = dest / split
    folder.mkdir(exist_ok=True)
    shard = _Shard(folder, split, len(state["shards"][split]))
    try:
        with contextlib.closing(_ordered(split, items, encode, start=state["next"][split], workers=workers)) as results:
            for number, result in results:
                if isinstance(result, Packed):
                    members = _members(result)
                    if shard.samples and shard.position + sum(map(len, members)) > shard_bytes:
                        shard.finish(dest, state, following=number)
                        shard = _Shard(folder, split, len(state["shards"][split]))
                    shard.add(result, members)
                else:
                    shard.left_out.append(result)
                advance(1)
        if shard.samples or shard.left_out:
            shard.finish(dest, state, following=len(items))
    finally:
        shard.discard()


def _ordered(
    split: str, items: Sequence[Item], encode: Callable[[str, int, Item], Packed | LeftOut], *, start: int, workers: int
) -> Generator[tuple[int, Packed | LeftOut], None, None]:
    """Results in the order of the items, a few ahead of the writer."""
    if workers < 2:
        yield from ((number, encode(split, number, items[number])) for number in range(start, len(items)))
        return
    waiting: deque[tuple[int, Future[Packed | LeftOut]]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="encode") as pool:
        try:
            for number in range(start, len(items)):
                waiting.append((number, pool.submit(encode, split, number, items[number])))
                if len(waiting) >= 4 * workers:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _members(sample: Packed) -> list[bytes]:
    assert "." not in sample.key.rpartition("/")[2]
    found = [tar.member(f"{sample.key}.{sample.field}", sample.data)]
    found += [tar.member(f"{sample.key}.{field}", data) for field, data in sample.extra.items()]
    if sample.label >= 0:
        found.append(tar.member(f"{sample.key}.{LABEL_FIELD}", str(sample.label).encode()))
    if sample.metadata is not None:
        found.append(tar.member(f"{sample.key}.json", json.dumps(sample.metadata).encode()))
    return found


class _Shard:
    """A shard in the making: the file lies aside until it is whole."""

    def __init__(self, folder: Path, split: str, number: int) -> None:
        self.split, self.path = split, folder / f"{split}-{number:05d}.tar"
        self.aside = folder / f".{self.path.name}.part"
        self.file = self.aside.open("wb")
        self.digest = hashlib.sha256()
        self.position = self.samples = 0
        self.rows: list[tuple[int, int, int, int, int, int, int]] = []
        self.fields: dict[str, int] = {}
        self.shapes: set[tuple[int, int, int]] = set()
        self.image: str | None = None  # where samples hold several
        self.converted: dict[str, int] = {}
        self.left_out: list[LeftOut] = []

    def add(self, sample: Packed, members: Sequence[bytes]) -> None:
        begin, end = self.position, self.position + sum(map(len, members))
        field = self.fields.setdefault(sample.field, len(self.fields))
        padded = -(-len(sample.data) // tar.BLOCK) * tar.BLOCK
        place = (begin, end, begin + len(members[0]) - padded, len(sample.data))
        self.rows.append((*place, key_hash(sample.key), sample.label, field))
        self.shapes.add(sample.shape)
        if any(kind_of(name) in IMAGE_FIELDS for name in sample.extra):
            self.image = sample.field
        for what in sample.converted:
            self.converted[what] = self.converted.get(what, 0) + 1
        for data in members:
            self._put(data)
        self.samples += 1

    def _put(self, data: bytes) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.position += len(data)

    def finish(self, dest: Path, state: dict[str, Any], *, following: int) -> None:
        """The shard gets its name, then its line in the state."""
        if self.samples:
            self._put(tar.end(self.position))
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            made = build.draft(
                dest / UNFINISHED, self.path.name, np.array(self.rows, ROW), size=self.position,
                sha256=self.digest.hexdigest(), fields=list(self.fields), texts=None, spans=spans_of(self.shapes),
            )  # fmt: skip
            self.aside.replace(self.path)
            durable.flush(self.path.parent)
            state["shards"][self.split].append(made)
        state["image"] = self.image or state["image"]
        for what, count in self.converted.items():
            state["converted"][what] = state["converted"].get(what, 0) + count
        state["left_out"] += [[f"{self.split}: {name}", reason] for name, reason in self.left_out]
        state["next"][self.split] = following
        _save(dest, state)

    def discard(self) -> None:
        self.file.close()
        self.aside.unlink(missing_ok=True)


def _judge(dest: Path, plan: Plan[Item], state: Mapping[str, Any], max_bad: float) -> None:
    total, bad = sum(map(len, plan.splits.values())), state["left_out"]
    first = f"; the first: {bad[0][0]}: {bad[0][1]}" if bad else ""
    for split, items in plan.splits.items():
        if items and not state["shards"][split]:
            raise ValueError(f"{dest}: none of the {len(items)} images of the {split} split can be used{first}")
    if len(bad) > max_bad * total:
        raise ValueError(
            f"{dest}: {len(bad)} of {total} images ({len(bad) / total:.1%}) are bad, more than --max-bad {max_bad:g}"
            f"{first}; "
            f"{dest / UNFINISHED / 'state.json'} names them all; a higher --max-bad leaves them out"
        )


def _write_index(dest: Path, split: str, plan: Plan[Item], state: Mapping[str, Any], report: Mapping[str, Any]) -> None:
    build.publish(
        dest / split,
        [build.Draft.of(made) for made in state["shards"][split]],
        folder=dest / UNFINISHED,
        classes=plan.classes,
        reading={**AS_MADE, "image": state["image"]},
        options=plan.options,
        report=report,
    )

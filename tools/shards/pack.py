"""Writes shards and their index: in parallel, in a fixed order, resumable, never over anything that is there.

While at work, DEST holds .unfinished/ with what is done; every finished shard is noted there. The same command goes on
from the last whole shard and gives the same bytes as an uninterrupted one. The index is written last.
"""

import contextlib
import fcntl
import json
import shutil
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from tools.shards.shard import LeftOut, Packed, Shard, members, save
from trainer.data import build
from trainer.data.contents import AS_MADE
from trainer.data.part import UNFINISHED

Item = TypeVar("Item")
Bar = Callable[..., contextlib.AbstractContextManager[Callable[[int], None]]]
"""bar(total, what): a progress bar; gives the function that moves it."""


@dataclass(frozen=True)
class Plan(Generic[Item]):
    splits: Mapping[str, Sequence[Item]]
    """What each split is made of, in the order of writing."""
    classes: tuple[str, ...]
    options: Mapping[str, Any]
    """JSON. What the bytes depend on: an unfinished set goes on only with equal ones."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """JSON, for the report."""


class Made(NamedTuple):
    counts: dict[str, int]
    """Samples of each split; less than was planned where some were left out."""
    report: dict[str, Any]
    """As it stands in the indices."""


def pack(
    dest: Path,
    plan: Plan[Item],
    encode: Callable[[str, int, Item], Packed | LeftOut],
    *,
    shard_bytes: int,
    workers: int,
    max_bad: float,
    advance: Callable[[int], None],
) -> Made:
    """Writes DEST/SPLIT/*.tar and the indices. encode(split, number, item) runs in `workers` threads.

    ValueError: DEST is taken, or more than `max_bad` of the images are bad (then no index is written).
    """
    with _workplace(dest, plan) as state:
        advance(sum(state["next"].values()))
        for split, items in plan.splits.items():
            _pack_split(dest, split, items, encode, state, shard_bytes=shard_bytes, workers=workers, advance=advance)
        report = {**plan.notes, "converted": state["converted"], "left_out": state["left_out"]}
        _judge(dest, plan, state, max_bad)
        drafts = {split: [build.Draft.of(made) for made in state["shards"][split]] for split in plan.splits}
        for split in sorted(plan.splits):
            _write_index(dest, split, plan, drafts[split], image=state["image"], report=report)
        shutil.rmtree(dest / UNFINISHED)
    return Made({split: sum(made.samples for made in done) for split, done in drafts.items()}, report)


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
            save(dest, state)
        yield state


def _plain(options: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(options))


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
    shard = Shard(folder, split, len(state["shards"][split]))
    try:
        with contextlib.closing(_ordered(split, items, encode, start=state["next"][split], workers=workers)) as results:
            for number, result in results:
                if isinstance(result, Packed):
                    parts = members(result)
                    if shard.samples and shard.position + sum(map(len, parts)) > shard_bytes:
                        shard.finish(dest, state, following=number)
                        shard = Shard(folder, split, len(state["shards"][split]))
                    shard.add(result, parts)
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


def _write_index(
    dest: Path,
    split: str,
    plan: Plan[Item],
    drafts: Sequence[build.Draft],
    *,
    image: str,
    report: Mapping[str, Any],
) -> None:
    build.publish(
        dest / split,
        drafts,
        folder=dest / UNFINISHED,
        classes=plan.classes,
        reading={**AS_MADE, "image": image},
        options=plan.options,
        report=report,
    )

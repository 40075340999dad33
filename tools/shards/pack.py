"""Writes shards and their index: in parallel, in a fixed order, resumable, never over anything that is there.

While at work, DEST holds .unfinished/ with what is done; every finished shard is noted there. The same command goes on
from the last whole shard and gives the same bytes as an uninterrupted one. The index is written last.
"""

import contextlib
import fcntl
import json
import math
import shutil
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from tools.shards.shard import LeftOut, Packed, Shard, into_place, members
from tools.shards.state import State, whole
from tools.shards.words import counted
from trainer import durable
from trainer.data import ShardsConfig, build, contents, touched
from trainer.data.contents import AS_MADE
from trainer.data.part import UNFINISHED, open_part
from trainer.errors import naming

FINISHED = ".finished"
"""What .unfinished/ is called while it is removed."""
TAKEN = "is not empty and not a set of shards; choose a new folder, nothing is overwritten"
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
    with naming(dest), _workplace(dest, plan) as state:
        lost = _lost(dest, state, workers=workers, advance=advance)
        for split, items in plan.splits.items():
            (dest / split).mkdir(exist_ok=True)
            again = [(number, state.items(split, number), math.inf) for number in lost[split]]
            new = len(state.steps[split])
            for number, part, largest in [*again, (new, range(state.begin(split, new), len(items)), shard_bytes)]:
                _write(
                    dest, split, items, part, number, encode, state, largest=largest, workers=workers, advance=advance
                )
        report = {**plan.notes, **state.report}
        _judge(dest, plan, state, max_bad)
        drafts = {split: state.drafts(split) for split in plan.splits}
        for split in sorted(plan.splits):
            _write_index(dest, split, plan, drafts[split], image=state.image, report=report)
        (dest / UNFINISHED).replace(dest / FINISHED)  # at once: half of it would not be gone on with
        durable.flush(dest)
        shutil.rmtree(dest / FINISHED)
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
    if not all((dest / split / contents.NAME).exists() for split in splits):
        raise ValueError(f"{dest}: {TAKEN}")
    config = ShardsConfig(path=dest, size=1, verify="size")
    try:
        found = [open_part(config, dest, split).contents for split in splits]
    except ValueError as error:
        raise ValueError(f"{error}\nwithout a copy of it: remove {dest}, and the same command makes it again") from None
    if found[0].options != _plain(options):
        raise ValueError(
            f"{dest}: holds a finished set that was made from something else or otherwise; "
            "choose a new folder or remove it, nothing is overwritten"
        )
    shutil.rmtree(dest / FINISHED, ignore_errors=True)
    return True


@contextlib.contextmanager
def _workplace(dest: Path, plan: Plan[Item]) -> Iterator[State]:
    """What is done so far, with DEST locked against a second maker."""
    work = dest / UNFINISHED
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{dest}: another `tandem data make` is at work there") from None
        state = State.load(dest)
        if state is None:
            if any(entry.name != UNFINISHED for entry in dest.iterdir()):
                raise ValueError(f"{dest}: {TAKEN}")
            state = State(dest, _plain(plan.options), {split: [] for split in plan.splits})
            state.save()
        elif state.options != _plain(plan.options):
            raise ValueError(
                f"{dest}: holds an unfinished set that was begun from other files or with other options; "
                "finish it with these, or remove the folder"
            )
        yield state


def _plain(options: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(options))


def _lost(dest: Path, state: State, *, workers: int, advance: Callable[[int], None]) -> dict[str, list[int]]:
    """Of each split the shards that are noted and not there. ValueError names those that are others by now."""
    lost: dict[str, list[int]] = {split: [] for split in state.steps}
    faults: list[str] = []
    steps = [(split, number, step.made) for split, part in state.steps.items() for number, step in enumerate(part)]
    with ThreadPoolExecutor(workers, thread_name_prefix="compare") as pool:
        found = pool.map(lambda one: one[2] is None or _there(dest, one[0], one[2]), steps)
        for (split, number, _), there in zip(steps, found, strict=True):
            if isinstance(there, str):
                faults.append(there)
            elif there:
                advance(len(state.items(split, number)))
            else:
                lost[split].append(number)
    touched.refuse(faults)
    return lost


def _there(dest: Path, split: str, made: build.Draft) -> bool | str:
    """Whether a shard that is noted is there; a fault where it is another."""
    path, aside = dest / split / made.name, dest / UNFINISHED / made.name
    if path.exists():
        again = "take it away, and the same command makes it again"
        return whole(path, made) or f"{path}: is not the shard that was made there (another size or sha256); {again}"
    if aside.exists() and whole(aside, made):  # it was stopped between the note and the name
        into_place(aside, path)
        return True
    return False


def _write(
    dest: Path,
    split: str,
    items: Sequence[Item],
    part: range,
    number: int,
    encode: Callable[[str, int, Item], Packed | LeftOut],
    state: State,
    *,
    largest: float,
    workers: int,
    advance: Callable[[int], None],
) -> None:
    """These items as shard `number`, and as those behind it where it would exceed `largest` bytes."""
    shard = Shard(dest, split, number)
    try:
        with contextlib.closing(_ordered(split, items, encode, part, workers=workers)) as results:
            for at, result in results:
                if isinstance(result, Packed):
                    parts = members(result)
                    if shard.samples and shard.position + sum(map(len, parts)) > largest:
                        shard.finish(state, following=at)
                        shard.close()
                        shard = Shard(dest, split, shard.number + 1)
                    shard.add(result, parts)
                else:
                    shard.left_out.append(result)
                advance(1)
        if shard.samples or shard.left_out:
            shard.finish(state, following=part.stop)
    finally:
        shard.close()


def _ordered(
    split: str,
    items: Sequence[Item],
    encode: Callable[[str, int, Item], Packed | LeftOut],
    part: range,
    *,
    workers: int,
) -> Generator[tuple[int, Packed | LeftOut], None, None]:
    """Results in the order of the items, a few ahead of the writer."""
    if workers < 2:
        yield from ((number, encode(split, number, items[number])) for number in part)
        return
    waiting: deque[tuple[int, Future[Packed | LeftOut]]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="encode") as pool:
        try:
            for number in part:
                waiting.append((number, pool.submit(encode, split, number, items[number])))
                if len(waiting) >= 4 * workers:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _judge(dest: Path, plan: Plan[Item], state: State, max_bad: float) -> None:
    total, bad = sum(map(len, plan.splits.values())), state.report["left_out"]
    first = f"; the first: {bad[0][0]}: {bad[0][1]}" if bad else ""
    for split, items in plan.splits.items():
        if items and not state.drafts(split):
            raise ValueError(f"{dest}: no image of the {split} split can be used (of {len(items):,}){first}")
    if len(bad) > max_bad * total:
        are = "is" if len(bad) == 1 else "are"
        raise ValueError(
            f"{dest}: {len(bad):,} of {counted(total, 'image')} ({len(bad) / total:.1%}) {are} bad, "
            f"more than --max-bad {max_bad:g}"
            f"{first}; "
            f"{state.path} names them all; a higher --max-bad leaves them out"
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

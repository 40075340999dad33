"""What the named sets share: the options that decide their bytes, and the way from a plan to a finished set."""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tools.shards.pack import Bar, Item, LeftOut, Made, Packed, Plan, complete, pack
from tools.shards.words import counted

SHARED = ("size", "format", "val_fraction", "shard_size", "shuffle", "seed")
SHOWN = 10  # names of left-out images on the terminal; the index names all


def settings(options: argparse.Namespace, *own: str) -> dict[str, Any]:
    """What the bytes of the set depend on: nothing else does, `workers` least of all."""
    return {"kind": options.kind, **{name: getattr(options, name) for name in (*own, *SHARED)}}


def is_complete(options: argparse.Namespace, wanted: Mapping[str, Any], say: Callable[[str], int]) -> bool:
    """Whether nothing is left to do, which is said. Asked before anything is fetched."""
    splits = ("train", "test") if options.val_fraction else ("train",)
    if not complete(options.dest, splits, wanted):
        return False
    say(f"{options.dest}: already complete; nothing was written")
    return True


def finish(
    options: argparse.Namespace,
    plan: Plan[Item],
    encode: Callable[[str, int, Item], Packed | LeftOut],
    *,
    what: str,
    bar: Bar,
    say: Callable[[str], int],
    max_bad: float = 0.0,
) -> int:
    """Packs the plan, and says what was made. max_bad: share of images that may be left out; none of a source that was
    checked."""
    with bar(sum(map(len, plan.splits.values()))) as advance:
        made = pack(
            options.dest, plan, encode, shard_bytes=options.shard_size, workers=options.workers, max_bad=max_bad,
            advance=advance,
        )  # fmt: skip
    for line in told(made.report):
        say(line)
    say(f"{options.dest}: {packed(made, what, plan.classes)}")
    for name in ("source", "licence"):
        if name in plan.notes:
            say(f"{name}: {plan.notes[name]}")
    return 0


def packed(made: Made, what: str, classes: Sequence[str]) -> str:
    """packed 165 train and 17 test images, 1 left out; 3 classes"""
    total = " and ".join(f"{count:,} {split}" for split, count in made.counts.items())
    left = f", {len(made.report['left_out']):,} left out" if made.report["left_out"] else ""
    return f"packed {total} {what}{left}; {counted(len(classes), 'class', 'classes')}"


def told(report: Mapping[str, Any]) -> Iterator[str]:
    """What was done to the images, and the first that were left out."""
    for what, count in sorted(report["converted"].items()):
        yield f"{counted(count, 'image')} {what}"
    for name, why in report["left_out"][:SHOWN]:
        yield f"left out: {name}: {why}"
    if len(report["left_out"]) > SHOWN:
        yield f"left out: {len(report['left_out']) - SHOWN:,} more, named in index.json"

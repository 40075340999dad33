"""What the named sets share: the options that decide their bytes, and the way from a plan to a finished set."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from tools.shards.pack import Bar, Item, LeftOut, Packed, Plan, complete, pack

SHARED = ("size", "format", "val_fraction", "shard_size", "shuffle", "seed")


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
) -> int:
    """Packs the plan, and says what was made; a bad image is an error, since the source was checked."""
    with bar(sum(map(len, plan.splits.values()))) as advance:
        pack(
            options.dest, plan, encode, shard_bytes=options.shard_size, workers=options.workers, max_bad=0.0,
            advance=advance,
        )  # fmt: skip
    total = " and ".join(f"{len(items):,} {split}" for split, items in plan.splits.items())
    say(f"{options.dest}: packed {total} {what}; {len(plan.classes)} classes")
    return say(f"source: {plan.notes['source']}; licence: {plan.notes['licence']}")

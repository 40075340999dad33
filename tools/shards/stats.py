"""tandem data stats DEST [--split train] [--samples N] [--json FILE] [--sheet FILE.png]

Looks at every image of a set: sizes, levels, classes, copies, frames, grids; says what a training would suffer from.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.shards import options as shared
from tools.shards.words import say

if TYPE_CHECKING:  # --help should not wait for numpy
    from tools.shards.classes import Balance
    from tools.shards.measure import Measured
    from trainer.data.config import ShardsConfig
    from trainer.data.index import Index

EXAMPLE = """\
examples:
  tandem data stats data/faces
  tandem data stats data/faces --split train --samples 10000 --sheet faces.png
  tandem data stats data/faces --json - > faces.json
"""
NAMED = 10
"""Bad samples that are named."""


def main(argv: list[str]) -> int:
    parser = shared.parser(
        "tandem data stats",
        description="Looks at every image of a set: sizes, levels, classes and their order, exact and near copies, "
        "also between splits, frames, grids of compression and enlargement. Nothing is changed.",
        example=EXAMPLE,
    )
    parser.add_argument("dest", metavar="DEST", help="folder or URL that holds train/ and test/")
    parser.add_argument("--split", action="append", metavar="NAME", help="only this one; may be given again "
                        "(default: all, and copies between them)")  # fmt: skip
    parser.add_argument("--samples", type=shared.count, metavar="N", help="images of a split that are looked at, drawn "
                        "by the seed (default: all)")  # fmt: skip
    parser.add_argument(
        "--seed", type=shared.seed, default=0, metavar="N", help="of --samples and of the sheet (default: 0)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures for programs; - prints them instead")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="draw a contact sheet, a PNG")
    parser.add_argument("--workers", type=shared.count, default=min(8, os.cpu_count() or 1), metavar="N",
                        help="threads that decode (default: the cores, 8 at most)")  # fmt: skip
    options = parser.parse_args(argv)
    from tools.shards import report, sheet
    from trainer.data import part
    from trainer.data.config import ShardsConfig

    if options.sheet is not None:
        sheet.check_name(options.sheet)
    config = ShardsConfig(path=options.dest, size=1)
    every = options.split or part.splits_of(config, options.dest)
    names = sorted(every, key=lambda name: (name != "train", name))
    found = stats(config, names, samples=options.samples, seed=options.seed, threads=options.workers)
    if options.json == "-":
        print(json.dumps(found, indent=1))
    else:
        report.show(found)
        if options.json is not None:
            Path(options.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if options.sheet is not None:
        said = sheet.contact(config, names[0], path=options.sheet, seed=options.seed, threads=options.workers)
        say(said, to=sys.stderr if options.json == "-" else sys.stdout)
    return 0


def stats(
    config: "ShardsConfig",
    names: Sequence[str],
    *,
    samples: int | None,
    seed: int,
    threads: int,
) -> dict[str, Any]:
    """What `--json` gives: {"path", "splits": {name: ...}, "copies": {...}, "made": [{"splits", "report"}], "warnings":
    [text]}. samples: of a split; None for all.

    ValueError, OSError: a split that is missing or damaged. Images that cannot be decoded are counted."""
    from tools.shards import classes, copies, walk, warn
    from tools.shards import measure as measuring
    from tools.shards.make import bar
    from trainer.data import index as indices

    splits: dict[str, Any] = {}
    prints = []
    opened = {name: indices.load(config, name) for name in names}
    total = sum(min(samples or index.samples, index.samples) for index in opened.values())
    with bar(total, "looking") as advance:
        for name, index in opened.items():
            chosen = None if samples is None else walk.spread(index.samples, samples, seed=seed)
            measured = measuring.measure(index, config, threads=threads, samples=chosen, advance=advance)
            splits[name] = _figures(index, classes.balance(index), measured)
            prints.append(copies.Split(name, index, measuring.joined(measured.prints)))
    exact, near = copies.find(prints, config, threads=threads)
    made = _made(opened)
    for index in opened.values():
        index.close()
    found = {"path": str(config.path), "splits": splits, "copies": {"exact": exact, "near": near}, "made": made}
    return {**found, "warnings": warn.warnings(found)}


def _figures(index: "Index", balance: "Balance", measured: "Measured") -> dict[str, Any]:
    from tools.shards import measure as measuring

    images = measured.images
    counts = balance.counts.tolist()
    frames = {
        side: measuring.spread_of(widths)
        for side, widths in zip(measuring.SIDES, measured.frame_width, strict=True)
        if widths
    }
    return {
        "samples": index.samples,
        "looked_at": images + len(measured.bad),
        "bad": {
            "count": len(measured.bad),
            "named": [{"where": index.where(sample), "why": why} for sample, why in measured.bad[:NAMED]],
        },
        "shards": {"count": len(index.shards), "bytes": sum(shard.bytes for shard in index.shards)},
        "height": measuring.spread_of(measured.heights),
        "width": measuring.spread_of(measured.widths),
        "channels": {str(channels): count for channels, count in sorted(measured.channels.items())},
        "fields": {index.fields[field]: count for field, count in sorted(measured.fields.items())},
        "image_bytes": {"low": measured.smallest, "mean": measured.bytes / images, "high": measured.largest}
        if images
        else None,
        "mean": measured.moments.mean() if images else None,
        "std": measured.moments.std() if images else None,
        "classes": {
            "counts": [{"name": name, "samples": count} for name, count in zip(index.classes, counts, strict=True)],
            "smallest_to_largest": min(counts) / max(counts) if counts and max(counts) else None,
            "unlabelled": balance.unlabelled,
            "order": balance.order,
        },
        "blank": measured.blank,
        "grey_as_colour": measured.grey,
        "frames": {"images": measured.framed, "plain_ground": measured.plain, "pixels": frames},
        "grids": _grids(measured),
    }


def _made(opened: Mapping[str, "Index"]) -> list[dict[str, Any]]:
    """The makers' reports: splits that were made together hold the same one, of both."""
    found: list[dict[str, Any]] = []
    for name, index in opened.items():
        report = {key: value for key, value in index.report.items() if key != "passed_over"}  # of the split alone
        same = next((one for one in found if one["report"] == report), None)
        if same is None:
            found.append({"splits": [name], "report": report})
        else:
            same["splits"].append(name)
    return found


def _grids(measured: "Measured") -> dict[str, float] | None:
    """Period in pixels to depth; None: the images are too few, too small or too smooth to judge."""
    drawn = 2 * measured.plain > measured.images
    found = None if measured.grid is None else measured.grid.found(drawn=drawn)
    return None if found is None else {str(period): round(depth, 3) for period, depth in found.items()}


if __name__ == "__main__":
    from trainer.errors import boundary

    sys.exit(boundary(main, sys.argv[1:]))

"""`tandem status`: how runs are doing, on a terminal as a table, for programs as JSON."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch import folders, results, state
from launch.beats import duration
from launch.state import Status
from trainer.errors import shown, to_stderr

HELP = """\
Say how runs are doing: those named, those of a sweep or a folder, or all in runs/. Jobs of SLURM, of `--cluster local`
and runs of `tandem train` alike; squeue is asked once for all of them.
"""
EXAMPLE = """\
examples:
  tandem status
  tandem status runs/vaegan_fashion --json
"""
HEADS = ("run", "job", "state", "images", "images/s", "left", "checkpoint", "starts", "slowest rank", "why")
COLORS = {
    "running": "green",
    "done": "green",
    "failed": "red",
    "crash loop": "red",
    "hung": "red",
    "unknown": "yellow",
    "cancelled": "yellow",
    "stopped": "yellow",
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="tandem status",
        description=HELP,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folder of a run, of a sweep, or of several")
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args(argv)
    runs = folders.chosen(options.runs, default=Path("runs"))
    found, notes = state.look(runs)
    sweeps = over(found)
    if options.json:
        told = {str(sweep): results.as_json(results.read(sweep)) for sweep in sweeps}
        print(json.dumps({"runs": [as_json(one) for one in found], "sweeps": told, "notes": notes}, indent=1))
        return 0
    for note in notes:
        to_stderr(f"tandem: {shown(note)}")
    if not found:
        print("no runs in runs/ (tandem train CONFIG, tandem submit CONFIG --cluster FILE)")
    elif sys.stdout.isatty():
        _draw(found)
    else:
        print(as_text(found))
    for sweep in sweeps:
        text = results.as_text(results.read(sweep))
        print("\n".join(map(shown, ["", f"{sweep}: all runs are done", *text.splitlines()])))
    return 0


def over(found: list[Status]) -> list[Path]:
    """Sweeps of which all runs are among these, and done."""
    done = {one.run for one in found if one.state == "done"}
    sweeps = dict.fromkeys(one.run.parent for one in found if folders.is_sweep(one.run.parent))
    return [sweep for sweep in sweeps if set(folders.elements(sweep)) <= done]


def as_json(one: Status) -> dict[str, Any]:
    return asdict(one) | {"run": str(one.run), "active": one.active}


def row(one: Status) -> tuple[str, ...]:
    """As HEADS; "" where there is nothing to say."""
    age = "" if one.saved_age is None else f"{duration(one.saved_age)} ago"
    saved = f"{one.saved:,}, {age}" if one.saved is not None and one.saved != one.images else age
    cells = (
        str(one.run),
        "local" if one.kind == "local" else one.job or "",
        one.state,
        f"{one.images:,} / {one.total:,}" if one.total else f"{one.images:,}",
        "" if one.images_per_second is None else f"{one.images_per_second:,.0f}",
        "" if one.seconds_left is None else duration(one.seconds_left),
        saved,
        str(one.starts),
        one.slowest,
        one.why,
    )
    return tuple(map(shown, cells))


def as_text(found: list[Status]) -> str:
    """Columns, of which those that are empty are left out."""
    rows = [HEADS, *map(row, found)]
    kept = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in kept]
    lines = zip(*kept, strict=True)
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _draw(found: list[Status]) -> None:
    """A sweep has a line of its own, below which its runs are called by their values."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = [row(one) for one in found]
    table = Table(box=None, pad_edge=False, header_style="bold")
    used = [index for index in range(len(HEADS)) if any(cells[index] for cells in rows)]
    for index in used:
        right = HEADS[index] in ("images", "images/s", "left", "starts")
        wraps = HEADS[index] in ("run", "checkpoint", "slowest rank", "why")
        table.add_column(HEADS[index], justify="right" if right else "left", no_wrap=not wraps, overflow="fold")
    sweep = None
    for one, cells in zip(found, rows, strict=True):
        inside = folders.is_sweep(one.run.parent)
        if inside and one.run.parent != sweep:
            table.add_row(Text(shown(str(one.run.parent))))
        sweep = one.run.parent
        name = f"  {shown(one.run.name)}" if inside else cells[0]
        styles = [COLORS.get(one.state, "") if HEADS[index] == "state" else "" for index in used]
        texts = [name if index == 0 else cells[index] for index in used]
        table.add_row(*(Text(text, style=style) for text, style in zip(texts, styles, strict=True)))
    Console().print(table)

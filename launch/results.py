"""What came of a sweep: the figures of each run's last evaluation, their mean and deviation over seeds."""

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import folders

SEED = "seed"
FIRST = ("psnr", "nelbo", "nll", "kl")  # columns that come first
NONE = ("images",)  # how many were measured: no result


@dataclass(frozen=True)
class Result:
    """A run of a sweep."""

    folder: str
    values: dict[str, str]
    figures: dict[str, float]
    """{}: it is not done."""


def read(sweep: Path) -> list[Result]:
    """All runs of a sweep, in its order."""
    found = []
    for one in folders.records(sweep):
        figures = folders.read_json(sweep / one["folder"] / "finished").get("figures")
        figures = figures if isinstance(figures, dict) else {}
        numbers = {name: float(value) for name, value in figures.items() if isinstance(value, (int, float))}
        found.append(Result(one["folder"], dict(one["values"]), numbers))
    return found


def names(found: Sequence[Result]) -> list[str]:
    """Of all figures."""
    every = {name for one in found for name in one.figures}
    return [name for name in FIRST if name in every] + sorted(every - {*FIRST, *NONE})


def groups(found: Sequence[Result]) -> list[dict[str, Any]]:
    """A combination of values a row: its runs, of which so many are done, and {figure: mean, deviation}.

    The deviation is of a sample (n - 1), None where one run is done; both are where a figure is not finite."""
    rows: dict[tuple[tuple[str, str], ...], list[Result]] = {}
    for one in found:
        rows.setdefault(tuple((key, value) for key, value in one.values.items() if key != SEED), []).append(one)
    told = []
    for values, runs in rows.items():
        done = [one for one in runs if one.figures]
        figures = {}
        for name in names(done):
            numbers = [one.figures[name] for one in done if name in one.figures]
            finite = all(map(math.isfinite, numbers))
            figures[name] = {
                "mean": statistics.fmean(numbers) if finite else None,
                "deviation": statistics.stdev(numbers) if finite and len(numbers) > 1 else None,
            }
        told.append({"values": dict(values), "runs": len(runs), "done": len(done), "figures": figures})
    return told


def as_json(found: Sequence[Result]) -> dict[str, Any]:
    runs = [
        {
            "folder": one.folder,
            "values": one.values,
            "figures": {name: value if math.isfinite(value) else None for name, value in one.figures.items()},
        }
        for one in found
    ]
    return {"groups": groups(found), "runs": runs}


def as_csv(found: Sequence[Result]) -> str:
    """A line a run."""
    keys, figures = list(dict.fromkeys(key for one in found for key in one.values)), names(found)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", *keys, *figures])
    for one in found:
        writer.writerow(
            [one.folder, *(one.values.get(key, "") for key in keys), *(one.figures.get(name, "") for name in figures)]
        )
    return out.getvalue()


def as_text(found: Sequence[Result]) -> str:
    """A combination a line, as `mean ± deviation`."""
    rows, figures = groups(found), names(found)
    keys = list(dict.fromkeys(key for row in rows for key in row["values"]))
    lines = [[*keys, "done", *figures]]
    for row in rows:
        cells = []
        for name in figures:
            told = row["figures"].get(name)
            cells.append("" if told is None else _number(told["mean"], told["deviation"]))
        lines.append([*(row["values"].get(key, "") for key in keys), f"{row['done']}/{row['runs']}", *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _number(mean: float | None, deviation: float | None) -> str:
    if mean is None:
        return "not finite"
    return f"{mean:.4g} ± {deviation:.2g}" if deviation else f"{mean:.4g}"

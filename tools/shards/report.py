"""The figures of `tandem data stats` for people: tables and bars on a terminal, plain lines elsewhere."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from tools.shards import tells
from tools.shards.words import counted, percent, say, smallest_to_largest
from trainer.errors import shown

SHOWN = 20
"""Classes that are shown; of more, as many of the largest and of the smallest as fit."""
COPIES = 5
"""Groups and pairs that are shown; the JSON has more."""
BAR = 30  # characters
Figures = Mapping[str, Any]
PERIODS = {
    "8": "as JPEG's blocks",
    "4": "as enlargement 4 times",
    "2": "as enlargement 2 times, or a network's pattern",
}


def show(found: Figures) -> None:
    found = _printable(found)
    console = Console()
    if console.is_terminal:
        for part in _tables(found):
            console.print(part)
        return
    for line in lines(found):
        say(line)


def _printable(value: Any) -> Any:
    """The same figures, every name in them in signs that steer no terminal."""
    if isinstance(value, Mapping):
        return {shown(key): _printable(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_printable(one) for one in value]
    return shown(value) if isinstance(value, str) else value


def lines(found: Figures) -> Iterator[str]:
    for name, split in found["splits"].items():
        yield from (f"{name}: {key}: {text}" for key, text in rows(split))
        yield from (f"{name}: class {title}: {text}" for title, text, _ in class_rows(split))
        yield from (f"{name}: bad: {one['where']}: {one['why']}" for one in split["bad"]["named"])
    yield from (f"made: {key}: {text}" for key, text in made_rows(found))
    yield from (f"copies: {key}: {text}" for key, text in copy_rows(found["copies"]))
    yield from (f"warning: {text}" for text in found["warnings"])


def _tables(found: Figures) -> Iterator[Table | Text | Group]:
    for name, split in found["splits"].items():
        yield _table(f"{found['path']}/{name}", rows(split))
        if split["classes"]["counts"]:
            yield _bars(split)
        bad = [Text(f"  {one['where']}: {one['why']}") for one in split["bad"]["named"]]
        if bad:
            yield Group(Text("cannot be decoded", style="bold"), *bad, Text())
    if made := list(made_rows(found)):
        yield _table("when it was made", iter(made))
    yield _table("copies", copy_rows(found["copies"], between="\n"))
    if not found["warnings"]:
        yield Text("nothing to warn of", style="green")
    for text in found["warnings"]:
        yield Text.assemble(("! ", "bold yellow"), text)


def _table(title: str, pairs: Iterator[tuple[str, str]]) -> Table:
    table = Table(title=Text(title), title_justify="left", title_style="bold", show_header=False, box=box.SIMPLE_HEAD)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    before = ""
    for key, text in pairs:
        table.add_row(Text("" if key == before else key), Text(text))
        before = key
    return table


def _bars(split: Figures) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 2))
    table.add_column(overflow="ellipsis", max_width=40, no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    for title, text, share in class_rows(split):
        table.add_row(Text(title), Text(text), Text(_bar(share), style="blue"))
    table.add_row()
    return table


def _bar(share: float) -> str:
    """Eighths of a character; something wherever there is anything."""
    eighths = max(share > 0, round(share * BAR * 8))
    return "█" * (eighths // 8) + ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"][eighths % 8]


def rows(split: Figures) -> Iterator[tuple[str, str]]:
    """(name, text) of a split's figures."""
    images = split["looked_at"] - split["bad"]["count"]
    bad = f", {split['bad']['count']:,} of them bad" if split["bad"]["count"] else ""
    looked = "" if split["looked_at"] == split["samples"] else f", {split['looked_at']:,} looked at"
    shards = split["shards"]
    yield (
        "samples",
        f"{split['samples']:,} in {counted(shards['count'], 'shard')}, {size(shards['bytes'])}{looked}{bad}",
    )
    if images:
        yield "size", f"{_spread(split['height'])} x {_spread(split['width'])} pixels, height x width"
        yield "channels", _channels(split)
        stored = split["image_bytes"]
        fields = ", ".join(f"{name} {count:,}" for name, count in split["fields"].items())
        bounds = [size(stored[name]) for name in ("low", "high", "mean")]
        alike = stored["low"] == stored["high"]
        each = f"{bounds[0]} each" if alike else f"{bounds[0]} to {bounds[1]}, mean {bounds[2]}"
        yield "stored as", f"{fields}; {each}"
        yield "levels", _levels(split["mean"], split["std"])
    yield from _class_figures(split["classes"])
    if images:
        yield "frames", _frames(split["frames"], images)
        yield "grids", _grids(split["grids"])
        if split["blank"]:
            yield "of one colour", counted(split["blank"], "image")


def made_rows(found: Figures) -> Iterator[tuple[str, str]]:
    """What the makers of the splits did to images: a report is of all the splits that were made together."""
    for made in found["made"]:
        alone = f" (of {', '.join(made['splits'])})" if len(found["made"]) > 1 else ""
        for what, count in made["report"].get("converted", {}).items():
            yield f"converted{alone}", f"{counted(count, 'image')}: {what}"
        if left := made["report"].get("left_out"):
            first = ", the first" if len(left) > 1 else ""
            yield f"left out{alone}", f"{counted(len(left), 'file')}{first}: {': '.join(left[0])}"


def _channels(split: Figures) -> str:
    names = {"1": "grey", "3": "colour"}
    found = split["channels"]
    text = names[next(iter(found))] if len(found) == 1 else ", ".join(f"{n:,} {names[c]}" for c, n in found.items())
    return text + (f" ({split['grey_as_colour']:,} of them grey)" if split["grey_as_colour"] else "")


def _levels(mean: list[float], std: list[float]) -> str:
    names = ("",) if len(mean) == 1 else ("red ", "green ", "blue ")
    pairs = [f"{name}{m:.4f} ± {s:.4f}" for name, m, s in zip(names, mean, std, strict=True)]
    return f"{', '.join(pairs)}, mean ± standard deviation in [0, 1]"


def _class_figures(found: Figures) -> Iterator[tuple[str, str]]:
    counts = found["counts"]
    if not counts:
        yield "classes", "none"
        return
    without = f", {counted(found['unlabelled'], 'sample')} without a label" if found["unlabelled"] else ""
    sizes = smallest_to_largest([one["samples"] for one in counts])
    yield "classes", f"{len(counts):,}, {sizes}{without}"
    if found["order"] is not None:
        yield "order", f"chi2/dof {found['order']:.3g} of the classes in the shards (1 is a shuffle)"


def class_rows(split: Figures) -> Iterator[tuple[str, str, float]]:
    """(name, text, share of the largest) of each class, or of the largest and the smallest."""
    counts = split["classes"]["counts"]
    total, most = sum(one["samples"] for one in counts), max((one["samples"] for one in counts), default=0)
    if not most:
        return
    shown = counts
    if len(counts) > SHOWN:
        ranked = sorted(counts, key=lambda one: -int(one["samples"]))
        shown = [*ranked[: SHOWN // 2], *ranked[-SHOWN // 2 :]]
    for number, one in enumerate(shown):
        if len(counts) > SHOWN and number == SHOWN // 2:
            yield "...", f"{len(counts) - SHOWN:,} more", 0.0
        yield one["name"], f"{one['samples']:,} ({percent(one['samples'] / total)})", one["samples"] / most


def _frames(found: Figures, images: int) -> str:
    ground = f"; {percent(found['plain_ground'] / images)} on a plain ground" if found["plain_ground"] else ""
    if not found["images"]:
        return f"none{ground}"
    sides = ", ".join(f"{side} {pixels['median']:,}" for side, pixels in found["pixels"].items())
    return f"{percent(found['images'] / images)} of the images; {sides} pixels (median){ground}"


def _grids(found: Mapping[str, float] | None) -> str:
    if found is None:
        return f"not judged: fewer than {tells.FEWEST} images with texture, or under 17 pixels"
    parts = [f"every {period} pixels, {depth:.0%} deep: {_cause(period, depth)}" for period, depth in found.items()]
    return "; ".join(parts) or "none"


def _cause(period: str, depth: float) -> str:
    weak = period == "8" and depth < tells.BLOCKS
    return PERIODS[period] + (", of good quality" if weak else "")


def copy_rows(found: Figures, *, between: str = " ") -> Iterator[tuple[str, str]]:
    """between: what parts the samples of a group or pair."""
    exact, near = found["exact"], found["near"]
    copies = counted(exact["copies"], "copy", "copies")
    yield "exact", f"{copies} of {counted(exact['groups'], 'image')}" if exact["groups"] else "none"
    yield from (("exact", f"{between}= ".join(map(_one, group))) for group in exact["named"][:COPIES])
    least = (
        "" if near["complete"] else f" at least ({near['compared']:,} of {near['candidates']:,} candidates compared)"
    )
    yield "near", f"{counted(near['pairs'], 'pair')}{least}" if near["pairs"] or least else "none"
    yield from (
        ("near", f"{f'{between}~ '.join(map(_one, pair['samples']))}, {pair['difference']:.1f} levels apart")
        for pair in near["named"][:COPIES]
    )


def _one(found: Figures) -> str:
    """train/train-00000.tar: 00017 (Coat)"""
    title = f" ({found['class']})" if found["class"] else ""
    return f"{found['split']}/{found['where'].rpartition('/')[2]}{title}"


def _spread(found: Figures) -> str:
    if found["low"] == found["high"]:
        return f"{found['low']:,}"
    return f"{found['low']:,} to {found['high']:,} (median {found['median']:,})"


def size(count: float) -> str:
    """1,234 bytes: 1.2 kB"""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"

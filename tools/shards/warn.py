"""What of a set's figures a training would suffer from, one sentence each."""

from collections.abc import Iterator, Mapping
from typing import Any

from tools.shards import classes, tells
from tools.shards.words import counted, percent, smallest_to_largest

UNEVEN = 0.1
"""Smallest class to largest, below which classes are called uneven."""
FRAMED = 0.01
"""Share of images, from which on frames are told."""
GREY = 0.99
"""Share of colour images without colour, from which on grey is told."""
WINDOW = 4  # shards: the default of data.window

Figures = Mapping[str, Any]


def warnings(found: Figures) -> list[str]:
    """found: what `stats` gives."""
    said = []
    for name, split in found["splits"].items():
        said += [f"{name}: {text}" for text in _split(split, str(found["path"]))]
    return said + list(_copies(found["copies"]))


def _split(split: Figures, path: str) -> Iterator[str]:
    looked = split["looked_at"]
    if bad := split["bad"]["count"]:
        yield f"{bad:,} of {counted(looked, 'image')} cannot be decoded; a run replaces them (data.max_bad_fraction)"
    yield from _classes(split, path)
    images = looked - bad
    if split["blank"]:
        yield f"{counted(split['blank'], 'image is', 'images are')} of one colour throughout"
    frames = split["frames"]
    # on a plain ground edges of objects are straight now and then
    if images and frames["images"] >= FRAMED * images and frames["images"] > frames["plain_ground"]:
        yield f"{percent(frames['images'] / images)} of the images have a frame, which a generator learns; crop it away"
    colour = split["channels"].get("3", 0)
    if colour and split["grey_as_colour"] >= GREY * colour:
        yield "the colour images are grey; make the set with --channels 1, a third of the pixels"
    yield from _grids(split["grids"] or {})


def _classes(split: Figures, path: str) -> Iterator[str]:
    found, shards = split["classes"], split["shards"]["count"]
    order, total = found["order"], split["samples"]
    if order is not None and order > classes.SORTED:
        figure = f"chi2/dof {order:.3g} over runs of {classes.RUN} samples; 1 is a shuffle"
        what = f"the classes lie in order in the shards ({figure})"
        if shards <= WINDOW:
            both = "the one shard" if shards == 1 else f"all {shards} shards"
            yield f"{what}; the default data.window of {WINDOW} mixes {both}, other readers do not"
        else:
            yield f"{what}; set data.window to all, or `tandem data reshard {path} DEST`, which shuffles"
    if 0 < found["unlabelled"] < total:
        have = "has" if found["unlabelled"] == 1 else "have"
        yield f"{found['unlabelled']:,} of {total:,} samples {have} no label"
    empty = [one["name"] for one in found["counts"] if not one["samples"]]
    if empty:
        have = "has" if len(empty) == 1 else "have"
        total_classes = counted(len(found["counts"]), "class", "classes")
        yield f"{len(empty):,} of {total_classes} {have} no sample, such as {empty[0]}"
    elif found["smallest_to_largest"] is not None and found["smallest_to_largest"] < UNEVEN:
        sizes = smallest_to_largest([one["samples"] for one in found["counts"]])
        yield f"the classes are uneven: {sizes}"


def _grids(grids: Mapping[str, float]) -> Iterator[str]:
    for period, depth in grids.items():
        what = f"a grid of {period} pixels ({depth:.0%}), which a generator learns"
        if period == "8" and depth >= tells.BLOCKS:
            yield f"{what}: strong JPEG compression leaves such a one, or drawings on one raster"
        elif period != "8":
            yield (
                f"{what}: enlargement {period} times leaves such a one, a network, or drawings on one raster; where "
                "images were enlarged a smaller data.size loses nothing"
            )


def _copies(copies: Figures) -> Iterator[str]:
    exact, near = copies["exact"], copies["near"]
    if exact["across_splits"]:
        shares = ", ".join(f"{count:,} of {name}" for name, count in exact["across_splits"].items() if count)
        yield f"splits share images: {shares} stand in another split too; test figures are too good"
    if exact["copies"]:
        yield f"{counted(exact['copies'], 'image is an exact copy', 'images are exact copies')} of others"
    if exact["labels_differ"]:
        yield f"{counted(exact['labels_differ'], 'group')} of equal images with different labels"
    if near["across_splits"]:
        yield f"{counted(near['across_splits'], 'pair')} of nearly equal images in different splits"

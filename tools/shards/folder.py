"""A folder of images as shards: what is in it, which class and split each image has, and its pixels."""

import argparse
import hashlib
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from tools.shards import named
from tools.shards.encode import SMALL, Encoded, encode
from tools.shards.pack import Bar, LeftOut, Packed, Plan, complete, pack
from tools.shards.words import counted
from trainer.data import convert
from trainer.data.convert import Undecodable
from trainer.errors import naming, shown

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pnm")
)
"""Compared without regard to case; the format is found from the content."""
LARGEST_FILE = 1 << 30  # bytes
DECISIVE = (
    "size", "channels", "val_fraction", "splits", "format", "background", "range", "max_megapixels", "shard_size",
    "shuffle", "seed",
)  # fmt: skip
"""Options that the bytes of the shards depend on."""


class Found(NamedTuple):
    """An image file. name: its path in SRC, as bytes of the file system in Python's way (surrogateescape)."""

    name: str
    label: int


@dataclass
class Listing:
    """What a folder holds: the images, and what was passed over."""

    images: list[tuple[str, int, int]] = field(default_factory=list)
    """(name, bytes, modification time in ns)."""
    hidden: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    """Symbolic links that leave SRC, lead nowhere, or lead to folders."""
    others: int = 0
    """Files that are no images by their extension."""


def list_images(source: Path) -> Listing:
    """Every image below `source`, sorted. Folders behind links are not entered, so nothing loops or is seen twice; a
    linked file counts where its target lies in `source`."""
    found = Listing()
    root = Path(os.path.realpath(source))
    for folder, folders, files in os.walk(root, onerror=_raise):
        here = os.path.relpath(folder, root)
        prefix = "" if here == "." else f"{here}/"
        for name in list(folders):
            if name.startswith("."):
                found.hidden.append(f"{prefix}{name}")
            elif os.path.islink(f"{folder}/{name}"):  # noqa: PTH114
                found.links.append(f"{prefix}{name}")
            else:
                continue
            folders.remove(name)
        folders.sort()
        for name in files:
            path, full = f"{prefix}{name}", Path(folder, name)
            if name.startswith("."):
                found.hidden.append(path)
            elif full.suffix.lower() not in EXTENSIONS:
                found.others += 1
            elif full.is_symlink() and not _inside(full, root):
                found.links.append(path)
            else:
                status = full.stat()
                if stat.S_ISREG(status.st_mode):
                    found.images.append((path, status.st_size, status.st_mtime_ns))
                else:
                    found.others += 1
    found.images.sort(key=lambda row: os.fsencode(row[0]))
    found.hidden.sort()
    found.links.sort()
    return found


def _raise(error: OSError) -> None:
    raise error


def _inside(link: Path, root: Path) -> bool:
    try:
        target = link.resolve(strict=True)
    except (OSError, RuntimeError):  # leads nowhere, or in a circle
        return False
    return target.is_file() and target.is_relative_to(root)


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sorting key: 1, 2, 10; numbers before text, upper case beside lower."""
    parts = re.findall(r"\d+|\D+", name)
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part.casefold()) for part in parts] + [(2, 0, name)]


def hashed(seed: int, name: str) -> int:
    """64 bits from the seed and a path: the order in the shards and the choice of the test split."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0".encode() + os.fsencode(name)).digest()[:8], "little")


def plan(
    listing: Listing, source: Path, *, seed: int, val_fraction: float, splits: tuple[str, str] | None, shuffle: bool,
    options: dict[str, Any],
) -> Plan[Found]:  # fmt: skip
    """Splits, classes and order. The first folder of a path (below the split's folder) is its class."""
    names = [name for name, _, _ in listing.images]
    if not names:
        kinds = " ".join(sorted(EXTENSIONS))
        passed = f" ({counted(listing.others, 'other file')}, {len(listing.hidden):,} hidden)"
        raise ValueError(f"{source}: holds no images{passed}; images are files ending in {kinds}")
    if splits is None:
        below = {split: {name: name for name in part} for split, part in divide(names, seed, val_fraction).items()}
    else:
        below = {split: _below(names, source, part) for split, part in zip(("train", "test"), splits, strict=True)}
    folders = sorted({_class(path) for part in below.values() for path in part.values()} - {""}, key=natural)
    if strange := [folder for folder in folders if not folder.isprintable()]:
        raise ValueError(f"{source}: the folder {shown(strange[0])} is no name of a class; give it one of plain signs")
    number = {folder: label for label, folder in enumerate(folders)}
    ordered = {
        split: [Found(name, number.get(_class(part[name]), -1)) for name in order(part, seed, shuffle=shuffle)]
        for split, part in below.items()
        if part
    }
    if "train" not in ordered:
        raise ValueError(f"{source}: leaves no image for training; lower --val-fraction")
    files = hashlib.sha256(repr(listing.images).encode("utf-8", "surrogateescape")).hexdigest()
    notes = {
        "hidden": listing.hidden,
        "links": listing.links,
        "not_images": listing.others,
        "without_class": sum(found.label < 0 for part in ordered.values() for found in part) if folders else 0,
    }
    return Plan(ordered, tuple(folders), {**options, "files": files}, notes)


def divide(names: Iterable[str], seed: int, fraction: float) -> dict[str, list[str]]:
    """{"train", "test"}: a name goes to the test split by a hash of seed and name alone, so that it never changes sides
    when others are added; at least one does where there are two and `fraction` is not 0."""
    # the hash of another stream than the order's, so that the split is no run of the order
    drawn = {name: hashed(seed, f"holdout/{name}") for name in names}
    limit = fraction * 2**64
    if fraction and len(drawn) > 1:
        limit = max(limit, min(drawn.values()) + 1)
    found: dict[str, list[str]] = {"train": [], "test": []}
    for name, value in drawn.items():
        found["test" if value < limit else "train"].append(name)
    return found


def order(names: Iterable[str], seed: int, *, shuffle: bool) -> list[str]:
    """By a hash of seed and name, or as they come."""
    return sorted(names, key=lambda name: (hashed(seed, name), name)) if shuffle else list(names)


def _below(names: list[str], source: Path, folder: str) -> dict[str, str]:
    """{name: path below `folder`} of the images there."""
    found = {name: name.removeprefix(f"{folder}/") for name in names if name.startswith(f"{folder}/")}
    if not found:
        raise ValueError(f"{source}: --splits names {folder}, which is no folder with images in it")
    return found


def _class(path: str) -> str:
    return path.partition("/")[0] if "/" in path else ""


class Encode:
    """One image file to one sample, or the reason why not. Runs in threads: the codecs release the interpreter."""

    def __init__(self, source: Path, options: argparse.Namespace) -> None:
        self.source, self.options = source, options
        self.max_pixels = int(options.max_megapixels * 1e6)

    def __call__(self, split: str, number: int, found: Found) -> Packed | LeftOut:
        path = self.source / found.name
        try:
            if path.stat().st_size > LARGEST_FILE:
                raise Undecodable(f"is larger than {LARGEST_FILE:,} bytes")
            with naming(path):
                data = path.read_bytes()
            return self._pack(f"{number:09d}", data, found)
        except Undecodable as error:
            return LeftOut(found.name, str(error))

    def _pack(self, key: str, data: bytes, found: Found) -> Packed:
        options = self.options
        if not data:
            raise Undecodable("is empty")
        picture = convert.open_image(data, max_pixels=self.max_pixels)
        image, notes = convert.pixels(picture, data, background=options.background, float_range=options.range)
        if options.channels and image.shape[2] != options.channels:
            notes = (*notes, "colour to grey" if options.channels == 1 else "grey repeated as colour")
            image = convert.with_channels(image, options.channels)
        if options.size:
            image = convert.resize(image, options.size)
        whole = not notes and image.shape[:2] == picture.size[::-1] and b"Exif\0\0" not in data
        if options.format == "auto" and picture.format == "JPEG" and whole and max(image.shape[:2]) > SMALL:
            made = Encoded("jpg", data, image.shape)  # as it is: encoding it again would lose quality
        else:
            made = encode(image, options.format)
        return Packed(key, *made[:2], found.label, {"path": found.name}, made.shape, notes)


def make(
    options: argparse.Namespace,
    *,
    bar: Bar,
    say: Callable[[str], int],
) -> int:
    """`tandem data make folder`. ValueError for what the user must mend."""
    source, dest = options.source, options.dest
    if not source.is_dir():
        what = "is no folder" if source.exists() else "does not exist"
        raise ValueError(f"{source}: {what}; give a folder of images")
    real = Path(os.path.realpath(dest))
    if real.is_relative_to(os.path.realpath(source)):
        raise ValueError(f"{dest}: lies inside {source}; choose a folder outside it, so that it is not read as images")
    if options.format == "webp" and options.channels == 1:
        raise ValueError("--channels 1: webp stores no grey; use --format png")
    settings = {"kind": "folder", **{name: getattr(options, name) for name in DECISIVE}}
    listing = list_images(source)
    wanted = plan(
        listing, source, seed=options.seed, val_fraction=options.val_fraction, splits=options.splits,
        shuffle=options.shuffle, options=settings,
    )  # fmt: skip
    if complete(dest, tuple(wanted.splits), wanted.options):
        return say(f"{dest}: already complete; nothing was written")
    with bar(sum(map(len, wanted.splits.values()))) as advance, _our_pixel_limit():
        made = pack(
            dest, wanted, Encode(source, options), shard_bytes=options.shard_size, workers=options.workers,
            max_bad=options.max_bad, advance=advance,
        )  # fmt: skip
    for line in _summary(made.report):
        say(line)
    return say(f"{dest}: {named.packed(made, 'images', wanted.classes)}; the report is in index.json")


def _summary(report: dict[str, Any]) -> Iterator[str]:
    yield from named.told(report)
    for key, one, many in (
        ("hidden", "hidden file or folder", "hidden files and folders"),
        ("links", "link that leaves the folder or leads to one", "links that leave the folder or lead to folders"),
    ):
        if names := report[key]:
            some = f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            yield f"skipped {counted(len(names), one, many)}: {some}"
    if count := report["not_images"]:
        one, many = "is no image by its extension", "are no images by their extension"
        yield f"{counted(count, 'file')} skipped that {one if count == 1 else many}"
    if count := report["without_class"]:
        one, many = "image lies beside the class folders and has", "images lie beside the class folders and have"
        yield f"{counted(count, one, many)} no class"


@contextmanager
def _our_pixel_limit() -> Iterator[None]:
    """--max-megapixels decides in place of Pillow's own limit; its warnings about odd tags are not shown."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    Image.init()  # its table of formats, before threads ask for it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before

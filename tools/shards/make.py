"""tandem data make KIND ... DEST

Writes WebDataset shards with an index. The same command goes on after an interruption; nothing is ever overwritten.
"""

import argparse
import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tools.shards import options as shared
from tools.shards.words import say

EXAMPLE = """\
examples:
  tandem data make fashion-mnist data/fashion-mnist
  tandem data make folder faces/ data/faces --size 128
  tandem data make folder imagenet/ data/imagenet64 --size 64 --splits train,val
"""

FACES = (
    "open-peeps", "adventurer", "avataaars", "big-ears", "big-smile", "lorelei", "micah", "notionists", "personas",
    "pixel-art", "toon-head",
)  # fmt: skip
"""Styles of DiceBear that draw faces."""


def add_fashion(to: argparse.ArgumentParser) -> None:
    shared.add_source(to, "folder with the four .gz files, or with the Debian package")
    shared.add_size(to, default=28)
    shared.add_format(to, "auto: npy")
    shared.add_packing(to, shard_size="12.8MB")


def add_folder(to: argparse.ArgumentParser) -> None:
    shared.add_size(to)
    to.add_argument("--channels", type=int, choices=(1, 3), help="grey or colour (default: as each image is)")
    split = to.add_mutually_exclusive_group()
    shared.add_val_fraction(split, "the images")
    split.add_argument(
        "--splits", type=shared.splits, metavar="TRAIN,TEST",
        help="folders in SRC that are the training and the test split, such as train,val",
    )  # fmt: skip
    shared.add_format(to, "auto: npy up to 64 pixels, else jpg, as it is or of quality 95")
    to.add_argument(
        "--background", type=shared.colour, default=(255, 255, 255), metavar="R,G,B",
        help="behind transparent pixels (default: white)",
    )  # fmt: skip
    to.add_argument(
        "--range", type=shared.interval, metavar="LOW,HIGH",
        help="values of float images that become black and white; without it float images are left out",
    )  # fmt: skip
    to.add_argument("--max-bad", type=shared.share, default=0.01, metavar="SHARE", help="of images that may be left "
                    "out (default: 0.01)")  # fmt: skip
    to.add_argument("--max-megapixels", type=shared.positive, default=64.0, metavar="M", help="larger ones are left "
                    "out before they are decoded (default: 64)")  # fmt: skip
    shared.add_packing(to)


def add_emoji(to: argparse.ArgumentParser) -> None:
    to.add_argument(
        "--style", choices=("google", "twitter", "pairs"), default="google",
        help="whose drawings; pairs: left as Google draws it, right as Twitter (default: google)",
    )  # fmt: skip
    shared.add_source(to, "folder with the packages' .tgz files, as `npm pack` writes them")
    shared.add_size(to, default=64, text="of the images; the drawings have 64")
    shared.add_format(to)
    shared.add_val_fraction(to, "the emoji, all skin tones and genders of one together,")
    shared.add_packing(to)


def add_faces(to: argparse.ArgumentParser) -> None:
    to.add_argument("--style", choices=FACES, default=FACES[0], metavar="STYLE",
                    help=f"of the drawings: {', '.join(FACES)} (default: {FACES[0]})")  # fmt: skip
    to.add_argument("--count", type=shared.count, default=20_000, metavar="N", help="of faces (default: 20000)")
    to.add_argument("--label", metavar="ATTRIBUTE", help="attribute that is the class, such as face or skinColor "
                    "(default: no classes; every attribute is in the .json)")  # fmt: skip
    shared.add_source(to, "folder with the node_modules that `npm ci` makes of tools/shards/node")
    shared.add_size(to, default=64, text="of the drawings, any")
    shared.add_format(to)
    shared.add_val_fraction(to, "the faces")
    shared.add_packing(to)


def add_photos(to: argparse.ArgumentParser) -> None:
    to.add_argument("--count", type=shared.count, default=8_000, metavar="N", help="of crops (default: 8000)")
    shared.add_source(to, "folder with the two .deb files, or where they are unpacked")
    shared.add_size(to, default=256, text="of the crops, up to 1024")
    shared.add_format(to)
    shared.add_val_fraction(to, "the photographs")
    shared.add_packing(to)


class Kind(NamedTuple):
    """A kind of set. Its module has `make(options, *, bar, say) -> exit code`, imported only when it is asked for."""

    module: str
    add: Callable[[argparse.ArgumentParser], None]
    help: str
    description: str
    example: str
    source: str | None = None
    """What SRC is, where there is one."""


KINDS = {
    "folder": Kind(
        "tools.shards.folder",
        add_folder,
        "any folder of images; its folders are the classes",
        "Packs a folder of images. Its folders are the classes, in natural order (1, 2, 10). Hidden files and folders "
        "are skipped; images that cannot be decoded wholly are left out and named in the report.",
        "tandem data make folder faces/ data/faces --size 128 --val-fraction 0.05",
        source="folder of images",
    ),
    "fashion-mnist": Kind(
        "tools.shards.fashion",
        add_fashion,
        "60,000 + 10,000 grey images of clothes, 28 x 28, 10 classes (31 MB to fetch)",
        "Fashion-MNIST: from the installed Debian package, else fetched as that package (no root needed), else from "
        "the project's site; the sha256 of its files is checked.",
        "tandem data make fashion-mnist data/fashion-mnist",
    ),
    "emoji": Kind(
        "tools.shards.emoji",
        add_emoji,
        "3,786 colour pictures with names and 10 categories, 64 x 64, or pairs of two styles (74 or 136 MB to fetch)",
        "Emoji as Google draws them (Apache-2.0) and as Twitter does (CC BY 4.0), from the npm packages "
        "emoji-datasource-google and -twitter 16.0.0; their sha512 is checked. Node is not needed.",
        "tandem data make emoji data/emoji --style pairs",
    ),
    "faces-drawn": Kind(
        "tools.shards.faces",
        add_faces,
        "illustrated faces, as many as wanted, any size, with exact attributes (7 MB to fetch; needs node)",
        "Faces drawn by DiceBear 9.4.3 from npm: illustrations, no photographs. The licence is the style's "
        "(open-peeps, lorelei, notionists, pixel-art: CC0; most others CC BY 4.0) and stands in index.json.",
        "tandem data make faces-drawn data/faces --count 50000 --size 128 --label face",
    ),
    "photos": Kind(
        "tools.shards.photos",
        add_photos,
        "crops of 23 photographs, 256 x 256, to measure throughput and reconstruction with (141 MB to fetch)",
        "Crops of the photographs in the Debian packages mate-backgrounds and plasma-workspace-wallpapers (GPL-2+), "
        "installed or fetched (no root needed); the sha256 of each photograph is checked.",
        "tandem data make photos data/photos --count 20000",
    ),
}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = shared.parser("tandem data make", description="Writes WebDataset shards with an index.", example=EXAMPLE)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="|".join(KINDS))
    for name, kind in KINDS.items():
        under = kinds.add_parser(
            name, help=kind.help, description=shared.filled(kind.description), epilog=f"example:\n  {kind.example}\n",
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        )  # fmt: skip
        if kind.source:
            under.add_argument("source", type=Path, metavar="SRC", help=kind.source)
        under.add_argument("dest", type=Path, metavar="DEST", help="folder to make")
        kind.add(under)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = parse(argv)
    return run(KINDS[options.kind].module, options)


def run(module: str, options: argparse.Namespace) -> int:
    """The `make` of a module, with a progress bar, and a word on how to go on after Ctrl-C."""
    try:
        return int(importlib.import_module(module).make(options, bar=bar, say=say))
    except KeyboardInterrupt:
        say(f"{options.dest}: interrupted; the same command goes on from here", to=sys.stderr)
        raise


@contextlib.contextmanager
def bar(total: int, what: str = "packing") -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr where that is a terminal and there is work; gives the function that moves it."""
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (console.is_terminal and total)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)


if __name__ == "__main__":
    from trainer.errors import boundary

    sys.exit(boundary(main, sys.argv[1:]))

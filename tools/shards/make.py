"""tandem data make fashion-mnist DEST tandem data make folder SRC DEST [--size N] ...

Writes WebDataset shards with an index. The same command goes on after an interruption; nothing is ever overwritten.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tools.shards.encode import FORMATS

EXAMPLE = """\
examples:
  tandem data make fashion-mnist data/fashion-mnist
  tandem data make folder faces/ data/faces --size 128
  tandem data make folder imagenet/ data/imagenet64 --size 64 --test-split val --workers 8
"""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = _parser(argparse.ArgumentParser, "tandem data make", "Writes WebDataset shards with an index.", EXAMPLE)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="fashion-mnist|folder")
    fashion = kinds.add_parser(
        "fashion-mnist",
        help="60,000 + 10,000 grey images of clothes, 28 x 28, 10 classes (31 MB to fetch)",
        description="Fashion-MNIST: from the installed Debian package, else fetched as that package (no root needed), "
        "else from the project's site; the sha256 of its files is checked.",
        epilog="example:\n  tandem data make fashion-mnist data/fashion-mnist\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    fashion.add_argument("dest", type=Path, metavar="DEST", help="folder to make")
    fashion.add_argument("--from", type=Path, dest="given", metavar="FOLDER", help="folder with the four .gz files")
    fashion.add_argument("--seed", type=int, default=0, help="of the order in the shards (default: 0)")

    folder = kinds.add_parser(
        "folder",
        help="any folder of images; its folders are the classes",
        description="Packs a folder of images. Its folders are the classes, in natural order (1, 2, 10). Hidden files "
        "and folders are skipped; images that cannot be decoded wholly are left out and named in the report.",
        epilog="example:\n  tandem data make folder faces/ data/faces --size 128 --holdout 0.05\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    folder.add_argument("source", type=Path, metavar="SRC", help="folder of images")
    folder.add_argument("dest", type=Path, metavar="DEST", help="folder to make")
    folder.add_argument("--size", type=size, metavar="N|HxW", help="resize the shorter side (antialiased), crop the "
                        "centre; without it sizes are kept, and the trainer wants them all equal")  # fmt: skip
    folder.add_argument("--channels", type=int, choices=(1, 3), help="grey or colour (default: as each image is)")
    split = folder.add_mutually_exclusive_group()
    split.add_argument("--holdout", type=share, default=0.1, metavar="SHARE", help="of the images that make the test "
                       "split, chosen by seed and name (default: 0.1)")  # fmt: skip
    split.add_argument("--test-split", metavar="NAME", help="folder in SRC that is the test split; SRC/train, or else "
                       "all other folders, are the training split")  # fmt: skip
    folder.add_argument("--format", choices=FORMATS, default="auto", help="auto: npy up to 64 pixels, else JPEG, as "
                        "it is or of quality 95; png and webp are lossless (default: auto)")  # fmt: skip
    folder.add_argument("--background", type=colour, default=(255, 255, 255), metavar="R,G,B",
                        help="behind transparent pixels (default: white)")  # fmt: skip
    folder.add_argument(
        "--range",
        type=interval,
        metavar="LOW,HIGH",
        help="values of float images that become black and white; without it float images are left out",
    )
    folder.add_argument("--max-bad", type=share, default=0.01, metavar="SHARE", help="of images that may be left out "
                        "(default: 0.01)")  # fmt: skip
    folder.add_argument("--max-megapixels", type=positive, default=64.0, metavar="M", help="larger ones are left out "
                        "before they are decoded (default: 64)")  # fmt: skip
    folder.add_argument("--shard-mb", type=positive, default=64.0, metavar="MB", help="size of a shard (default: 64)")
    folder.add_argument("--seed", type=int, default=0, help="of the order and of the holdout (default: 0)")
    folder.add_argument("--workers", type=count, default=min(8, os.cpu_count() or 1), metavar="N", help="threads that "
                        "decode and encode (default: the cores, 8 at most)")  # fmt: skip
    return parser.parse_args(argv)


def _parser(kind: type[argparse.ArgumentParser], name: str, text: str, example: str) -> argparse.ArgumentParser:
    return kind(
        prog=name,
        description=text,
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def size(text: str) -> tuple[int, int]:
    parts = [int(part) for part in text.lower().split("x")]
    if len(parts) > 2 or min(parts) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a size such as 64 or 48x64 (height x width)")
    return parts[0], parts[-1]


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share from 0 to below 1")
    return value


def positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def colour(text: str) -> tuple[int, int, int]:
    red, green, blue = (int(part) for part in text.split(","))
    if not all(0 <= level <= 255 for level in (red, green, blue)):
        raise argparse.ArgumentTypeError(f"{text} is not three levels from 0 to 255")
    return red, green, blue


def interval(text: str) -> tuple[float, float]:
    low, high = (float(part) for part in text.split(","))
    if not low < high:
        raise argparse.ArgumentTypeError(f"{text} is not a range such as 0,1")
    return low, high


def main(argv: list[str]) -> int:
    options = parse(argv)
    try:
        return _fashion(options) if options.kind == "fashion-mnist" else _folder(options)
    except KeyboardInterrupt:
        print(f"{options.dest}: interrupted; the same command goes on from here", file=sys.stderr)
        raise


def _fashion(options: argparse.Namespace) -> int:
    from tools.shards import fashion  # here: --help should not wait for numpy and torch
    from tools.shards.pack import complete, pack

    wanted = {"kind": "fashion-mnist", "seed": options.seed}
    if complete(options.dest, ("train", "test"), wanted):
        return _say(f"{options.dest}: already complete; nothing was written")
    with fashion.files(options.given) as folder:
        arrays = fashion.read(folder)
    plan = fashion.plan(arrays, seed=options.seed)
    with _bar(sum(map(len, plan.splits.values()))) as advance:
        pack(
            options.dest, plan, fashion.Encode(arrays), shard_bytes=fashion.SHARD_BYTES, workers=1, max_bad=0.0,
            advance=advance,
        )  # fmt: skip
    train, test = (len(plan.splits[split]) for split in ("train", "test"))
    return _say(f"{options.dest}: {train:,} training and {test:,} test images, 28 x 28 grey, 10 classes")


def _folder(options: argparse.Namespace) -> int:
    from tools.shards import folder

    return folder.make(options, bar=_bar, say=_say)


def _say(text: str) -> int:
    print(text.encode(errors="backslashreplace").decode())  # file names need not be UTF-8
    return 0


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr where that is a terminal; gives the function that moves it."""
    console = Console(stderr=True)
    columns = (TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("packing", total=total)
        yield lambda count: progress.advance(task, count)


if __name__ == "__main__":
    from trainer.errors import boundary

    sys.exit(boundary(main, sys.argv[1:]))

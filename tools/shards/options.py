"""The options that the makers of shards share, and what their words mean. Imports nothing heavy: `--help` answers at
once."""

import argparse
import os
import re
import shutil
import textwrap
from decimal import Decimal
from pathlib import Path

FORMATS = ("auto", "jpg", "png", "webp", "npy")
CACHE = Path("~/.cache/tandem/packages")
"""Where fetched packages stay; beside the trainer's own fetched shards."""
UNITS = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_CROP = "resize the shorter side (antialiased), crop the centre"
LARGEST_SIDE = 16_384
"""Pixels of an image that is made: 800 MB in colour."""
LEAST_SHARD = 1_000
"""Bytes, less than a sample takes in a tar: a smaller figure lacks its unit's letter."""
MOST = 1_000_000_000


def parser(name: str, *, description: str, example: str) -> argparse.ArgumentParser:
    """A parser of a verb with an example under its help; options are never abbreviated."""
    return argparse.ArgumentParser(
        prog=name,
        description=filled(description),
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def filled(text: str) -> str:
    """As wide as the terminal; argparse leaves a description alone where it leaves the example alone."""
    return textwrap.fill(text, shutil.get_terminal_size().columns - 2)


def add_packing(to: argparse.ArgumentParser, *, shard_size: str = "64MB") -> None:
    """How shards are cut and ordered, and how many threads make them."""
    to.add_argument(
        "--shard-size", type=bytes_of_a_shard, default=shard_size, metavar="BYTES",
        help=f"of a shard at most, with its unit, such as 64MB (default: {shard_size})",
    )  # fmt: skip
    to.add_argument(
        "--shuffle", action=argparse.BooleanOptionalAction, default=True,
        help="the order in the shards is by a hash of seed and name (the default), or as the source has it",
    )  # fmt: skip
    to.add_argument("--seed", type=seed, default=0, metavar="N", help="of the order and of every choice (default: 0)")
    to.add_argument(
        "--workers", type=count, default=min(8, os.cpu_count() or 1), metavar="N",
        help="threads that decode and encode; no byte depends on it (default: the cores, 8 at most)",
    )  # fmt: skip


def add_size(to: argparse.ArgumentParser, *, default: int | None = None, text: str = _CROP) -> None:
    said = f"{text}; without it sizes are kept" if default is None else f"{text} (default: {default})"
    to.add_argument("--size", type=size, default=default and (default, default), metavar="N|HxW", help=said)


def add_format(to: argparse.ArgumentParser, text: str = "auto: npy up to 64 pixels, else jpg of quality 95") -> None:
    to.add_argument("--format", choices=FORMATS, default="auto", help=f"{text}; png, webp and npy lose nothing "
                    "(default: auto)")  # fmt: skip


def add_val_fraction(to: "argparse.ArgumentParser | argparse._MutuallyExclusiveGroup", what: str) -> None:
    to.add_argument("--val-fraction", type=share, default=0.1, metavar="SHARE",
                    help=f"of {what} that makes the test split, chosen by seed and name (default: 0.1)")  # fmt: skip


def add_source(to: argparse.ArgumentParser, holds: str) -> None:
    """Where packages come from."""
    to.add_argument("--from", type=Path, dest="given", metavar="FOLDER", help=f"without network: {holds}")
    to.add_argument("--cache", type=Path, default=CACHE, metavar="FOLDER",
                    help=f"where fetched packages stay (default: {CACHE})")  # fmt: skip


def size(text: str) -> tuple[int, int]:
    parts = [int(part) for part in text.lower().split("x")]
    if len(parts) > 2 or not all(1 <= part <= LARGEST_SIDE for part in parts):
        form = f"such as 64 or 48x64 (height x width), up to {LARGEST_SIDE:,}"
        raise argparse.ArgumentTypeError(f"{text} is not a size {form}")
    return parts[0], parts[-1]


def size_in_bytes(text: str) -> int:
    found = re.fullmatch(rf"(\d+(?:\.\d+)?) ?({'|'.join(UNITS)})", text)
    if found is None or not (value := int(Decimal(found[1]) * UNITS[found[2]])):
        raise argparse.ArgumentTypeError(f"{text} is no size with a unit ({', '.join(UNITS)}), such as 64MB")
    return value


def bytes_of_a_shard(text: str) -> int:
    value = size_in_bytes(text)
    if value < LEAST_SHARD:
        raise argparse.ArgumentTypeError(f"{text} is less than a sample takes; give a size such as 64MB")
    return value


def splits(text: str) -> tuple[str, str]:
    names = tuple(name.strip("/") for name in text.split(","))
    if len(names) != 2 or not all(names) or names[0] == names[1]:
        raise argparse.ArgumentTypeError(f"{text} is not two folders such as train,val")
    return names[0], names[1]


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share from 0 to below 1")
    return value


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < MOST:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and below {MOST:,}")
    return value


def seed(text: str) -> int:
    value = int(text)
    if not -(2**63) <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is no number of 64 bits")
    return value


def count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= MOST:
        raise argparse.ArgumentTypeError(f"{text} is not from 1 to {MOST:,}")
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

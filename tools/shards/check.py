"""tandem data check DEST [--deep]

Verifies shards against their index: sizes, sample counts, places, sha256; with --deep every image is decoded.
"""

import argparse
import sys
from pathlib import Path

from trainer.errors import one_line

EXAMPLE = """\
example:
  tandem data check data/faces --deep
"""
SHOWN = 5  # faults in the message


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="tandem data check",
        description="Verifies shards against their index: sizes, sample counts, sha256. Shards without an index are "
        "scanned: whether they are whole, and every sample has one image.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("dest", type=Path, metavar="DEST", help="folder that holds train/ and test/")
    parser.add_argument("--deep", action="store_true", help="decode every image too")
    options = parser.parse_args(argv)
    splits = _splits(options.dest)
    faults: list[str] = []
    for split in splits:
        found, line = check(options.dest, split, deep=options.deep)
        faults += found
        if not found:
            print(line)
    if faults:
        more = [f"and {len(faults) - SHOWN} more faults"] if len(faults) > SHOWN else []
        raise ValueError("\n".join([*faults[:SHOWN], *more]))
    return 0


def _splits(dest: Path) -> list[str]:
    if not dest.is_dir():
        raise ValueError(f"{dest}: does not exist; make it with `tandem data make`")
    found = sorted(path.name for path in dest.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not found:
        raise ValueError(f"{dest}: holds no split (train/, test/); make it with `tandem data make`")
    return found


def check(dest: Path, split: str, *, deep: bool) -> tuple[list[str], str]:
    """(faults, the line that says it is well). Every shard is looked at, so that all faults are named at once."""
    from trainer.data import index as indices  # here: --help should not wait for numpy and torch

    try:
        index = indices.load(dest, split)
    except ValueError as error:
        return [one_line(error)], ""
    faults = []
    for number, shard in enumerate(index.shards):
        path = index.folder / shard.name
        if (index.folder / "index.json").exists():
            fault = _compare(index, number)
            if fault:
                faults.append(f"{path}: {fault}; copy the shard again or make the set again")
                continue
        if deep:
            faults += _decode_all(index, number)
    size = f"{index.height} x {index.width} x {index.channels}"
    total = sum(shard.bytes for shard in index.shards)
    what = "every image decodes" if deep else "sizes, counts and digests are right"
    said = f"{index.samples:,} samples in {len(index.shards)} shards, {total:,} bytes, {size}: {what}"
    return faults, f"{index.folder}: {said}"


def _compare(index: "indices.Index", number: int) -> str | None:  # type: ignore[name-defined]  # noqa: F821
    """What of a shard is not as its index says."""
    from trainer import durable
    from trainer.data import tar

    shard = index.shards[number]
    path = index.folder / shard.name
    if durable.sha256(path) == shard.sha256:
        return None
    try:
        found = len({member.key for member in tar.scan(path)})
    except (tar.ShardCut, ValueError):
        found = 0
    if found != shard.samples:
        return f"expected {shard.samples} samples, found {found}"
    return "its bytes changed (another sha256 than in index.json)"


def _decode_all(index: "indices.Index", number: int) -> list[str]:  # type: ignore[name-defined]  # noqa: F821
    """Each image that cannot be decoded, with shard, key and reason."""
    from trainer.data.convert import Undecodable
    from trainer.data.decode import decode

    faults = []
    largest = index.height.high * index.width.high if index.height and index.width else 1 << 26
    with (index.folder / index.shards[number].name).open("rb") as file:
        for sample in range(int(index.starts[number]), int(index.starts[number + 1])):
            file.seek(int(index.offset[sample]))
            data = file.read(int(index.size[sample]))
            try:
                decode(data, index.fields[index.field[sample]], channels=None, max_pixels=largest)
            except Undecodable as error:
                faults.append(f"{index.where(sample)}: {error}")
    return faults


if __name__ == "__main__":
    from trainer.errors import boundary

    sys.exit(boundary(main, sys.argv[1:]))

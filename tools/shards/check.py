"""tandem data verify DEST [--deep]

Verifies shards against their index: sizes, sample counts, sha256, tables; with --deep every place and every image.
"""

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from tools.shards import options as shared
from tools.shards.words import counted, say
from trainer.errors import one_line

if TYPE_CHECKING:  # --help should not wait for numpy
    from trainer.data.config import ShardsConfig
    from trainer.data.index import Index

EXAMPLE = """\
examples:
  tandem data verify data/faces
  tandem data verify data/faces --deep
  tandem data check data/faces              # another name of the same verb
"""
SHOWN = 5  # faults in the message
WORKERS = min(4, os.cpu_count() or 1)  # threads, a shard each: hashing and decoding leave the interpreter
BLOCK = 4 << 20  # bytes that are hashed at a time


def main(argv: list[str]) -> int:
    parser = shared.parser(
        "tandem data verify",
        description="Verifies shards against their index: sizes, sample counts, sha256, and that all splits have "
        "the same classes. Shards without an index are scanned: whether they are whole, and every sample has an image.",
        example=EXAMPLE,
    )
    parser.add_argument("dest", metavar="DEST", help="folder or URL that holds train/ and test/")
    parser.add_argument("--deep", action="store_true", help="scan the shards again, compare places and labels "
                        "with the tables, and decode every image")  # fmt: skip
    options = parser.parse_args(argv)
    from trainer.data import part
    from trainer.data.config import ShardsConfig

    config = ShardsConfig(path=options.dest, size=1, verify="size")  # every sha256 is compared here
    faults: list[str] = []
    known: dict[str, tuple[str, ...]] = {}
    for split in part.splits_of(config, options.dest):
        found, line, classes = check(config, split, deep=options.deep)
        faults += found
        if not found:
            say(line)
            known[f"{options.dest}/{split}"] = classes
    faults += _differ(known)
    if faults:
        more = [f"and {counted(len(faults) - SHOWN, 'more fault')}"] if len(faults) > SHOWN else []
        raise ValueError("\n".join([*faults[:SHOWN], *more]))
    return 0


def _differ(known: dict[str, tuple[str, ...]]) -> list[str]:
    from tools.shards.classes import common

    try:
        common(known or {"": ()})
    except ValueError as error:
        return [one_line(error)]
    return []


def check(config: "ShardsConfig", split: str, *, deep: bool) -> tuple[list[str], str, tuple[str, ...]]:
    """(faults, the line that says it is well, classes). Every shard is looked at: all faults are named at once."""
    from trainer.data import index as indices
    from trainer.data.bar import bar

    try:
        index = indices.load(config, split)
    except ValueError as error:
        return [one_line(error)], "", ()
    faults: list[str] = []
    numbers = range(len(index.shards))
    with bar("verifying", len(numbers)) as advance, ThreadPoolExecutor(WORKERS) as pool:
        for found in pool.map(lambda number: list(_faults(index, number, config, deep=deep)), numbers):
            faults += found
            advance(1)
    index.close()
    spans = (index.height, index.width, index.channels)
    size = "" if None in spans else f", {' x '.join(map(str, spans))}"  # without one: only decoding tells it
    total = sum(shard.bytes for shard in index.shards)
    what = "every image decodes" if deep else "sizes, counts and digests are right"
    holds = f"{counted(index.samples, 'sample')} in {counted(len(index.shards), 'shard')}, {total:,} bytes"
    return faults, f"{index.store(0).name}: {holds}{size}: {what}", index.classes


def _faults(index: "Index", number: int, config: "ShardsConfig", *, deep: bool) -> Iterator[str]:
    """What of a shard is not as its index says."""
    shard, store = index.shards[number], index.store(number)
    path = f"{store.name}/{shard.name}"
    try:
        index.table(number)
        with contextlib.closing(store.open(shard)) as opened:
            if _sha256(opened.fd) != shard.sha256:
                yield f"{path}: {_changed(index, number, opened.fd)}; copy the shard again or make the set again"
            elif deep:
                yield from _compare(index, number, opened.fd, config)
                yield from _decode_all(index, number, opened.fd, config)
    except (ValueError, OSError) as error:
        yield one_line(error)


def _sha256(descriptor: int) -> str:
    digest, position = hashlib.sha256(), 0
    while block := os.pread(descriptor, BLOCK, position):
        digest.update(block)
        position += len(block)
    return digest.hexdigest()


def _changed(index: "Index", number: int, descriptor: int) -> str:
    from trainer.data import tar

    try:
        found = len({member.key for member in tar.scan(descriptor, index.shards[number].name)})
    except tar.ShardCut as cut:
        found = len({member.key for member in cut.found})
    except ValueError:
        found = 0
    if found != index.shards[number].samples:
        return f"expected {counted(index.shards[number].samples, 'sample')}, found {found}"
    return "its bytes changed (another sha256 than in index.json)"


def _compare(index: "Index", number: int, descriptor: int, config: "ShardsConfig") -> Iterator[str]:
    """Whether a new scan finds the samples where the table says."""
    import numpy as np

    from trainer.data.build import renumber
    from trainer.data.scan import Wanted, scan

    found = index.parts[0].contents
    image = found.fields[0] if len(found.fields) == 1 else str(found.reading["image"])
    wanted = Wanted(
        image=image,
        label=str(found.reading["label"]),
        ignore=tuple(found.reading["ignore"]),
        limits=config.limits,
    )
    path = f"{index.store(number).name}/{index.shards[number].name}"
    scanned, table = scan(descriptor, path, wanted), index.table(number)
    rows = scanned.rows
    if not all(np.array_equal(rows[name], table[name]) for name in ("begin", "end", "offset", "size", "key")):
        yield f"{path}: its table places samples elsewhere than they are; run `tandem data index` on the set"
        return
    numbers = {name: place for place, name in enumerate(found.classes)}
    try:
        renumber(rows, scanned.fields, scanned.texts, fields=found.fields, classes=numbers)
    except (KeyError, ValueError):  # a class or a field that the set does not have
        rows["label"] = -2
    wrong = np.flatnonzero((rows["label"] != table["label"]) | (rows["field"] != table["field"]))
    if len(wrong):
        first, so = index.where(int(index.starts[number] + wrong[0])), counted(len(wrong), "sample")
        yield f"{first}: its table has another class or field than its shard ({so}); run `tandem data index` on the set"


def _decode_all(index: "Index", number: int, descriptor: int, config: "ShardsConfig") -> Iterator[str]:
    """Each image that cannot be decoded, with shard, key and reason."""
    import numpy as np

    from tools.shards import walk

    for samples in walk.pieces(index, np.arange(index.starts[number], index.starts[number + 1])):
        for sample, why in walk.decoded(index, config, number, samples, descriptor=descriptor).bad:
            yield f"{index.where(sample)}: {why}"


if __name__ == "__main__":
    from trainer.errors import boundary

    sys.exit(boundary(main, sys.argv[1:]))

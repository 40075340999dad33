"""tandem data reshard SRC DEST [--shard-size BYTES] [--no-shuffle] [--size N] [--format F]

Makes shards of ours from those of any maker: cut and shuffled anew, resized or re-encoded where asked.
"""

import argparse
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.shards import options as shared
from trainer.errors import naming

if TYPE_CHECKING:  # --help should not wait for numpy and torch
    from tools.shards.encode import Encoded
    from tools.shards.pack import Bar, LeftOut, Packed
    from trainer.data import tar
    from trainer.data.index import Index
    from trainer.data.store import OpenShard

EXAMPLE = """\
examples:
  tandem data reshard data/faces data/faces64 --size 64
  tandem data reshard imagenet-wds/ data/imagenet --shard-size 256MB --label cls
"""
OPEN = 64  # shards that are open at once
LARGEST = 1 << 28  # pixels of an image that is resized or re-encoded


def main(argv: list[str]) -> int:
    from tools.shards.make import run

    return run("tools.shards.reshard", parse(argv))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = shared.parser(
        "tandem data reshard",
        description="Copies a set into shards of another size, shuffled, or resized and re-encoded where asked. Every "
        "member, label and class is kept; images that need no change are kept byte for byte, and are not decoded.",
        example=EXAMPLE,
    )
    parser.add_argument("source", metavar="SRC", help="folder or URL with train/ and test/, of any maker")
    parser.add_argument("dest", type=Path, metavar="DEST", help="folder to make")
    parser.add_argument("--splits", default="", metavar="NAME,...", help="folders in SRC (default: all that hold "
                        "shards; of a URL train and test)")  # fmt: skip
    shared.add_size(parser)
    parser.add_argument("--format", choices=("keep", *shared.FORMATS), default="keep", help="of the images; keep: as "
                        "each is; auto: npy up to 64 pixels, else jpg of quality 95 (default: keep)")  # fmt: skip
    parser.add_argument("--image", default="auto", metavar="FIELD", help="of the image, of shards without an index")
    parser.add_argument("--label", default="auto", metavar="FIELD", help="of the class, such as cls or json:species, "
                        "of shards without an index")  # fmt: skip
    parser.add_argument("--ignore", default="", metavar="FIELD,...", help="fields that are left out")
    parser.add_argument("--max-bad", type=shared.share, default=0.01, metavar="SHARE", help="of images that may be "
                        "left out because they cannot be decoded (default: 0.01)")  # fmt: skip
    shared.add_packing(parser)
    return parser.parse_args(argv)


def make(options: argparse.Namespace, *, bar: "Bar", say: Callable[[str], int]) -> int:
    """ValueError for what the user must mend."""
    import numpy as np

    from tools.shards import named
    from tools.shards.classes import common
    from tools.shards.pack import Plan, complete
    from trainer.data.order import permutation

    indices = _load(options)
    if options.size or options.format != "keep":
        _refuse_grey(indices, options)
    wanted = {
        "kind": "reshard",
        "source": {split: index.fingerprint for split, index in indices.items()},
        **{name: getattr(options, name) for name in ("size", "format", "ignore", "shard_size", "shuffle", "seed")},
    }
    if complete(options.dest, tuple(indices), wanted):
        return say(f"{options.dest}: already complete; nothing was written")
    splits = {
        split: (
            permutation(index.samples, options.seed, number) if options.shuffle else np.arange(index.samples)
        ).tolist()
        for number, (split, index) in enumerate(indices.items())
    }
    classes = common({split: index.classes for split, index in indices.items()})
    copies = {split: Copy(index, options) for split, index in indices.items()}
    report: Mapping[str, Any] = next(iter(indices.values())).report
    kept = {name: value for name, value in report.items() if name not in ("converted", "left_out", "passed_over")}
    plan = Plan(splits, classes, wanted, {**kept, "resharded_from": str(options.source)})
    return named.finish(
        options, plan, lambda split, number, sample: copies[split](sample), what="samples", bar=bar, say=say,
        max_bad=options.max_bad,
    )  # fmt: skip


def _load(options: argparse.Namespace) -> dict[str, "Index"]:
    """{split: index}, train first. Shards without an index are scanned once."""
    from trainer.data import index
    from trainer.data.config import ShardsConfig
    from trainer.data.store import is_folder

    ignore = tuple(filter(None, options.ignore.split(",")))
    config = ShardsConfig(path=options.source, size=1, image=options.image, label=options.label, ignore=ignore)
    splits = list(filter(None, options.splits.split(",")))
    if is_folder(options.source):
        source = Path(options.source).expanduser()
        if not source.is_dir():
            raise ValueError(f"{options.source}: does not exist; give a folder with train/ in it")
        if Path(os.path.realpath(options.dest)).is_relative_to(os.path.realpath(source)):
            raise ValueError(f"{options.dest}: lies inside {options.source}; choose a folder outside it")
        splits = splits or sorted({path.parent.name for path in source.glob("*/*.tar")})
        if not splits:
            raise ValueError(f"{options.source}: holds no train/*.tar; put the shards into a folder of that name")
    splits = splits or ["train", "test"]
    return {split: index.load(config, split) for split in sorted(splits, key=lambda name: (name != "train", name))}


def _refuse_grey(indices: Mapping[str, "Index"], options: argparse.Namespace) -> None:
    grey = any(index.channels is not None and index.channels.low == 1 for index in indices.values())
    if options.format == "webp" and grey:
        raise ValueError("--format webp: it stores no grey, which this set has; use --format png")


class Copy:
    """A sample of the source to one of ours. Runs in threads."""

    def __init__(self, index: "Index", options: argparse.Namespace) -> None:
        import numpy as np

        self.index, self.options = index, options
        self.ignore = {name.lower() for name in options.ignore.split(",")}
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._lock = threading.Lock()
        keys = np.concatenate([index.table(shard)["key"] for shard in range(len(index.shards))])
        self.unique = len(np.unique(keys)) == len(keys)
        """Whether keys say one sample of the split. Else the number of its shard is put before each."""

    def __call__(self, sample: int) -> "Packed | LeftOut":
        import numpy as np

        from tools.shards.pack import LeftOut, Packed
        from trainer.data.convert import Undecodable
        from trainer.data.index import LABEL_FIELD

        row = self.index.rows(np.array([sample]))[0]
        shard = int(self.index.shard_of(np.array([sample]))[0])
        data, members = self._members(sample, shard, int(row["begin"]), int(row["end"]))
        content = {member.field: data[member.offset : member.offset + member.size] for member in members}
        name = self.index.fields[row["field"]]
        label = int(row["label"])
        try:
            made = self._image(name, content.pop(name))
        except Undecodable as error:
            return LeftOut(self.index.where(sample), str(error))
        if label >= 0:
            content.pop(LABEL_FIELD, None)  # written again, as the number in our classes
        extra = dict(self._rest(content))
        key = members[0].key if self.unique else f"{shard:05d}/{members[0].key}"
        return Packed(key, *made[:2], label, None, made.shape, extra=extra)

    def _members(self, sample: int, shard: int, begin: int, end: int) -> tuple[bytes, "list[tar.Member]"]:
        from trainer.data import tar

        where = f"{self.index.store(shard).name}/{self.index.shards[shard].name}"
        with naming(where):
            data = os.pread(self._opened(shard).fd, end - begin, begin)
        if len(data) < end - begin:
            raise ValueError(f"{where}: was cut short while it was read")
        found = tar.members(lambda at, count: data[at : at + count], where, total=len(data), marked=False)
        return data, [member for member in found if member.field]

    def _opened(self, shard: int) -> "OpenShard":
        """Kept while it is among the last ones; whoever reads one that goes holds a reference."""
        with self._lock:
            found = self._open.get(shard)
            if found is None:
                found = self._open[shard] = self.index.store(shard).open(self.index.shards[shard])
            self._open.move_to_end(shard)
            if len(self._open) > OPEN:
                self._open.popitem(last=False)
            return found

    def _rest(self, content: Mapping[str, bytes]) -> "Iterator[tuple[str, bytes]]":
        """What else a sample has; further images are changed like its image, where they can be decoded."""
        from trainer.data.convert import Undecodable
        from trainer.data.scan import IMAGE_FIELDS, kind_of

        for field, data in content.items():
            if field in self.ignore:
                continue
            if kind_of(field) in IMAGE_FIELDS:
                try:
                    made = self._image(field, data)
                    yield made.field, made.data
                    continue
                except Undecodable:
                    pass  # an array of another kind: kept as it is
            yield field, data

    def _image(self, field: str, data: bytes) -> "Encoded":
        """Undecodable: changed images only, and those whose header does not say their size."""
        from tools.shards.encode import Encoded, encode
        from trainer.data import convert, decode

        size, form = self.options.size, self.options.format
        prefix, dot, kind = field.rpartition(".")
        told = decode.shape(data, field)
        as_it_is = form in ("keep", kind) and told is not None and size in (None, told[:2])
        if as_it_is:
            return Encoded(field, data, told)
        image = decode.decode(data, field, channels=None, max_pixels=LARGEST)
        if size is None and form in ("keep", kind):
            return Encoded(field, data, image.shape)
        if size is not None:
            image = convert.resize(image, size)
        own = "jpg" if kind == "jpeg" else kind
        made = encode(image, own if form == "keep" else form)
        return made._replace(field=f"{prefix}{dot}{made.field}")


if __name__ == "__main__":
    from trainer.errors import boundary

    sys.exit(boundary(main, sys.argv[1:]))

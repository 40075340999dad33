"""tandem data index DEST [--image F] [--label F] [--ignore F,...]

Builds or renews the index of a set: one pass over its shards.
"""

import sys

from tools.shards import options as shared
from tools.shards.words import counted, say

EXAMPLE = """\
examples:
  tandem data index data/faces
  tandem data index data/faces --image jpg --label json:species
"""


def main(argv: list[str]) -> int:
    parser = shared.parser(
        "tandem data index",
        description="Builds or renews the index of WebDataset shards: where each sample lies, its class, the sha256 of "
        "each shard. Reads every shard once. The index lies beside the shards, or in the cache where DEST is a URL or "
        "read-only.",
        example=EXAMPLE,
    )
    parser.add_argument("dest", metavar="DEST", help="folder or URL that holds train/ and test/")
    parser.add_argument("--image", default="auto", metavar="FIELD", help="that holds the image, such as left.png "
                        "(default: as before, else the one with a known extension)")  # fmt: skip
    parser.add_argument("--label", default="auto", metavar="FIELD", help="that holds the class, a number or text, or "
                        "json:KEY (default: as before, else the number in cls)")  # fmt: skip
    parser.add_argument("--ignore", default="", metavar="FIELD,...", help="fields to pass over although their kind is "
                        "refused, such as pyd")  # fmt: skip
    options = parser.parse_args(argv)
    from trainer.data import contents, part  # here: --help should not wait for numpy and torch
    from trainer.data.config import ShardsConfig

    config = ShardsConfig(
        path=options.dest,
        size=1,
        image=options.image,
        label=options.label,
        ignore=tuple(filter(None, options.ignore.split(","))),
    )
    for found in part.renew(config, options.dest):
        holds, where = found.contents, found.file(contents.NAME)
        shards, classes = counted(len(holds.shards), "shard"), counted(len(holds.classes), "class", "classes")
        say(f"{where}: {counted(holds.samples, 'sample')} in {shards}, {classes}")
    return 0


if __name__ == "__main__":
    from trainer.errors import boundary

    sys.exit(boundary(main, sys.argv[1:]))

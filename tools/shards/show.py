"""tandem data show CONFIG [key=value ...] [--images N] [--updates K] [--start IMAGES] [--out FILE.png]

Draws what a batch of a config really looks like to the networks, beside what is stored. The same batch every time.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tools.shards import options as shared
from tools.shards.words import counted, say

if TYPE_CHECKING:  # --help should not wait for torch
    import numpy as np
    from numpy.typing import NDArray

    from tools.shards.sheet import Tile
    from trainer.config import Config
    from trainer.data import Stream

EXAMPLE = """\
examples:
  tandem data show configs/vaegan_fashion.yaml
  tandem data show configs/vaegan_fashion.yaml data.flip=true --updates 3
"""
COLUMNS = 4
LATEST = 10**15  # images that a run has seen
BETWEEN = 4  # pixels between an image as it is stored and as it is given


def main(argv: list[str]) -> int:
    parser = shared.parser(
        "tandem data show",
        description="Draws what a batch of a config really looks like to the networks: cut, scaled, mirrored as in the "
        "run, beside the image as it is stored, with position, class and sample. The same every time.",
        example=EXAMPLE,
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="of the run, a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="what is otherwise than in CONFIG, such "
                        "as data.flip=true")  # fmt: skip
    parser.add_argument("--images", type=shared.count, default=16, metavar="N", help="the first of each batch "
                        "(default: 16)")  # fmt: skip
    parser.add_argument("--updates", type=shared.count, default=1, metavar="K", help="batches, one after the other "
                        "(default: 1)")  # fmt: skip
    parser.add_argument("--start", type=int, default=0, metavar="IMAGES", help="images that the run has seen "
                        "before (default: 0)")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="PNG to write (default: data_CONFIG.png)")
    options = parser.parse_intermixed_args(argv)
    from tools.shards import sheet
    from trainer import config as configuration
    from trainer.pictures import write_png

    if not 0 <= options.start <= LATEST:
        raise ValueError(f"--start: {options.start} is no number of images from 0 to {LATEST:,}")
    config = configuration.load(options.config, options.overrides)
    path = options.out or Path(f"data_{options.config.stem}.png")
    sheet.check_name(path)
    groups = list(_batches(config, images=options.images, updates=options.updates, start=options.start))
    rows, names = [], []
    for number, tiles in enumerate(groups):
        for at in range(0, len(tiles), COLUMNS):
            rows.append(tiles[at : at + COLUMNS])
            names.append(f"update {options.start // config.batch + number + 1}" if at == 0 else "")
    height, width, _ = config.data.shape
    mirrored = ", mirrored by chance" if config.data.flip else ""
    picture = sheet.draw(
        f"{options.config}   batch {config.batch}, seed {config.seed}, from image {options.start:,} on",
        rows,
        names=names if options.updates > 1 else (),
        note=f"left: as stored; right: as the networks see it, {height} x {width}, fit {config.data.fit}{mirrored}",
        behind=False,
    )
    write_png(path, picture, overwrite=True)
    updates = "an update" if options.updates == 1 else f"{options.updates} updates"
    drawn = counted(sum(map(len, groups)), "image")
    return say(f"{path}: {drawn} of {updates} of {options.config}")


def _batches(config: "Config", *, images: int, updates: int, start: int) -> "Iterator[list[Tile]]":
    """Of each batch its first images, through the same calls as in trainer/loop.py."""
    import torch

    from trainer.data import Feed, Stream, Transform, to_uint8

    data = replace(config.data, cache_mb=0)  # a few images are wanted, not a split in memory
    stream = Stream(data, split="train", batch=config.batch, rank=0, world=1, seed=config.seed)
    feed = Feed(
        stream.batches(start),
        device=torch.device("cpu"),
        transform=Transform.training(data, seed=config.seed),
    )
    try:
        for _ in range(updates):
            feed.fetch()
            if feed.fault is not None:
                raise ValueError(feed.fault)
            batch = feed.take()
            yield _tiles(
                stream,
                given=to_uint8(batch.image[:images]).numpy(),
                samples=batch.index[:images].numpy(),
                labels=batch.label[:images].tolist(),
                positions=batch.position[:images].tolist(),
            )
    finally:
        stream.close()


def _tiles(
    stream: "Stream",
    *,
    given: "NDArray[np.uint8]",
    samples: "NDArray[np.int64]",
    labels: list[int],
    positions: list[int],
) -> "list[Tile]":
    """given: (n, H, W, C), what the networks see of the samples."""
    import numpy as np

    from tools.shards.sheet import CELL, Tile, beside, fit
    from tools.shards.walk import walk

    stored = {
        sample: image
        for chunk in walk(stream.index, stream.config, look=lambda chunk: chunk, threads=1, samples=np.unique(samples))
        for sample, image in zip(chunk.samples.tolist(), chunk.images, strict=True)
    }
    tiles = []
    for image, sample, label, position in zip(given, samples.tolist(), labels, positions, strict=True):
        title = stream.classes[label] if label >= 0 else "no label"
        height, width = stored[sample].shape[:2]
        pair = beside(fit(stored[sample], CELL), fit(image, CELL), gap=BETWEEN)
        tiles.append(Tile(pair, (title, f"image {position:,}: sample {sample:,}, {height} x {width}")))
    return tiles


if __name__ == "__main__":
    from trainer.errors import boundary

    sys.exit(boundary(main, sys.argv[1:]))

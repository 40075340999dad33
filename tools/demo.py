"""python -m tools.demo: the whole way on real data. Shards, a VAE-GAN on two processes, pictures.

Each part that is there already is left as it is, so the command goes on where it was interrupted.
"""

import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from launch.local import launch
from tools.shards.make import main as make
from trainer.config import load
from trainer.errors import boundary
from trainer.pictures import write_png

DATA = Path("data/fashion-mnist")
GAP = 16  # pixels of white between two sheets
CONFIG = Path("configs/vaegan_fashion.yaml")


def main(argv: list[str]) -> int:
    """argv: overrides of the demo's config, such as images=20_000."""
    started = time.monotonic()
    if not (DATA / "train" / "index.json").exists() or not (DATA / "test" / "index.json").exists():
        code = make(["fashion-mnist", str(DATA)])
        if code:
            return code
    print(f"training {CONFIG} on two processes; watch it with: tensorboard --logdir runs", flush=True)
    code = launch("trainer.__main__", [str(CONFIG), *argv], processes=2)
    if code == 0:
        path = beside(["samples", "reconstructions"], folder=load(CONFIG, argv).run / "pictures")
        print(f"demo done in {time.monotonic() - started:.0f} s; look at {path}")
    return code


def beside(names: list[str], *, folder: Path) -> Path:
    """The pictures of these names, side by side, as folder/demo.png."""
    sheets = []
    for name in names:
        with Image.open(folder / f"{name}.png") as picture:
            pixels = np.asarray(picture)
        sheets.append(pixels if pixels.ndim == 3 else pixels[:, :, None])
        sheets.append(np.full((len(pixels), GAP, sheets[-1].shape[2]), 255, np.uint8))
    return write_png(folder / "demo.png", np.concatenate(sheets[:-1], axis=1), overwrite=True)


if __name__ == "__main__":
    sys.exit(boundary(main, sys.argv[1:]))

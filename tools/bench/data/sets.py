"""What the read benchmark reads: images made here, so that it needs no data, of the weight of real ones."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from numpy.lib import format as npy_format
from numpy.typing import NDArray
from PIL import Image

from trainer.data import tar

SHARDS = 8
CLASSES = 10


@dataclass(frozen=True)
class Kind:
    """A kind of image."""

    field: str
    side: int
    channels: int
    samples: int
    """That are made unless --samples says otherwise."""


KINDS = {
    "jpeg": Kind("jpg", 256, 3, 2000),  # 13 kB, as photographs of this size at quality 90
    "png": Kind("png", 28, 1, 8000),  # 0.5 kB, as Fashion-MNIST
    "npy": Kind("npy", 28, 1, 8000),
}


@dataclass(frozen=True)
class Made:
    """The same images in every form that is compared."""

    kind: Kind
    files: list[bytes]
    shards: Path
    """FOLDER/train/*.tar, with a class each: Tandem's, webdataset's."""
    folder: Path
    """The files, one an image."""


def make(kind: Kind, samples: int, root: Path) -> Made:
    files = list(files_of(kind, samples))
    (root / "train").mkdir(parents=True)
    for number in range(SHARDS):
        with (root / "train" / f"{number:03d}.tar").open("wb") as shard:
            for sample in range(number, samples, SHARDS):
                shard.write(tar.member(f"{sample:06d}.{kind.field}", files[sample]))
                shard.write(tar.member(f"{sample:06d}.cls", str(sample % CLASSES).encode()))
            shard.write(tar.end(shard.tell()))
    (root / "files").mkdir()
    for number, data in enumerate(files):
        (root / "files" / f"{number:06d}.{kind.field}").write_bytes(data)
    return Made(kind, files, root, root / "files")


def files_of(kind: Kind, samples: int) -> Iterator[bytes]:
    """As many image files of a kind, always the same."""
    rng = np.random.default_rng(0)
    for _ in range(samples):
        if kind.field == "jpg":
            yield simplejpeg.encode_jpeg(_photo(rng, kind.side), quality=90, colorspace="RGB", colorsubsampling="420")
            continue
        image = _garment(rng, kind.side)
        file = io.BytesIO()
        if kind.field == "png":
            Image.fromarray(image).save(file, "PNG")
        else:
            npy_format.write_array(file, image, version=(1, 0), allow_pickle=False)
        yield file.getvalue()


def _photo(rng: np.random.Generator, side: int) -> NDArray[np.uint8]:
    """Smooth fields of all sizes, the finer the fainter, as in photographs."""
    image = np.full((side, side, 3), 128, np.float32)
    for cells in (4, 8, 16, 32, 64, 128):
        field = rng.normal(size=(cells, cells, 3)).astype(np.float32)
        image += cv2.resize(field, (side, side), interpolation=cv2.INTER_CUBIC) * (60 / cells**0.6)
    return np.ascontiguousarray(np.clip(image, 0, 255).astype(np.uint8))


def _garment(rng: np.random.Generator, side: int) -> NDArray[np.uint8]:
    """A grey body with folds between two black borders."""
    folds = rng.normal(size=(7, 7)).astype(np.float32)
    image = cv2.resize(folds, (side, side), interpolation=cv2.INTER_CUBIC) * 90 + 60
    image += rng.normal(size=(side, side)) * 8
    image[:, : side // 5] = image[:, -side // 5 :] = 0
    return np.clip(image, 0, 255).astype(np.uint8)

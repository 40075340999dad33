"""Small sets of shards, written as other makers write them: plain tar files without an index."""

import io
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.lib import format as npy_format


def numbered(number: int, shape: tuple[int, int, int]) -> np.ndarray:
    """uint8 image whose first two bytes spell its number."""
    image = np.full(shape, number % 251, np.uint8)
    image.reshape(-1)[:2] = divmod(number, 256)
    return image


def npy(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    npy_format.write_array(file, image, version=(1, 0), allow_pickle=False)
    return file.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="session")
def tar_of() -> Callable[[Path, Sequence[tuple[str, bytes]]], Path]:
    return write_tar


@pytest.fixture(scope="session")
def write_set() -> Callable[..., Path]:
    """write_set(folder, sizes, shape=..., bad={number: bytes}): FOLDER/train/*.tar with sizes[i] samples each, numbered
    through; sample n is of class n % 3. A number in `bad` gets those bytes for an image."""

    def write(
        folder: Path,
        sizes: Sequence[int],
        *,
        shape: tuple[int, int, int] = (2, 3, 1),
        split: str = "train",
        bad: Mapping[int, bytes] | None = None,
    ) -> Path:
        number = 0
        for shard, size in enumerate(sizes):
            members = []
            for _ in range(size):
                data = (bad or {}).get(number, npy(numbered(number, shape)))
                members += [(f"{number:06d}.npy", data), (f"{number:06d}.cls", str(number % 3).encode())]
                number += 1
            write_tar(folder / split / f"{shard:04d}.tar", members)
        return folder

    return write


@pytest.fixture(scope="session")
def number_of() -> Callable[[object], list[int]]:
    """The numbers that a uint8 (B, H, W, C) tensor of images spells."""

    def read(images: object) -> list[int]:
        flat = np.asarray(images).reshape(len(images), -1)  # type: ignore[arg-type]
        return [int(row[0]) * 256 + int(row[1]) for row in flat]

    return read

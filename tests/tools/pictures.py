"""Pictures with the statistics of photographs, and small sets of shards as any other maker writes them."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]


def leaves(generator: np.random.Generator, size: int, count: int) -> list[Pixels]:
    """Discs that hide each other, of sizes as in nature (Lee, Mumford and Huang 2001, Occlusion models for natural
    images), with texture and a little noise; `count` of uint8 (size, size, 3)."""
    frequency = np.fft.fftfreq(size)
    distance = np.hypot(frequency[:, None], frequency)
    distance[0, 0] = 1
    found = []
    for _ in range(count):
        image = np.zeros((size, size, 3), np.uint8)
        for _ in range(200):
            radius = max(2, int(min(size / 2, 3 * size / 64 / generator.uniform(0.02, 1))))
            centre = tuple(int(part) for part in generator.integers(0, size, 2))
            colour = tuple(int(part) for part in generator.integers(20, 236, 3))
            cv2.circle(image, centre, radius, colour, -1, cv2.LINE_AA)
        phase = np.exp(2j * np.pi * generator.random((size, size)))
        texture = np.fft.ifft2(phase / distance**1.2).real
        texture *= 8 / texture.std()
        noise = generator.normal(0, 1.5, image.shape)
        found.append(np.clip(image + texture[..., None] + noise, 0, 255).astype(np.uint8))
    return found


def encoded(image: Pixels, form: str, *, quality: int = 95) -> bytes:
    """form: PNG (lossless), JPEG."""
    file = io.BytesIO()
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    picture.save(file, form, **({"quality": quality} if form == "JPEG" else {}))
    return file.getvalue()


def jpeg(image: Pixels, quality: int) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(encoded(image, "JPEG", quality=quality))))


def enlarged(image: Pixels, factor: int, way: Image.Resampling) -> Pixels:
    return np.asarray(Image.fromarray(image).resize((image.shape[1] * factor, image.shape[0] * factor), way))


def write_set(
    folder: Path,
    images: Sequence[Pixels | bytes],
    *,
    labels: Sequence[int | None] | None = None,
    split: str = "train",
    shard: int = 1_000,
) -> Path:
    """FOLDER/SPLIT/*.tar with `shard` samples each: image n is PNG with the key n; bytes are written as they are.
    Without an index."""
    (folder / split).mkdir(parents=True)
    for start in range(0, len(images), shard):
        with tarfile.open(folder / split / f"{split}-{start // shard:05d}.tar", "w") as file:
            for number, image in enumerate(images[start : start + shard], start):
                data = image if isinstance(image, bytes) else encoded(image, "PNG")
                _add(file, f"{number:05d}.png", data)
                label = None if labels is None else labels[number]
                if label is not None:
                    _add(file, f"{number:05d}.cls", str(label).encode())
    return folder


def _add(file: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    file.addfile(info, io.BytesIO(data))


def holds(sheet: Pixels, picture: Pixels) -> bool:
    """Whether a picture stands in a sheet (H, W, 3), pixel by pixel."""
    wanted = picture if picture.shape[2] == 3 else picture.repeat(3, axis=2)
    found = cv2.matchTemplate(sheet, np.ascontiguousarray(wanted), cv2.TM_SQDIFF)
    for y, x in np.argwhere(found < found.min() + 1):
        if np.array_equal(sheet[y : y + wanted.shape[0], x : x + wanted.shape[1]], wanted):
            return True
    return False

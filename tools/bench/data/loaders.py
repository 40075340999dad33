"""What is compared: ways from the same images to batches uint8 (b, H, W, C), each as its own documentation has it."""

import io
import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
import webdataset
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from tools.bench.data.sets import Kind, Made
from tools.bench.turns import Turn, in_process
from trainer.data import ShardsConfig, Stream
from trainer.data import index as indices
from trainer.data.images import images_of
from trainer.data.mixture import order_of
from trainer.data.reader import Reader
from trainer.data.source import Training

IDLE = 0.01  # seconds in which a process that uses less than a tenth of it has nothing to do


def bare(made: Made, batch: int) -> Turn:
    """The fastest decoder for bytes that are in memory already, one new array an image, no batch."""
    files = itertools.cycle(made.files)
    decode = bare_decoder(made.kind)

    def steps(count: int) -> None:
        for data in itertools.islice(files, count * batch):
            decode(data)

    return in_process(steps)


def bare_decoder(kind: Kind) -> Callable[[bytes], Any]:
    if kind.field == "jpg":
        return lambda data: simplejpeg.decode_jpeg(data, "RGB")
    if kind.field == "png":
        return lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
    size = kind.side * kind.side
    return lambda data: np.frombuffer(data, np.uint8, offset=len(data) - size).reshape(kind.side, kind.side).copy()


def config_of(made: Made, *, readers: int = 1, cache_mb: int = 0) -> ShardsConfig:
    channels: Any = made.kind.channels
    return ShardsConfig(path=made.shards, size=made.kind.side, channels=channels, readers=readers, cache_mb=cache_mb)


def stream_of(made: Made, batch: int, *, readers: int = 1) -> Stream:
    return Stream(config_of(made, readers=readers), split="train", batch=batch, rank=0, world=1, seed=0)


def alone(made: Made, batch: int, *, cache_mb: int = 0) -> Turn:
    """Tandem without threads: from the shards, or from memory."""
    config = config_of(made, cache_mb=cache_mb)
    index = indices.load(config, "train")
    reader = Reader(index, config, images_of(index, config))
    requests = Training(order_of(index, config, seed=0, batch=batch), 0, batch, 0, 1)()

    def steps(count: int) -> None:
        for request in itertools.islice(requests, count):
            reader.read(request)

    return in_process(steps)


def ahead(stream: Stream) -> Turn:
    """Tandem as it trains: by threads. A turn ends when they have read as far ahead as they may, so it pays for what it
    took and nothing else."""
    batches = stream.batches(0)
    next(batches)
    _until_idle()

    def steps(count: int) -> None:
        for _ in itertools.islice(batches, count):
            pass
        _until_idle()

    return in_process(steps)


def _until_idle() -> None:
    before = -1.0
    while time.process_time() - before > IDLE / 10:
        before = time.process_time()
        time.sleep(IDLE)


def own_webdataset(made: Made, batch: int) -> Turn:
    """webdataset's own pipeline and decoders: shards shuffled, a buffer of 1,000 samples, no workers."""
    kind = made.kind
    urls = [str(path) for path in sorted((made.shards / "train").glob("*.tar"))]
    stages = webdataset.WebDataset(urls, shardshuffle=len(urls), empty_check=False).shuffle(1000)
    stages = stages.decode("rgb8" if kind.channels == 3 else "l8").to_tuple(kind.field, "cls").batched(batch)
    return from_loader(webdataset.WebLoader(stages.repeat(), batch_size=None, num_workers=0))


def folder(made: Made, batch: int) -> Turn:
    """A folder of files, Pillow and a DataLoader without workers; numpy.load for .npy."""
    return from_loader(DataLoader(Files(made.folder, made.kind), batch_size=batch, shuffle=True, drop_last=True))


class Files(Dataset[Any]):
    def __init__(self, path: Path, kind: Kind) -> None:
        self.paths, self.kind = sorted(path.iterdir()), kind

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        path = self.paths[number]
        image = np.load(path) if self.kind.field == "npy" else pillow(path.read_bytes(), self.kind)
        return torch.from_numpy(image), number % 10


def pillow(data: bytes, kind: Kind) -> NDArray[np.uint8]:
    """As most examples decode."""
    return np.array(Image.open(io.BytesIO(data)).convert("RGB" if kind.channels == 3 else "L"))


def from_loader(loader: Any) -> Turn:
    """Epoch after epoch."""

    def forever() -> Iterator[Any]:
        while True:
            yield from loader

    batches = forever()

    def steps(count: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other libraries about each other
            for _ in itertools.islice(batches, count):
                pass

    return in_process(steps)

"""From rows of the shards to the images that networks see: copied as bytes, one batch ahead; cut, scaled, mirrored and
converted on the device."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.data.batch import Batch, RawBatch
from trainer.data.config import DataConfig, Fit
from trainer.data.convert import covering
from trainer.data.pixels import to_float, to_uint8
from trainer.data.reader import Interrupted
from trainer.errors import one_line
from trainer.kernels import noise


@dataclass(frozen=True)
class Transform:
    """What is done to the images of a batch. Draws depend on (seed, position): the same on any rank and device."""

    height: int
    width: int
    fit: Fit
    flip: bool
    seed: int

    @staticmethod
    def training(config: DataConfig, *, seed: int) -> "Transform":
        height, width, _ = config.shape
        return Transform(height=height, width=width, fit=config.fit, flip=config.flip, seed=seed)

    @staticmethod
    def plain(config: DataConfig) -> "Transform":
        """Without chance: never mirrored, the centre in place of a random cut. For evaluation and pictures."""
        height, width, _ = config.shape
        fit: Fit = "center" if config.fit == "random" else config.fit
        return Transform(height=height, width=width, fit=fit, flip=False, seed=0)

    def __call__(self, data: Tensor, position: Tensor) -> Tensor:
        """uint8 (B, H, W, C), int64 (B) -> float32 (B, C, height, width) in [-1, 1], channels_last memory.

        Scaled images are rounded to the 256 levels again, so that likelihoods of 8-bit images hold for them too."""
        image = data
        if self.fit in ("center", "random"):
            image = self._cut(image, position)
        if self.flip:  # bytes are mirrored sooner than floats
            mirrored = noise.uniform(self.seed, "flip", position, ()) < 0.5
            image = torch.where(mirrored.view(-1, 1, 1, 1), image.flip(2), image)
        if self.fit == "resize" and image.shape[1:3] != (self.height, self.width):
            return to_float(to_uint8(cover(to_float(image), (self.height, self.width))))
        return to_float(image)

    def _cut(self, image: Tensor, position: Tensor) -> Tensor:
        """The window of `height` x `width`, at the centre or where (seed, position) says."""
        room = torch.tensor([image.shape[1] - self.height, image.shape[2] - self.width], device=image.device)
        if self.fit == "center":
            top, left = (room // 2).tolist()
            return image[:, top : top + self.height, left : left + self.width].contiguous()
        drawn = noise.uniform(self.seed, "crop", position, (2,))
        corner = torch.minimum((drawn * (room + 1)).long(), room)  # a float32 product may round up to room + 1
        rows = corner[:, 0, None] + torch.arange(self.height, device=image.device)
        columns = corner[:, 1, None] + torch.arange(self.width, device=image.device)
        first = torch.arange(len(image), device=image.device)[:, None, None]
        return image[first, rows[:, :, None], columns[:, None, :]]


def cover(image: Tensor, size: tuple[int, int]) -> Tensor:
    """float (B, C, H, W) scaled (bicubic, a = -0.5, antialiased) until `size` (height, width) is just covered, and the
    centre cut out. The rule of `tandem data make --size`, whose filter is Lanczos."""
    (rows, columns), scaled, centre = covering((image.shape[2], image.shape[3]), size)
    image = image[:, :, rows, columns]
    if scaled != image.shape[2:]:
        image = F.interpolate(image, size=scaled, mode="bicubic", antialias=True)
    return image[:, :, centre[0], centre[1]]


def to_device(raw: RawBatch, *, device: torch.device | str, transform: Transform) -> Batch:
    """A rank's share of a batch on the device."""
    return _transformed(_copied(raw, device), transform)


class Feed:
    """The batches of a run on the device, one ahead: while one is used, the next is read and on its way.

    `fetch` never raises what reading may raise: the error waits in `fault` until all ranks can hear of it. A rank that
    left alone would leave the others in a collective."""

    def __init__(self, batches: Iterator[RawBatch], *, device: torch.device, transform: Transform) -> None:
        self.fault: str | None = None
        """Why the next batch cannot be had, on one line."""
        self._batches, self._device, self._transform = batches, device, transform
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._next: RawBatch | None = None
        self._event: torch.cuda.Event | None = None

    def fetch(self) -> None:
        """Waits for the next batch of the stream, if there is one, and starts its copy. Without batch and fault it
        comes back where the run is to end."""
        assert self._next is None
        try:
            raw = next(self._batches, None)
        except Interrupted:
            return
        except (ValueError, OSError) as error:
            self.fault = one_line(error)
            return
        if raw is None or self._side is None:
            self._next = raw
            return
        with torch.cuda.stream(self._side):
            self._next = _copied(raw, self._device)
            self._event = self._side.record_event()

    def take(self) -> Batch:
        """The batch that `fetch` brought; there must be one."""
        raw, self._next = self._next, None
        assert raw is not None
        if self._event is not None:
            ours = torch.cuda.current_stream(self._device)
            ours.wait_event(self._event)
            for tensor in raw.columns:
                tensor.record_stream(ours)  # allocated on the side stream, used and freed on ours
        return _transformed(raw, self._transform)

    def __iter__(self) -> Iterator[Batch]:
        """All that follow, to the end of the stream or to a fault."""
        self.fetch()
        while self._next is not None:
            given = self.take()
            self.fetch()
            yield given


def _copied(raw: RawBatch, device: torch.device | str) -> RawBatch:
    return RawBatch(*(tensor.to(device, non_blocking=True) for tensor in raw.columns))


def _transformed(raw: RawBatch, transform: Transform) -> Batch:
    return Batch(transform(raw.data, raw.position), raw.label, raw.position, raw.index, raw.weight)

"""A rank's share of a batch: as bytes from the shards, and as floats on the device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.data.pixels import to_float
from trainer.kernels import noise


@dataclass
class RawBatch:
    """What the stream gives: b samples on the CPU."""

    data: Tensor
    """A row a sample; of images uint8 (b, H, W, C)."""
    label: Tensor
    """int64 (b): class number, -1 where there is none."""
    position: Tensor
    """int64 (b): global image position, unique over epochs; what noise and augmentation are addressed by."""
    index: Tensor
    """int64 (b): number of the sample in the split, in the order of its shards."""
    weight: Tensor
    """float32 (b): 0 for padding of the last batch of an evaluation (and for a bad sample there), else 1."""


@dataclass
class Batch:
    """What a method gets: b samples on the device."""

    image: Tensor
    """float32 (b, C, H, W) in [-1, 1], channels_last memory."""
    label: Tensor
    position: Tensor
    index: Tensor
    weight: Tensor


def to_device(raw: RawBatch, *, device: torch.device | str, flip: bool, seed: int) -> Batch:
    """Copies bytes and converts there. flip: each image is mirrored left to right where uniform(seed, "flip", position)
    is below 1/2, so the same image at the same position on any rank."""
    image, label, position, index, weight = (
        tensor.to(device, non_blocking=True) for tensor in (raw.data, raw.label, raw.position, raw.index, raw.weight)
    )
    if flip:
        mirrored = noise.uniform(seed, "flip", position, ()) < 0.5
        image = torch.where(mirrored.view(-1, 1, 1, 1), image.flip(2), image)
    return Batch(to_float(image), label, position, index, weight)

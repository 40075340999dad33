"""A rank's share of a batch: as bytes from the shards, and as floats on the device."""

from dataclasses import dataclass

from torch import Tensor


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

    @property
    def columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.data, self.label, self.position, self.index, self.weight


@dataclass
class Batch:
    """What a method gets: b samples on the device."""

    image: Tensor
    """float32 (b, C, H, W) in [-1, 1], channels_last memory."""
    label: Tensor
    position: Tensor
    index: Tensor
    weight: Tensor

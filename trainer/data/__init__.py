"""Shards to batches: index, order, safe decoders, readers, the transform on the device. See README.md."""

from trainer.data.batch import Batch, RawBatch, to_device
from trainer.data.config import DataConfig, MixtureConfig, ShardsConfig
from trainer.data.pixels import to_float, to_uint8
from trainer.data.stream import Stream

__all__ = [
    "Batch",
    "DataConfig",
    "MixtureConfig",
    "RawBatch",
    "ShardsConfig",
    "Stream",
    "to_device",
    "to_float",
    "to_uint8",
]

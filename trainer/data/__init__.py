"""Shards to batches: index, order, safe decoders, readers, the transform on the device. See README.md."""

from trainer.data.batch import Batch, RawBatch
from trainer.data.config import DataConfig, MixtureConfig, ShardsConfig
from trainer.data.device import Feed, Transform, to_device
from trainer.data.pixels import to_float, to_uint8
from trainer.data.reader import Interrupted
from trainer.data.samples import Samples
from trainer.data.stream import Stream

__all__ = [
    "Batch",
    "DataConfig",
    "Feed",
    "Interrupted",
    "MixtureConfig",
    "RawBatch",
    "Samples",
    "ShardsConfig",
    "Stream",
    "Transform",
    "to_device",
    "to_float",
    "to_uint8",
]

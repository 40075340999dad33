"""What a model is worth, measured: streaming, in float64, over any split and number of ranks (README.md)."""

from trainer.metrics.distortion import psnr

__all__ = ["psnr"]

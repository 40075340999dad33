"""Triton where it is installed, and what kernels share. Without it the kernels below are plain functions never called.

Rules that every kernel keeps: values become float32 as they are loaded (the interpreter's bfloat16 arithmetic is
garbage) and the outputs' dtype as they are stored; the offset of a sample is 64 bits; the grid is (samples, tiles) and
no loop has a bound known only at run time (which triton 3.6 does not interpret under numpy 2.4); sums are partial sums
that are added in a fixed order afterwards, never atomics, so every run has the same bits; sizes of tiles are constants,
not tuned at run time, for ranks that tuned otherwise would round otherwise.
"""

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    LACKING: str | None = None
    """Why no kernel can run in this process, or None."""
except ImportError:  # torch's CPU builds come without it
    LACKING = "triton is not installed"

    class _Absent:
        """What annotations and decorators of kernels name."""

        constexpr = None

        @staticmethod
        def jit(function: Any) -> Any:
            return function

    triton = tl = _Absent()

INTERPRETED = LACKING is None and bool(triton.knobs.runtime.interpret)
"""Kernels run on CPU tensors, slowly, for tests."""


def dense(x: Tensor) -> Tensor:
    """x (B, C, H, W) itself where it lies channels last or contiguous in memory, else a contiguous copy: H and W are
    then one dimension with one stride. Gradients often come expanded, with strides of 0."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def channels_last(x: Tensor) -> bool:
    """Whether the `dense` x (B, C, H, W) lies channels last."""
    return not x.is_contiguous()


def strides(x: Tensor) -> tuple[int, int, int]:
    """Elements from one sample, channel and pixel of a `dense` (B, C, H, W) to the next; not x.stride(), where a
    dimension of size 1 may have any."""
    channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
    return channels * pixels, *((1, channels) if channels_last(x) else (pixels, 1))


def like(x: Tensor, other: Tensor) -> Tensor:
    """x in the memory format of the `dense` tensor `other` of its shape: itself, or a copy."""
    return x.contiguous(memory_format=torch.channels_last if channels_last(other) else torch.contiguous_format)

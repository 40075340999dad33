"""What tests of kernels share: where they run, layouts, and how far from float64 an implementation may be."""

from collections.abc import Iterator

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ("eager", "triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# a value rounded to nearest is half a unit in the last place off: 2^-8 in bfloat16, 2^-11 in float16. The interpreter
# cuts bfloat16 off instead, which is a whole unit
HALF = 2**-8 if DEVICE == "cuda" else 2**-7
VALUE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: HALF}
GRADIENT = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: HALF}
TWICE = 1e-5  # of a second derivative in float32


def error(found: Tensor, true: Tensor) -> float:
    """Largest difference over the largest true value (float64)."""
    assert found.shape == true.shape, f"{tuple(found.shape)} and {tuple(true.shape)}"
    assert true.dtype == torch.float64
    return float((found.detach().double().to(true.device) - true).abs().max() / true.abs().max().clamp(min=1e-300))


def layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The values of x (B, C, H, W) in each way that they may lie in memory; leaves that require a gradient."""
    wider = x.new_zeros((x.shape[0], x.shape[1] + 2, x.shape[2], x.shape[3] + 3))
    sliced = wider[:, 1:-1, :, 2:-1]
    sliced.copy_(x)
    found = {
        "contiguous": x.contiguous(),
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "sliced": sliced,
        "turned": x.transpose(2, 3).contiguous().transpose(2, 3),
    }
    for name, tensor in found.items():
        yield name, tensor.detach().requires_grad_()

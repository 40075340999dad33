"""Addressable noise: row i is a pure function of (seed, stream, positions[i]).

No generator has a state, so the noise of a sample is the same on any rank, in any micro-batch and after any resume, and
a checkpoint holds none of it. The hash is SplitMix64 (Steele, Lea and Flood 2014, fig. 16) of a counter; normals are
Box and Muller's (1958). This is the plain reference: integer arithmetic that wraps, on any device.
"""

import hashlib
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def _signed(value: int) -> int:
    """The int64 with the bits of the uint64 `value`: torch multiplies int64 and wraps."""
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX1 = _signed(0xBF58476D1CE4E5B9)
_MIX2 = _signed(0x94D049BB133111EB)
_ROW = _signed(0xD1B54A32D192ED03)
_TWO_PI = 6.283185307179586


def _mix(x: Tensor) -> Tensor:
    # int64 shifts are arithmetic in torch: the mask makes them logical
    x = ((x >> 30) & 0x3FFFFFFFF).bitwise_xor_(x).mul_(_MIX1)
    x = ((x >> 27) & 0x1FFFFFFFFF).bitwise_xor_(x).mul_(_MIX2)
    return ((x >> 31) & 0x1FFFFFFFF).bitwise_xor_(x)


@lru_cache(maxsize=256)
def _key(seed: int, stream: str) -> int:
    digest = hashlib.sha256(f"{seed}\0{stream}".encode()).digest()
    return _signed(int.from_bytes(digest[:8], "little"))


def _bits(seed: int, stream: str, positions: Tensor, count: int) -> Tensor:
    """64 random bits a value: int64 (B, count)."""
    assert positions.dtype == torch.int64 and positions.dim() == 1
    make = _bits_by_numpy if positions.device.type == "cpu" else _bits_by_torch
    return make(_key(seed, stream), positions, count)


def _bits_by_torch(key: int, positions: Tensor, count: int) -> Tensor:
    row = _mix(positions * _ROW + key)
    return _mix(row.unsqueeze(1) + torch.arange(1, count + 1, device=positions.device) * _GOLDEN)


def _bits_by_numpy(key: int, positions: Tensor, count: int) -> Tensor:
    """The same integers on the CPU, where numpy's calls cost a third of torch's: a small network's step feels it."""
    row = _mix_numpy(positions.numpy().view(np.uint64) * _unsigned(_ROW) + _unsigned(key))
    column = np.arange(1, count + 1, dtype=np.uint64) * _unsigned(_GOLDEN)
    return torch.from_numpy(_mix_numpy(row[:, None] + column).view(np.int64))


def _mix_numpy(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * _unsigned(_MIX1)
    x = (x ^ (x >> np.uint64(27))) * _unsigned(_MIX2)
    return x ^ (x >> np.uint64(31))


def _unsigned(value: int) -> np.uint64:
    return np.uint64(value & 0xFFFFFFFFFFFFFFFF)


def uniform(seed: int, stream: str, positions: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Uniform float32 in [0, 1), multiples of 2^-24: (B, *shape), on the device of `positions` (int64, (B,))."""
    count = numel(shape)
    bits = (_bits(seed, stream, positions, count) >> 40) & 0xFFFFFF
    return bits.to(torch.float32).mul_(2.0**-24).view(len(positions), *shape)


def normal(seed: int, stream: str, positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 (B, *shape), |x| <= 6.67, on the device of `positions` (int64, (B,))."""
    count = numel(shape)
    bits = _bits(seed, stream, positions, (count + 1) // 2)
    # 32 bits for the radius, in (0, 1] so that the logarithm is finite; 32 for the angle
    radius = ((bits >> 32) & 0xFFFFFFFF).to(torch.float32).add_(1.0).mul_(2.0**-32)
    angle = bits.bitwise_and_(0xFFFFFFFF).to(torch.float32).mul_(_TWO_PI * 2.0**-32)
    radius = radius.log_().mul_(-2.0).clamp_(min=0.0).sqrt_()
    pair = torch.stack((angle.cos().mul_(radius), angle.sin_().mul_(radius)), dim=2).view(len(positions), -1)
    return pair[:, :count].reshape(len(positions), *shape)


def numel(shape: tuple[int, ...]) -> int:
    """Values in a row."""
    count = 1
    for size in shape:
        count *= size
    return count

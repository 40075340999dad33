"""Addressable noise: row i is a pure function of (seed, stream, positions[i]).

No generator has a state, so the noise of a sample is the same on any rank, in any micro-batch and after any resume, and
a checkpoint holds none of it. The hash is Philox4x32-10 (Salmon et al. 2011) with the seed as its key and

    counter = (element // 4, position mod 2^32, position div 2^32, stream)

so value `element` of a row is word `element mod 4`; a position counts samples over the whole run, so it stands for step
and sample at once. Normals are Box and Muller's (1958). numpy on a CPU, torch elsewhere and a kernel on GPUs give the
same integers; normals agree to the last bits of log, sin and cos.
"""

import hashlib
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.kernels.choose import Impl, choose
from trainer.kernels.program import tl, triton

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_TWO_PI = 6.283185307179586
_BLOCK = 1024  # values of a program


@lru_cache(maxsize=256)
def stream_number(stream: str) -> int:
    """The 32 bits that stand for a stream's name."""
    return int.from_bytes(hashlib.sha256(stream.encode()).digest()[:4], "little")


def address(seed: int, stream: str, positions: Tensor) -> Tensor:
    """Where the noise of samples lies, as one tensor for those who draw it themselves: int64 (B, 3) of seed, stream's
    number and position, on the device of `positions` (int64, (B,))."""
    where = positions.new_empty((len(positions), 3))
    where[:, 0], where[:, 1], where[:, 2] = seed, stream_number(stream), positions
    return where


def uniform(
    seed: int, stream: str, positions: Tensor, shape: tuple[int, ...] = (), *, impl: Impl | None = None
) -> Tensor:
    """Uniform float32 in [0, 1), multiples of 2^-24: (B, *shape), on the device of `positions` (int64, (B,))."""
    return uniform_at(address(seed, stream, positions), shape, impl=impl)


def normal(seed: int, stream: str, positions: Tensor, shape: tuple[int, ...], *, impl: Impl | None = None) -> Tensor:
    """Standard normal float32 (B, *shape), |x| <= 6.67, on the device of `positions` (int64, (B,))."""
    return normal_at(address(seed, stream, positions), shape, impl=impl)


def uniform_at(address: Tensor, shape: tuple[int, ...], *, impl: Impl | None = None) -> Tensor:
    """`uniform` at an `address` (B, 3)."""
    if _picked(address, impl) == "triton":
        return _filled(address, numel(shape), normal=False).view(len(address), *shape)
    bits = words(address, numel(shape)) >> 8
    return bits.to(torch.float32).mul_(2.0**-24).view(len(address), *shape)


def normal_at(address: Tensor, shape: tuple[int, ...], *, impl: Impl | None = None) -> Tensor:
    """`normal` at an `address` (B, 3)."""
    count = numel(shape)
    if _picked(address, impl) == "triton":
        return _filled(address, count, normal=True).view(len(address), *shape)
    pairs = words(address, count + count % 2).view(len(address), -1, 2)
    # 32 bits for the radius, in (0, 1] so that the logarithm is finite; 32 for the angle
    radius = pairs[..., 0].to(torch.float32).add_(1.0).mul_(2.0**-32)
    angle = pairs[..., 1].to(torch.float32).mul_(_TWO_PI * 2.0**-32)
    radius = radius.log_().mul_(-2.0).clamp_(min=0.0).sqrt_()
    pair = torch.stack((angle.cos().mul_(radius), angle.sin_().mul_(radius)), dim=2).view(len(address), -1)
    return pair[:, :count].reshape(len(address), *shape)


def numel(shape: tuple[int, ...]) -> int:
    """Values in a row."""
    count = 1
    for size in shape:
        count *= size
    return count


def words(address: Tensor, count: int) -> Tensor:
    """The first `count` words of each row, int64 (B, count) in 0 .. 2^32 - 1."""
    assert address.dtype == torch.int64 and address.dim() == 2 and address.shape[1] == 3
    quads = (count + 3) // 4
    if address.device.type == "cpu":
        found = torch.from_numpy(_words_by_numpy(address.numpy(), quads).astype(np.int64))
    else:
        found = _words_by_torch(address, quads)
    return found.view(len(address), 4 * quads)[:, :count].contiguous()


def _words_by_torch(address: Tensor, quads: int) -> Tensor:
    """int64 (B, quads, 4). Products wrap, and shifts are arithmetic: masks take the bits that are meant."""
    seed, stream, position = (column.unsqueeze(1) for column in address.unbind(1))
    zero = position.new_zeros((len(address), quads))
    c0, c1 = zero + torch.arange(quads, device=address.device), zero + (position & _MASK)
    c2, c3 = zero + ((position >> 32) & _MASK), zero + stream
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK
        c2, c3 = ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=2)


def _words_by_numpy(address: NDArray[np.int64], quads: int) -> NDArray[np.uint32]:
    """uint32 (B, quads, 4), with numpy, whose calls cost a third of torch's: a small network's step feels it."""
    seed, stream, position = (column[:, None] for column in np.ascontiguousarray(address.view(np.uint64).T))
    shape = (len(address), quads)
    low, high = (np.broadcast_to(part.astype(np.uint32), shape) for part in (position, position >> np.uint64(32)))
    c0 = np.broadcast_to(np.arange(quads, dtype=np.uint32), shape)
    c1, c2, c3 = low, high, np.broadcast_to(stream.astype(np.uint32), shape)
    k0, k1 = seed.astype(np.uint32), (seed >> np.uint64(32)).astype(np.uint32)
    for _ in range(_ROUNDS):
        p0, p1 = (c * np.uint64(m) for c, m in zip((c0, c2), _MULTIPLIERS, strict=True))
        c0, c1 = (p1 >> np.uint64(32)).astype(np.uint32) ^ c1 ^ k0, p1.astype(np.uint32)
        c2, c3 = (p0 >> np.uint64(32)).astype(np.uint32) ^ c3 ^ k1, p0.astype(np.uint32)
        k0, k1 = k0 + np.uint32(_WEYL[0]), k1 + np.uint32(_WEYL[1])
    return np.stack((c0, c1, c2, c3), axis=2)


# ---------------------------------------------------------------------------------------------------------- kernels
@triton.jit
def philox(address, sample, quad):
    """The four words (uint32) of each quad of elements of a row. address: pointer to (B, 3); quad: int32."""
    seed, stream = tl.load(address + sample * 3), tl.load(address + sample * 3 + 1)
    position = tl.load(address + sample * 3 + 2)
    c0 = quad.to(tl.uint32)
    zero = c0 * 0
    return tl.philox(
        seed, c0, zero + position.to(tl.uint32), zero + (position >> 32).to(tl.uint32), zero + stream.to(tl.uint32)
    )


@triton.jit
def normals(radius_word, angle_word):
    """Two standard normals from two words, as `normal_at` makes them."""
    u = (radius_word.to(tl.float32) + 1.0) * 2.3283064365386963e-10
    radius = tl.sqrt(tl.maximum(-2.0 * tl.log(u), 0.0))
    angle = angle_word.to(tl.float32) * 1.4629180792671596e-09
    return tl.cos(angle) * radius, tl.sin(angle) * radius


@triton.jit
def four_in_turn(a, b, c, d):
    """a[0] b[0] c[0] d[0] a[1] b[1] ..."""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def _fill(address, out, N, NORMAL: tl.constexpr, BLOCK: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    quad = tl.program_id(1) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    a, b, c, d = philox(address, sample, quad)
    if NORMAL:
        w, x = normals(a, b)
        y, z = normals(c, d)
    else:
        w, x = (a >> 8).to(tl.float32) * 5.960464477539063e-08, (b >> 8).to(tl.float32) * 5.960464477539063e-08
        y, z = (c >> 8).to(tl.float32) * 5.960464477539063e-08, (d >> 8).to(tl.float32) * 5.960464477539063e-08
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + sample * N + element, four_in_turn(w, x, y, z), mask=element < N)


@torch.library.custom_op("tandem::addressed_noise", mutates_args=())
def _filled(address: Tensor, count: int, normal: bool) -> Tensor:
    out = torch.empty((len(address), count), dtype=torch.float32, device=address.device)
    if out.numel():
        _fill[(len(address), -(-count // _BLOCK))](address.contiguous(), out, count, NORMAL=normal, BLOCK=_BLOCK)
    return out


@_filled.register_fake
def _(address: Tensor, count: int, normal: bool) -> Tensor:
    return address.new_empty((len(address), count), dtype=torch.float32)


def _picked(address: Tensor, impl: Impl | None) -> str:
    return choose("noise", address, impl=impl, unfit=lambda: None, uncompilable="integers gain nothing there")

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
from typing import Any

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
_TO_UNIT = 2.0**-32  # of a word
_TO_ANGLE = 6.283185307179586 * 2.0**-32
_BLOCK = 1024  # values of a program
_MOST = 65535 * _BLOCK  # of a row: tiles are the grid's second dimension


@lru_cache(maxsize=256)
def stream_number(stream: str) -> int:
    """The 32 bits that stand for a stream's name."""
    return int.from_bytes(hashlib.sha256(stream.encode()).digest()[:4], "little")


def address(seed: int, stream: str, positions: Tensor) -> Tensor:
    """Where the noise of samples lies, as one tensor for those who draw it themselves: int64 (B, 3) of seed, stream's
    number and position, on the device of `positions` (int64, (B,))."""
    start, unit = _origin(seed, stream, positions.device)
    return torch.addcmul(start, positions.unsqueeze(1), unit)  # one launch


@lru_cache(maxsize=256)
def _origin(seed: int, stream: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """The address of position 0, and the step from one position to the next."""
    return torch.tensor([seed, stream_number(stream), 0], device=device), torch.tensor([0, 0, 1], device=device)


def uniform(
    seed: int, stream: str, positions: Tensor, shape: tuple[int, ...] = (), *, impl: Impl | None = None
) -> Tensor:
    """Uniform float32 in [0, 1), multiples of 2^-24: (B, *shape), on the device of `positions` (int64, (B,))."""
    return _draw(seed, stream, positions, shape, normal=False, impl=impl)


def normal(seed: int, stream: str, positions: Tensor, shape: tuple[int, ...], *, impl: Impl | None = None) -> Tensor:
    """Standard normal float32 (B, *shape), |x| <= 6.67, on the device of `positions` (int64, (B,))."""
    return _draw(seed, stream, positions, shape, normal=True, impl=impl)


def uniform_at(address: Tensor, shape: tuple[int, ...], *, impl: Impl | None = None) -> Tensor:
    """`uniform` at an `address` (B, 3)."""
    return _draw_at(address, shape, normal=False, impl=impl)


def normal_at(address: Tensor, shape: tuple[int, ...], *, impl: Impl | None = None) -> Tensor:
    """`normal` at an `address` (B, 3)."""
    return _draw_at(address, shape, normal=True, impl=impl)


def numel(shape: tuple[int, ...]) -> int:
    """Values in a row."""
    count = 1
    for size in shape:
        count *= size
    return count


def words(address: Tensor, count: int) -> Tensor:
    """The first `count` words of each row, int64 (B, count) in 0 .. 2^32 - 1."""
    quads = -(-count // 4)
    if _plain_cpu(address):
        even, odd = _words_by_numpy(*_columns(address), quads)
        found = torch.from_numpy(_in_turn(even, odd).astype(np.int64))
    else:
        found = _words_by_torch(address, quads)
    return found.view(len(address), 4 * quads)[:, :count].contiguous()


def _draw(
    seed: int, stream: str, positions: Tensor, shape: tuple[int, ...], *, normal: bool, impl: Impl | None
) -> Tensor:
    assert positions.dtype == torch.int64 and positions.dim() == 1, f"positions are no int64 (B,): {positions.dtype}"
    if not _plain_cpu(positions) or _picked(positions, impl, numel(shape)) == "triton":
        return _draw_at(address(seed, stream, positions), shape, normal=normal, impl=impl)
    # what all rows have in common is not spread over them first
    seeds, streams = np.array([seed], dtype=np.int64), np.array([stream_number(stream)], dtype=np.uint32)
    return _drawn_by_numpy(seeds, streams, positions.numpy(), shape, normal=normal)


def _draw_at(address: Tensor, shape: tuple[int, ...], *, normal: bool, impl: Impl | None) -> Tensor:
    assert address.dtype == torch.int64 and address.dim() == 2 and address.shape[1] == 3
    rows, count = len(address), numel(shape)
    if _picked(address, impl, count) == "triton":
        return _filled(address, count, normal=normal).view(rows, *shape)
    if _plain_cpu(address):
        return _drawn_by_numpy(*_columns(address), shape, normal=normal)
    if not normal:
        return (words(address, count) >> 8).to(torch.float32).mul_(2.0**-24).view(rows, *shape)
    pairs = words(address, count + count % 2).view(rows, -1, 2)
    # 32 bits for the radius, in (0, 1] so that the logarithm is finite; 32 for the angle, in [-pi, pi]
    radius = pairs[..., 0].to(torch.float32).add_(1.0).mul_(_TO_UNIT).log_().mul_(-2.0).clamp_(min=0.0).sqrt_()
    angle = pairs[..., 1].to(torch.int32).to(torch.float32).mul_(_TO_ANGLE)
    pair = torch.stack((angle.cos().mul_(radius), angle.sin_().mul_(radius)), dim=2).view(rows, -1)
    return pair[:, :count].reshape(rows, *shape)


def _plain_cpu(x: Tensor) -> bool:
    """Whether numpy can be given x's memory."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _columns(address: Tensor) -> tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.int64]]:
    seed, stream, position = np.ascontiguousarray(address.numpy().T)
    return seed, stream.astype(np.uint32), position


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


# numpy's calls cost a third of torch's, which a small network's step feels
def _words_by_numpy(
    seed: NDArray[np.int64], stream: NDArray[np.uint32], position: NDArray[np.int64], quads: int
) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Words 0 and 2, and words 1 and 3, of each quad: (2, B, quads) each. seed, stream: (B,), or (1,) for all rows.

    The two multiplications of a round are one, and the halves of its products a view (low first: little-endian)."""
    shape = (2, len(position), quads)
    even, odd, product = np.empty(shape, np.uint32), np.empty(shape, np.uint32), np.empty(shape, np.uint64)
    even[0] = np.arange(quads, dtype=np.uint32)
    odd[0], even[1] = _halves(position)[..., None]
    odd[1] = stream[:, None]
    keys = (_KEY_STEPS + _halves(seed))[..., None]
    halves = product.view(np.uint32).reshape(*shape, 2)[::-1]
    low, high = halves[..., 0], halves[..., 1]
    for key in keys:
        np.multiply(even, _FACTORS, out=product)
        np.bitwise_xor(high, odd, out=even)
        np.bitwise_xor(even, key, out=even)
        odd[...] = low
    return even, odd


_FACTORS = np.array(_MULTIPLIERS, dtype=np.uint64).reshape(2, 1, 1)
_KEY_STEPS = (np.arange(_ROUNDS, dtype=np.uint32)[:, None] * np.array(_WEYL, dtype=np.uint32))[..., None]


def _halves(x: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Low and high 32 bits, (2, n)."""
    return np.ascontiguousarray(x).view(np.uint32).reshape(-1, 2).T


def _in_turn(even: NDArray[Any], odd: NDArray[Any]) -> NDArray[Any]:
    """(2, B, quads) of elements 0 and 2, and of 1 and 3, as (B, quads, 4)."""
    whole = np.empty((*even.shape[1:], 2, 2), even.dtype)
    whole[..., 0], whole[..., 1] = even.transpose(1, 2, 0), odd.transpose(1, 2, 0)
    return whole.reshape(*even.shape[1:], 4)


def _drawn_by_numpy(
    seed: NDArray[np.int64],
    stream: NDArray[np.uint32],
    position: NDArray[np.int64],
    shape: tuple[int, ...],
    *,
    normal: bool,
) -> Tensor:
    rows, count = len(position), numel(shape)
    quads = -(-count // 4)
    even, odd = _words_by_numpy(seed, stream, position, quads)
    if normal:
        radius = even.astype(np.float32)
        radius += np.float32(1.0)
        radius *= np.float32(_TO_UNIT)
        np.log(radius, out=radius)
        radius *= np.float32(-2.0)
        np.sqrt(np.maximum(radius, np.float32(0.0), out=radius), out=radius)
        angle = odd.view(np.int32).astype(np.float32)
        angle *= np.float32(_TO_ANGLE)
        values = _in_turn(np.cos(angle) * radius, np.sin(angle) * radius)
    else:
        values = _in_turn((even >> np.uint32(8)).astype(np.float32), (odd >> np.uint32(8)).astype(np.float32))
        values *= np.float32(2.0**-24)
    return torch.from_numpy(np.ascontiguousarray(values.reshape(rows, 4 * quads)[:, :count])).view(rows, *shape)


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
def _cos_sin(x):
    """Of x in [-pi, pi], to an ulp or so: the polynomials of Cephes around the nearest multiple of pi / 2. CUDA's own
    have a branch for large arguments, which takes local memory and a table."""
    turns = tl.floor(x * 0.6366197723675814 + 0.5)
    r = (x - turns * 1.5707963705062866) + turns * 4.371139000186241e-08
    s = r * r
    sin = r + r * s * (-1.6666654611e-1 + s * (8.3321608736e-3 - s * 1.9515295891e-4))
    cos = 1.0 - 0.5 * s + s * s * (4.166664568298827e-2 + s * (-1.388731625493765e-3 + s * 2.443315711809948e-5))
    turned = tl.abs(turns) == 1.0
    across, up = tl.where(turned, sin, cos), tl.where(turned, cos, sin)
    return (
        tl.where((turns > 0.5) | (turns < -1.5), -across, across),
        tl.where((turns < -0.5) | (turns > 1.5), -up, up),
    )


@triton.jit
def normals(radius_word, angle_word):
    """Two standard normals from two words, as `normal_at` makes them."""
    u = (radius_word.to(tl.float32) + 1.0) * 2.3283064365386963e-10
    radius = tl.sqrt(tl.maximum(-2.0 * tl.log(u), 0.0))
    cos, sin = _cos_sin(angle_word.to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09)
    return cos * radius, sin * radius


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
        grid = (len(address), -(-count // _BLOCK))
        _fill[grid](address.contiguous(), out, count, NORMAL=normal, BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=False)
    return out


@_filled.register_fake
def _(address: Tensor, count: int, normal: bool) -> Tensor:
    return address.new_empty((len(address), count), dtype=torch.float32)


def _picked(address: Tensor, impl: Impl | None, count: int) -> str:
    return choose("noise", address, impl=impl, unfit=lambda: _unfit(count), uncompilable="integers gain nothing there")


def _unfit(count: int) -> str | None:
    return f"more than {_MOST} values a row" if count > _MOST else None

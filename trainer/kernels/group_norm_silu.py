"""SiLU of a group normalisation (Wu and He 2018): a third of the step of an f8 autoencoder when left to autocast.

The kernels read x twice and write y forward, read x and its gradient twice and write one gradient backward, and keep x,
the means and the deviations. A program takes some tiles of one sample's pixels with all channels. Statistics are the
mean and the sum of squared differences of each tile, merged as by Chan et al. 1983: a mean far from zero costs no more
than its own rounding, 6e-8 of mean over deviation. What needs all of a sample before it goes on reads its programs in
the other order, for then what was read last still lies in the cache.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trainer.kernels.choose import Impl, choose, compiled
from trainer.kernels.program import channels_last, dense, like, strides, tl, triton

TILE = 4096  # values at a time, 32 of a thread, so that some blocks fit a multiprocessor and 64 KB are on their way
SECTOR = 16  # pixels at least where a channel's lie in a row: 32 bytes, the least that is read, in 16 bits
FORWARD, BACKWARD = 512, 256  # programs of a sample, from where on each takes several tiles; backward they leave more
FEWEST, MOST = 16, 1024  # channels
LARGEST = 1 << 30  # values of a sample: offsets within it have 32 bits


def group_norm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, *, impl: Impl | None = None
) -> Tensor:
    """SiLU(GroupNorm(x)) of x (B, C, ...), in the dtype and memory format of x; weight, bias: (C,), any float dtype.

    Computed in float32 whatever x and autocast are, float64 stays, and rounded once. For its backward the plain
    formula keeps two tensors of x's size in that wide dtype, of which x itself is one where it has it; the kernel none
    but x."""
    assert weight.shape == bias.shape == (x.shape[1],), f"{tuple(weight.shape)} weights of {x.shape[1]} channels"
    # compiled where that is asked for here, but not for a whole run that prefers it
    many = (
        None if impl == "compiled" else "a network has more shapes than graphs are kept; compile: true takes it whole"
    )
    picked = choose("group_norm_silu", x, impl=impl, unfit=lambda: _unfit(x, groups), uncompilable=many)
    if picked == "triton":
        y, _, _ = _forward(x, groups, weight, bias, eps)
        return y  # type: ignore[no-any-return]
    return (compiled(_plain) if picked == "compiled" else _plain)(x, groups, weight, bias, eps)


def _plain(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    dtype, wide = x.dtype, torch.float64 if x.dtype == torch.float64 else torch.float32
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    if not dtype == weight.dtype == bias.dtype == wide:  # calls that change nothing cost a small network more than sums
        x, weight, bias = x.to(wide), weight.to(wide), bias.to(wide)
    y = functional.silu(functional.group_norm(x, groups, weight, bias, eps))
    y = y if dtype == wide else y.to(dtype)
    return y.contiguous(memory_format=torch.channels_last) if last else y  # CUDA's group_norm gives up that format


def _unfit(x: Tensor, groups: int) -> str | None:
    """Why the kernel cannot take x."""
    if x.dim() != 4:
        return f"{x.dim()} dimensions instead of (B, C, H, W)"
    channels = x.shape[1]
    if channels.bit_count() != 1 or not FEWEST <= channels <= MOST or channels % groups:
        return f"{channels} channels in {groups} groups, not a power of two in {FEWEST} .. {MOST} in whole groups"
    if channels * x.shape[2] * x.shape[3] > LARGEST:
        return f"more than {LARGEST} values a sample"
    if dense(x) is not x:
        return "memory that is neither contiguous nor channels last"
    return None


# ---------------------------------------------------------------------------------------------------------- kernels
@triton.jit
def _tile(x, pixel, HW, channel_stride, pixel_stride, C: tl.constexpr):
    """Pixels of a sample that begins at x, all channels, float32; 0 beyond the last pixel."""
    at = pixel[:, None] * pixel_stride + tl.arange(0, C)[None, :] * channel_stride
    return tl.load(x + at, mask=(pixel < HW)[:, None], other=0.0).to(tl.float32)


@triton.jit
def _statistics(
    x, part, HW, channel_stride, pixel_stride,
    C: tl.constexpr, G: tl.constexpr, PIXELS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """part[sample, program]: mean (G,) and sum of squared differences (G,)."""
    sample = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    count, mean, squares = 0.0, tl.zeros((G,), tl.float32), tl.zeros((G,), tl.float32)
    for tile in range(TILES):
        first = (program * TILES + tile) * PIXELS
        pixel = first + tl.arange(0, PIXELS)
        values = _tile(x + sample * HW * C, pixel, HW, channel_stride, pixel_stride, C)
        values = tl.reshape(values, (PIXELS, G, C // G))
        more = tl.maximum(tl.minimum(HW - first, PIXELS), 0) * (1.0 * (C // G))
        tile_mean = tl.sum(tl.sum(values, 2), 0) / tl.maximum(more, 1.0)
        apart = tl.where((pixel < HW)[:, None, None], values - tile_mean[None, :, None], 0.0)
        share = more / tl.maximum(count + more, 1.0)
        moved = tile_mean - mean
        squares += tl.sum(tl.sum(apart * apart, 2), 0) + moved * moved * (count * share)
        mean += moved * share
        count += more
    at = part + (sample * tl.num_programs(1) + program) * 2 * G + tl.arange(0, G)
    tl.store(at, mean)
    tl.store(at + G, squares)


@triton.jit
def _merge_statistics(
    part, mean, rstd, HW, programs, each, eps,
    C: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """mean, rstd (B, G) of BLOCK groups of a sample from `programs`, at most PROGRAMS, of `each` as many pixels."""
    sample = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    program = tl.arange(0, PROGRAMS)[:, None]
    at = part + (sample * programs + program) * 2 * G + group[None, :]
    count = tl.maximum(tl.minimum(HW - program * each, each), 0) * (1.0 * (C // G))
    total = HW * (1.0 * (C // G))
    means = tl.load(at, mask=program < programs, other=0.0)
    squares = tl.load(at + G, mask=program < programs, other=0.0)
    first = tl.load(part + sample * programs * 2 * G + group)  # sums of differences from it lose less
    merged = first + tl.sum(count * (means - first[None, :]), 0) / total
    apart = means - merged[None, :]
    variance = tl.sum(squares + count * apart * apart, 0) / total
    tl.store(mean + sample * G + group, merged)
    tl.store(rstd + sample * G + group, 1.0 / tl.sqrt(variance + eps))


@triton.jit
def _coefficients(mean, rstd, weight, bias, sample, C: tl.constexpr, G: tl.constexpr):
    """Mean, rstd * weight and bias of each channel (1, C): SiLU's input is (x - mean) * scale + shift."""
    channel = tl.arange(0, C)
    group = sample * G + channel // (C // G)
    scale = tl.load(rstd + group) * tl.load(weight + channel).to(tl.float32)
    shift = tl.load(bias + channel).to(tl.float32)
    return tl.load(mean + group)[None, :], scale[None, :], shift[None, :]


@triton.jit
def _activate(
    x, y, mean, rstd, weight, bias, HW, channel_stride, pixel_stride,
    C: tl.constexpr, G: tl.constexpr, PIXELS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    program = tl.num_programs(1) - 1 - tl.program_id(1)
    means, scale, shift = _coefficients(mean, rstd, weight, bias, sample, C, G)
    for tile in range(TILES):
        pixel = (program * TILES + tile) * PIXELS + tl.arange(0, PIXELS)
        values = _tile(x + sample * HW * C, pixel, HW, channel_stride, pixel_stride, C)
        h = (values - means) * scale + shift
        at = y + sample * HW * C + pixel[:, None] * pixel_stride + tl.arange(0, C)[None, :] * channel_stride
        tl.store(at, (h / (1.0 + tl.exp(-h))).to(y.dtype.element_ty), mask=(pixel < HW)[:, None])


@triton.jit
def _before_activation(h, dy):
    """The gradient at SiLU's input h."""
    s = 1.0 / (1.0 + tl.exp(-h))
    return dy * (s * (1.0 + h * (1.0 - s)))


@triton.jit
def _sums(
    x, dy, part, mean, rstd, weight, bias, HW, channel_stride, pixel_stride,
    C: tl.constexpr, G: tl.constexpr, PIXELS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """part[sample, program]: gradients of bias (C,) and of weight (C,), the latter for a deviation of 1."""
    sample = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    means, scale, shift = _coefficients(mean, rstd, weight, bias, sample, C, G)
    dbias, dweight = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    for tile in range(TILES):
        pixel = (program * TILES + tile) * PIXELS + tl.arange(0, PIXELS)
        apart = _tile(x + sample * HW * C, pixel, HW, channel_stride, pixel_stride, C) - means
        gradient = _tile(dy + sample * HW * C, pixel, HW, channel_stride, pixel_stride, C)
        dh = tl.where((pixel < HW)[:, None], _before_activation(apart * scale + shift, gradient), 0.0)
        dbias += tl.sum(dh, 0)
        dweight += tl.sum(dh * apart, 0)
    at = part + (sample * tl.num_programs(1) + program) * 2 * C + tl.arange(0, C)
    tl.store(at, dbias)
    tl.store(at + C, dweight)


@triton.jit
def _merge_sums(
    part, rstd, weight, sums, terms, HW, programs,
    C: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """sums (B, 2, C): gradients of bias and weight; terms (B, 2, G): means over a group of weight times each of them,
    times rstd and its square, which is what the gradient of x loses to the statistics. BLOCK channels of a sample."""
    sample = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dbias, dweight = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for block in range(PROGRAMS // ROWS):
        program = block * ROWS + tl.arange(0, ROWS)[:, None]
        at = part + (sample * programs + program) * 2 * C + channel[None, :]
        dbias += tl.sum(tl.load(at, mask=program < programs, other=0.0), 0)
        dweight += tl.sum(tl.load(at + C, mask=program < programs, other=0.0), 0)
    by_channel = tl.load(rstd + sample * G + channel // (C // G))
    dweight *= by_channel
    tl.store(sums + sample * 2 * C + channel, dbias)
    tl.store(sums + sample * 2 * C + C + channel, dweight)
    scale = by_channel * tl.load(weight + channel).to(tl.float32) / (HW * (1.0 * (C // G)))
    at = terms + sample * 2 * G + tl.program_id(1) * (BLOCK // (C // G)) + tl.arange(0, BLOCK // (C // G))
    tl.store(at, tl.sum(tl.reshape(dbias * scale, (BLOCK // (C // G), C // G)), 1))
    tl.store(at + G, tl.sum(tl.reshape(dweight * scale * by_channel, (BLOCK // (C // G), C // G)), 1))


@triton.jit
def _gradient(
    x, dy, dx, mean, rstd, weight, bias, terms, HW, channel_stride, pixel_stride,
    C: tl.constexpr, G: tl.constexpr, PIXELS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    program = tl.num_programs(1) - 1 - tl.program_id(1)
    means, scale, shift = _coefficients(mean, rstd, weight, bias, sample, C, G)
    lost = terms + sample * 2 * G + tl.arange(0, C) // (C // G)
    level, slope = tl.load(lost)[None, :], tl.load(lost + G)[None, :]
    for tile in range(TILES):
        pixel = (program * TILES + tile) * PIXELS + tl.arange(0, PIXELS)
        apart = _tile(x + sample * HW * C, pixel, HW, channel_stride, pixel_stride, C) - means
        gradient = _tile(dy + sample * HW * C, pixel, HW, channel_stride, pixel_stride, C)
        found = _before_activation(apart * scale + shift, gradient) * scale - (apart * slope + level)
        at = dx + sample * HW * C + pixel[:, None] * pixel_stride + tl.arange(0, C)[None, :] * channel_stride
        tl.store(at, found.to(dx.dtype.element_ty), mask=(pixel < HW)[:, None])


# --------------------------------------------------------------------------------------------------------- operators
@torch.library.custom_op("tandem::group_norm_silu", mutates_args=())
def _forward(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, and mean and 1 / deviation (B, G)."""
    x, weight, bias = dense(x), weight.contiguous(), bias.contiguous()
    y, mean, rstd = _allocate(x, groups)
    if x.numel():
        grid, sizes, plan = _plan(x, groups, FORWARD)
        part, block = mean.new_empty((*grid, 2, groups)), min(groups, 8)  # 32 bytes, the least that is read
        _statistics[grid](x, part, *sizes, **plan)
        merged = {"C": x.shape[1], "G": groups, "BLOCK": block, "PROGRAMS": _power(grid[1]), **MERGE}
        pixels = plan["PIXELS"] * plan["TILES"]
        _merge_statistics[(len(x), groups // block)](part, mean, rstd, sizes[0], grid[1], pixels, eps, **merged)
        _activate[grid](x, y, mean, rstd, weight, bias, *sizes, **plan)
    return y, mean, rstd


@torch.library.custom_op("tandem::group_norm_silu_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, groups: int, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, wanted: bool
) -> tuple[Tensor, Tensor]:
    """dx, empty unless `wanted`; gradients of bias and weight (B, 2, C), float32."""
    x, weight, bias = dense(x), weight.contiguous(), bias.contiguous()
    dx, sums = _allocate_backward(x, wanted)
    if x.numel():
        dy, channels = like(dy, x), x.shape[1]
        grid, sizes, plan = _plan(x, groups, BACKWARD)
        part, terms = sums.new_empty((*grid, 2, channels)), sums.new_empty((len(x), 2, groups))
        _sums[grid](x, dy, part, mean, rstd, weight, bias, *sizes, **plan)
        block, programs = max(min(channels, 32), channels // groups), _power(grid[1])  # of whole groups
        rows = min(programs, TILE // block)
        merged = {"C": channels, "G": groups, "BLOCK": block, "ROWS": rows, "PROGRAMS": programs, **MERGE}
        _merge_sums[(len(x), channels // block)](part, rstd, weight, sums, terms, sizes[0], grid[1], **merged)
        if wanted:
            grid, sizes, plan = _plan(x, groups, FORWARD)
            _gradient[grid](x, dy, dx, mean, rstd, weight, bias, terms, *sizes, **plan)
    return dx, sums


MERGE = {"num_warps": 8, "enable_fp_fusion": True}


def _plan(x: Tensor, groups: int, programs: int) -> tuple[tuple[int, int], tuple[int, int, int], dict[str, int]]:
    """Grid, sizes and constants of kernels that go over x; the same for a sample whatever batch it is in."""
    channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
    tile = max(TILE // channels, 1 if channels_last(x) else SECTOR)
    tiles = -(-pixels // tile)
    each = _power(tiles // programs + 1) // 2 or 1  # so that there are programs .. 2 programs - 1
    plan = {"C": channels, "G": groups, "PIXELS": tile, "TILES": each}
    plan |= {"num_warps": tile * channels * 4 // TILE, "enable_fp_fusion": True}
    return (len(x), -(-tiles // each)), (pixels, *strides(x)[1:]), plan


def _power(number: int) -> int:
    """The power of two from `number`, at least 1, on."""
    return 1 << (number - 1).bit_length()


def _allocate(x: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty((len(x), groups), dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x), mean, rstd


def _allocate_backward(x: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    sums = x.new_empty((len(x), 2, x.shape[1]), dtype=torch.float32)
    return torch.empty_like(x) if wanted else x.new_empty(0), sums if x.numel() else sums.zero_()


@_forward.register_fake
def _(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _allocate(dense(x), groups)


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, groups: int, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, wanted: bool
) -> tuple[Tensor, Tensor]:
    return _allocate_backward(dense(x), wanted)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, ctx.groups, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(x, weight, bias, *output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    x, weight, bias, mean, rstd = ctx.saved_tensors
    of_x, _, of_weight, of_bias, _ = ctx.needs_input_grad
    if dy is None:
        return None, None, None, None, None
    if torch.is_grad_enabled():  # create_graph: what may be differentiated any number of times
        x, weight, bias = (t.view_as(t) for t in (x, weight, bias))  # each by itself: one may be a function of another
        y = _plain(x, ctx.groups, weight, bias, ctx.eps)
        tensors = [t for t, needed in ((x, of_x), (weight, of_weight), (bias, of_bias)) if needed]
        found = list(torch.autograd.grad(y, tensors, dy, create_graph=True))
        dx, dweight, dbias = (found.pop(0) if needed else None for needed in (of_x, of_weight, of_bias))
        return dx, None, dweight, dbias, None
    dx, sums = _backward(dy, x, ctx.groups, weight, bias, mean, rstd, of_x)
    totals = sums.sum(0) if of_weight or of_bias else sums
    dbias = totals[0].to(bias.dtype) if of_bias else None
    dweight = totals[1].to(weight.dtype) if of_weight else None
    return dx if of_x else None, None, dweight, dbias, None


_forward.register_autograd(_differentiate, setup_context=_keep)

"""The head of LPIPS (Zhang et al. 2018): how far two stacks of feature maps are apart.

    u = a / (|a| + 1e-10), v = b / (|b| + 1e-10)         over the channels of a pixel
    distance = sum over maps of  mean over pixels of  sum over channels of  w (u - v)^2

A feature vector of length 0 (below 1e-19, the square of which is no normal float32) has u = 0 and gradient 0: the
reference code's square root has no slope there and returns NaN (LPIPS issues 69 and 121). Equal maps are at distance 0,
exactly.

The kernel reads each map once a pass, forward and backward, keeps nothing for the backward but the maps, and writes
nothing in the forward but a partial sum a tile: plain torch moves 98 bytes an element of bfloat16 maps, the kernel 10.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.kernels.choose import Impl, choose, compiled
from trainer.kernels.program import channels_last, dense, like, tl, triton

EPSILON = 1e-10  # as in lpips
_ELEMENTS = 2048  # of a tile: 16 of each map a thread, so that all stays in registers, at 8 blocks a processor
_PIXELS = 16  # of a tile where pixels lie side by side: 32 bytes of bfloat16, the least that memory gives
_CHANNELS = 1024  # at most: 8 pixels of them fill 16 warps


def lpips_head(
    a: Sequence[Tensor], b: Sequence[Tensor], weights: Sequence[Tensor] | None, *, impl: Impl | None = None
) -> Tensor:
    """a, b: as many maps (B, C, h, w) each, C, h and w differing from map to map, of any floating dtype and layout.
    weights: LPIPS' linear heads, (1, C, 1, 1) a map; None: all 1. (B,), float32 (float64 of float64)."""
    assert len(a) > 0 and [x.shape for x in a] == [y.shape for y in b], "stacks of other maps cannot be compared"
    assert weights is None or [w.numel() for w in weights] == [x.shape[1] for x in a], "a weight a channel"
    picked = choose("lpips_head", a[0], impl=impl, unfit=lambda: _unfit(a, b, weights))
    distance: Tensor
    if picked == "triton":
        distance = _head(list(a), list(b), list(weights or []))
    else:
        distance = (compiled(_plain) if picked == "compiled" else _plain)(a, b, weights)
    return distance


def _plain(a: Sequence[Tensor], b: Sequence[Tensor], weights: Sequence[Tensor] | None) -> Tensor:
    """The definition, in float32 whatever autocast says: only operations that it leaves alone or makes float32."""
    heads: Sequence[Tensor | None] = weights or [None] * len(a)
    return torch.stack([_term(x, y, w) for x, y, w in zip(a, b, heads, strict=True)]).sum(0)


def _term(a: Tensor, b: Tensor, weight: Tensor | None) -> Tensor:
    """The part of one map, (B,)."""
    a = dense(a)
    b, channel, pixels = like(b, a), 1, (2, 3)  # equal values then round equally
    if channels_last(a):
        # as (B, h, w, C): broadcast in the order of memory, gradients lie in that order too; otherwise autograd makes
        # contiguous ones, in twice the time, and the network goes on with those
        a, b, channel, pixels = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1), 3, (1, 2)
    a, b = _exact(a), _exact(b)
    difference = a * _inverse(a, channel) - b * _inverse(b, channel)
    squares = difference * difference
    if weight is None:
        return squares.sum((1, 2, 3)) / (a.shape[pixels[0]] * a.shape[pixels[1]])
    return (squares.mean(pixels) * _exact(weight).flatten()).sum(1)


def _exact(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def _inverse(x: Tensor, channel: int) -> Tensor:
    """1 / (|x| + EPSILON). Of no length it is 1 / infinity: 0, as is any derivative through it."""
    squares = (x * x).sum(channel, keepdim=True)
    return (squares.masked_fill(squares < torch.finfo(x.dtype).tiny, torch.inf).sqrt() + EPSILON).reciprocal()


def _unfit(a: Sequence[Tensor], b: Sequence[Tensor], weights: Sequence[Tensor] | None) -> str | None:
    """Why the kernel cannot take these, or None."""
    for x in (*a, *b, *(weights or ())):
        if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"{x.dtype} is for references"
    for x in a:
        if x.shape[1] > _CHANNELS:
            return f"{x.shape[1]} channels are more than the {_CHANNELS} whose values fit in registers"
        if x[:1].numel() >= 2**31 - 2**20:
            return "a sample's map has more elements than 31 bits can count"
        if not 0 < x.shape[2] * x.shape[3] <= 65535 * _tile(x.shape[1], contiguous=False, both=True)[0]:
            return f"a map of {x.shape[2]}x{x.shape[3]} is none, or of more tiles than a grid has"
    if weights is not None and any(w.requires_grad for w in weights):
        return "the kernel has no gradient of the weights"
    return None


def _tile(channels: int, *, contiguous: bool, both: bool) -> tuple[int, int, int]:
    """Pixels and channels of a tile, and warps. contiguous: pixels lie side by side. both: both gradients are written,
    which takes more registers."""
    wide = 1 << (channels - 1).bit_length()
    pixels = min(256, max(1, (_ELEMENTS // 2 if both else _ELEMENTS) // wide))
    if contiguous:
        pixels = max(pixels, min(_PIXELS, (2 if both else 4) * _ELEMENTS // wide))
    return pixels, wide, max(4, pixels * wide // 512)


# ---------------------------------------------------------------------------------------------------------- kernels
@triton.jit
def _cells(HW, C: tl.constexpr, P: tl.constexpr, W: tl.constexpr):
    """The pixels (P, 1) and channels (1, W) of a tile, and which of its elements there are."""
    pixel = (tl.program_id(1) * P + tl.arange(0, P))[:, None]
    channel = tl.arange(0, W)[None, :]
    mask = pixel < HW
    if C < W:
        mask = mask & (channel < C)
    return pixel, channel, mask


@triton.jit
def _place(x, pixel, channel, HW, C: tl.constexpr, LAST: tl.constexpr):
    """Pointers to a tile of the map x, which lies channels last or contiguous; the offset of a sample is 64 bits."""
    sample = x + tl.program_id(0).to(tl.int64) * (HW * C)
    if LAST:
        return sample + (pixel * C + channel)
    else:
        return sample + (channel * HW + pixel)


@triton.jit
def _weights(weight, channel, C: tl.constexpr, WEIGHED: tl.constexpr):
    """float32 (1, W), 0 where there is no channel."""
    if WEIGHED:
        return tl.load(weight + channel, mask=channel < C, other=0.0).to(tl.float32)
    else:
        return (channel < C).to(tl.float32)


@triton.jit
def _units(x):
    """Of a tile x: u = x / (|x| + EPSILON); 1 / (|x| + EPSILON), 0 of no length; (|x| + EPSILON) / |x|."""
    squares = tl.sum(x * x, 1)[:, None]
    empty = squares < 1.1754943508222875e-38
    length = tl.sqrt(tl.where(empty, 1.0, squares))
    inverse = tl.where(empty, 0.0, 1.0 / (length + 1e-10))
    return x * inverse, inverse, 1.0 + 1e-10 / length


@triton.jit
def _distances(a, b, weight, out, HW, share, first, TILES, C: tl.constexpr, A_LAST: tl.constexpr,
               B_LAST: tl.constexpr, WEIGHED: tl.constexpr, P: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """A tile's part of the distance of a sample -> out[sample, first + tile]. share: 1 / HW."""
    pixel, channel, mask = _cells(HW, C, P, W)
    u, _, _ = _units(tl.load(_place(a, pixel, channel, HW, C, A_LAST), mask=mask, other=0.0).to(tl.float32))
    v, _, _ = _units(tl.load(_place(b, pixel, channel, HW, C, B_LAST), mask=mask, other=0.0).to(tl.float32))
    part = tl.sum(tl.sum((u - v) * (u - v) * _weights(weight, channel, C, WEIGHED), 1), 0) * share
    tl.store(out + tl.program_id(0).to(tl.int64) * TILES + first + tl.program_id(1), part)


@triton.jit
def _gradients(a, b, weight, gradient, to_a, to_b, HW, share, stride, C: tl.constexpr, A_LAST: tl.constexpr,
               B_LAST: tl.constexpr, WEIGHED: tl.constexpr, TO_A: tl.constexpr, TO_B: tl.constexpr,
               P: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """With d = 2 w (u - v) g / HW, the gradient at u: (d - a/|a| sum_c(d u)) / (|a| + EPSILON) at a, and at b alike of
    -d; a/|a| = u (|a| + EPSILON) / |a|. gradient: g of each sample, `stride` apart. share: 1 / HW."""
    pixel, channel, mask = _cells(HW, C, P, W)
    u, u_inverse, u_ratio = _units(
        tl.load(_place(a, pixel, channel, HW, C, A_LAST), mask=mask, other=0.0).to(tl.float32)
    )
    v, v_inverse, v_ratio = _units(
        tl.load(_place(b, pixel, channel, HW, C, B_LAST), mask=mask, other=0.0).to(tl.float32)
    )
    upstream = tl.load(gradient + tl.program_id(0).to(tl.int64) * stride).to(tl.float32) * (2.0 * share)
    d = (u - v) * (_weights(weight, channel, C, WEIGHED) * upstream)
    if TO_A:
        found = (d - u * (tl.sum(d * u, 1)[:, None] * u_ratio)) * u_inverse
        tl.store(_place(to_a, pixel, channel, HW, C, A_LAST), found.to(to_a.dtype.element_ty), mask=mask)
    if TO_B:
        found = (v * (tl.sum(d * v, 1)[:, None] * v_ratio) - d) * v_inverse
        tl.store(_place(to_b, pixel, channel, HW, C, B_LAST), found.to(to_b.dtype.element_ty), mask=mask)


# --------------------------------------------------------------------------------------------------------- operators
def _plan(x: Tensor, y: Tensor, *, weighted: bool, both: bool) -> dict[str, Any]:
    """What a kernel is compiled for. No fused multiply-add: it would round a product of one map and not the other's,
    and equal maps would have a distance."""
    a_last, b_last = channels_last(x), channels_last(y)
    pixels, wide, warps = _tile(x.shape[1], contiguous=not (a_last and b_last), both=both)
    constants = {"C": x.shape[1], "A_LAST": a_last, "B_LAST": b_last, "WEIGHED": weighted, "P": pixels, "W": wide}
    return constants | {"num_warps": warps, "enable_fp_fusion": False}


def _gradient_like(x: Tensor) -> Tensor:
    """For the gradient of a `dense` map."""
    return torch.empty_like(x, memory_format=torch.channels_last if channels_last(x) else torch.contiguous_format)


@torch.library.custom_op("tandem::lpips_head", mutates_args=())
def _head(a: Sequence[Tensor], b: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """weights: none, or one a map."""
    pairs = [(dense(x), dense(y)) for x, y in zip(a, b, strict=True)]
    plans = [_plan(x, y, weighted=bool(weights), both=False) for x, y in pairs]
    areas = [x.shape[2] * x.shape[3] for x in a]
    tiles = [-(-area // plan["P"]) for area, plan in zip(areas, plans, strict=True)]
    parts = torch.empty((len(a[0]), sum(tiles)), dtype=torch.float32, device=a[0].device)
    for layer, (x, y) in enumerate(pairs):
        if len(x):
            weight = weights[layer].contiguous() if weights else x
            share, first = 1 / areas[layer], sum(tiles[:layer])
            _distances[(len(x), tiles[layer])](
                x, y, weight, parts, areas[layer], share, first, sum(tiles), **plans[layer]
            )
    return parts.sum(1)


@_head.register_fake
def _(a: Sequence[Tensor], b: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    return a[0].new_empty((len(a[0]),), dtype=torch.float32)


@torch.library.custom_op("tandem::lpips_head_backward", mutates_args=())
def _head_backward(
    gradient: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], weights: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor]:
    """The gradients of those of the maps (*a, *b) that are needed."""
    maps = [dense(x) for x in (*a, *b)]
    found = [_gradient_like(x) if wanted else None for x, wanted in zip(maps, needed, strict=True)]
    n = len(a)
    for layer, (x, y, to_a, to_b) in enumerate(zip(maps[:n], maps[n:], found[:n], found[n:], strict=True)):
        if len(x) and not (to_a is None and to_b is None):
            plan = _plan(x, y, weighted=bool(weights), both=not (to_a is None or to_b is None))
            area, weight = x.shape[2] * x.shape[3], weights[layer].contiguous() if weights else x
            outputs = (x if to_a is None else to_a, y if to_b is None else to_b)  # what is not needed is not written
            _gradients[(len(x), -(-area // plan["P"]))](
                x, y, weight, gradient, *outputs, area, 1 / area, gradient.stride(0),
                TO_A=to_a is not None, TO_B=to_b is not None, **plan
            )  # fmt: skip
    return [x for x in found if x is not None]


@_head_backward.register_fake
def _(
    gradient: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], weights: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor]:
    return [_gradient_like(dense(x)) for x, wanted in zip((*a, *b), needed, strict=True) if wanted]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, weights = inputs
    ctx.maps = len(a)
    ctx.save_for_backward(*a, *b, *weights)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[list[Tensor | None], list[Tensor | None], list[None]]:
    n = ctx.maps
    maps, weights = list(ctx.saved_tensors[: 2 * n]), list(ctx.saved_tensors[2 * n :])
    needed = [*ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
    if torch.is_grad_enabled():  # create_graph: the definition's gradient, which has derivatives of its own
        maps = [x.view_as(x) for x in maps]  # apart, though they be one tensor
        distance = _plain(maps[:n], maps[n:], weights or None)
        wanted = [x for x, want in zip(maps, needed, strict=True) if want]
        found = iter(torch.autograd.grad(distance, wanted, gradient, create_graph=True))
    else:
        found = iter(_head_backward(gradient, maps[:n], maps[n:], weights, needed))
    gradients = [next(found) if want else None for want in needed]
    return gradients[:n], gradients[n:], [None] * len(weights)


_head.register_autograd(_differentiate, setup_context=_save)

"""The discretised mixture of logistics over 256 levels (Salimans et al. 2017, PixelCNN++, section 2.1): its nats.

One mixture a pixel, shared by its channels; given the component, channels are independent. Parameters are (B, P, H, W),
P = K (1 + 2 C): K logits, then K means for each channel, then K log-scales for each channel. With s the logistic
function and a, b the edges of a level's bin, standardised,

    log(s(a) - s(b)) = log s(a) + log s(-b) + log(1 - e^(b - a))

is exact in the tails, where the paper's code switches to the density. The first bin has no lower edge and is s(a), the
last has no upper one and is s(-b). Distances are taken in levels, where the image is an integer and loses nothing.

The kernel holds a pixel in a lane and goes through the components once, with running log-sum-exps: nothing of size K
is kept in registers. It saves two of them a pixel, 8 bytes, with which the backward needs one pass as well.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trainer.kernels.choose import Impl, choose, compiled
from trainer.kernels.program import dense, strides, tl, triton
from trainer.kernels.reconstruction import full, log1p, total

HALF_RANGE = 127.5  # levels a unit of [-1, 1]
SMALLEST = -7.0  # log-scale, as PixelCNN++: an eighth of a level
LARGEST = 7.0  # flat over the range; keeps exp finite
_BLOCK = 128  # pixels of a program: one a thread
_WARPS = 4
_MOST = 2**31 - 1  # elements of a sample's parameters: their offsets are 32 bits


def logistic_mixture_nll(parameters: Tensor, image: Tensor, *, components: int, impl: Impl | None = None) -> Tensor:
    """Parameters (B, P, H, W), images (B, C, H, W) in [-1, 1] -> nats of their levels, float32 (float64 stays), (B,),
    summed over C, H and W, never negative. An element between two levels counts as the nearer."""
    assert parameters.shape[2:] == image.shape[2:] and len(parameters) == len(image)
    assert parameters.shape[1] == components * (1 + 2 * image.shape[1]), (
        f"{parameters.shape[1]} channels are not those of {components} components"
    )
    picked = choose("logistic mixture", parameters, impl=impl, unfit=lambda: _unfit(parameters, image))
    if picked == "triton":
        nats: Tensor = _forward(dense(parameters), dense(image), components)[0]
        return nats
    return (compiled(_plain) if picked == "compiled" else _plain)(parameters, image, components)


def _unfit(parameters: Tensor, image: Tensor) -> str | None:
    if image.requires_grad:
        return "the image wants a gradient"
    if image.dtype == torch.float64:
        return "float64 is for references"
    if not (parameters.is_floating_point() and image.is_floating_point()):
        return "integers"
    if parameters[:1].numel() > _MOST:
        return f"more than {_MOST} parameters a sample"
    pixels = parameters.shape[2] * parameters.shape[3]
    return f"more than {65535 * _BLOCK} pixels" if pixels > 65535 * _BLOCK else None


def split(parameters: Tensor, components: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-weights (B, K, 1, H, W), means and log-scales (B, K, C, H, W)."""
    x, k = full(parameters), components
    channels = (x.shape[1] // k - 1) // 2
    assert x.shape[1] == k * (1 + 2 * channels), f"{x.shape[1]} channels are not those of {k} components"
    weights = x[:, :k].log_softmax(1).unsqueeze(2)
    means, scales = x[:, k:].unflatten(1, (2, channels, k)).transpose(2, 3).unbind(1)
    return weights, means, scales.clamp(SMALLEST, LARGEST)


def _plain(parameters: Tensor, image: Tensor, components: int) -> Tensor:
    """The definition."""
    weights, means, scales = split(parameters, components)
    level = ((full(image) + 1.0) * HALF_RANGE).round().unsqueeze(1)
    distance = torch.sub(level - HALF_RANGE, means, alpha=HALF_RANGE)
    inverse = torch.exp(-scales) / HALF_RANGE  # a bin is one level wide, so a - b too
    above, below = functional.logsigmoid((distance + 0.5) * inverse), functional.logsigmoid((0.5 - distance) * inverse)
    upper, lower = (level < 255.0).to(above.dtype), (level > 0.0).to(above.dtype)  # whether a bin has that edge
    log_mass = torch.addcmul(above * upper + below * lower, torch.log(-torch.expm1(-inverse)), upper * lower)
    by_component = weights.squeeze(2) + log_mass.sum(2)
    return total(-torch.logsumexp(by_component, 1).clamp(max=0.0).unsqueeze(1))


# ------------------------------------------------------------------------------------------------------- kernels
@triton.jit
def _level(of_image, mask):
    """The nearest integer, ties to even as torch's: adding 1.5 * 2^23 leaves no fraction."""
    x = (tl.load(of_image, mask=mask, other=0.0).to(tl.float32) + 1.0) * 127.5
    return tl.where(tl.abs(x) < 4194304.0, (x + 12582912.0) - 12582912.0, x)


@triton.jit
def _width(w):
    """1 - e^-w for w > 0, without cancellation near 0."""
    series = w * (1.0 - w * (0.5 - w * (1.0 / 6.0 - w * (1.0 / 24.0 - w * (1.0 / 120.0 - w * (1.0 / 720.0))))))
    return tl.where(w < 0.3, series, 1.0 - tl.exp(-w))


@triton.jit
def _standard(at, mean, to_scale, level, mask):
    """Of a component and channel: standardised edges of the bin, the upper one and the lower one's negative, its width,
    and whether the log-scale is within its limits. mean: offset from `at`; to_scale: from there."""
    scale = tl.load(at + mean + to_scale, mask=mask, other=0.0).to(tl.float32)
    clamped = tl.where(scale < -7.0, -7.0, tl.where(scale > 7.0, 7.0, scale))  # NaN stays
    inverse = tl.exp(-clamped) * (1.0 / 127.5)
    distance = tl.fma(tl.load(at + mean, mask=mask, other=0.0).to(tl.float32), -127.5, level - 127.5)
    return (distance + 0.5) * inverse, (0.5 - distance) * inverse, inverse, scale == clamped


@triton.jit
def _log_mass(level, above, below, width):
    """log of a component's probability of a level; a level of NaN has every edge, and shows."""
    upper = tl.where(level >= 255.0, 0.0, tl.where(above < 0.0, above, 0.0) - log1p(tl.exp(-tl.abs(above))))
    lower = tl.where(level <= 0.0, 0.0, tl.where(below < 0.0, below, 0.0) - log1p(tl.exp(-tl.abs(below))))
    return upper + lower + tl.where((level <= 0.0) | (level >= 255.0), 0.0, tl.log(_width(width)))


@triton.jit
def _added(largest, total, x):
    """A running log-sum-exp, largest + log(total), with x in it."""
    new = tl.maximum(largest, x)
    return new, total * tl.exp(largest - new) + tl.exp(x - new)


@triton.jit
def _mixture_nll(
    parameters, image, nats, saved, PIXELS, TILES, p_sample, p_channel, p_pixel, i_sample, i_channel, i_pixel,
    K: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Partial sums of nats, and for each pixel the log-sum-exps of its logits and of logits plus log-masses."""
    sample, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pixel = tile * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < PIXELS
    at, of_image = parameters + sample * p_sample + pixel * p_pixel, image + sample * i_sample + pixel * i_pixel
    zero = tl.zeros([BLOCK], dtype=tl.float32)
    weights_max, weights_sum, all_max, all_sum = zero - 1e38, zero, zero - 1e38, zero
    for k in range(K):
        logit = tl.load(at + k * p_channel, mask=mask, other=0.0).to(tl.float32)
        joint = logit
        for c in tl.static_range(C):
            level = _level(of_image + c * i_channel, mask)
            above, below, width, _ = _standard(at, (K + c * K + k) * p_channel, C * K * p_channel, level, mask)
            joint += _log_mass(level, above, below, width)
        weights_max, weights_sum = _added(weights_max, weights_sum, logit)
        all_max, all_sum = _added(all_max, all_sum, joint)
    weights, both = weights_max + tl.log(weights_sum), all_max + tl.log(all_sum)
    tl.store(saved + sample * 2 * PIXELS + pixel, weights, mask=mask)
    tl.store(saved + (sample * 2 + 1) * PIXELS + pixel, both, mask=mask)
    nll = weights - both
    tl.store(nats + sample * TILES + tile, tl.sum(tl.where(mask & ~(nll < 0.0), nll, 0.0), 0))  # NaN stays


@triton.jit
def _complement(a):
    """s(-a), the slope of log s(a)."""
    q = tl.exp(-tl.abs(a))
    return tl.where(a > 0.0, q, 1.0) / (1.0 + q)


@triton.jit
def _mixture_nll_backward(
    parameters, image, saved, gradient, out, STRIDE, PIXELS, p_sample, p_channel, p_pixel, i_sample, i_channel, i_pixel,
    K: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, pixel = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < PIXELS
    at, of_image = parameters + sample * p_sample + pixel * p_pixel, image + sample * i_sample + pixel * i_pixel
    to = out + sample * p_sample + pixel * p_pixel
    weights = tl.load(saved + sample * 2 * PIXELS + pixel, mask=mask, other=0.0)
    both = tl.load(saved + (sample * 2 + 1) * PIXELS + pixel, mask=mask, other=0.0)
    weight = tl.load(gradient + sample * STRIDE).to(tl.float32)
    weight = tl.where(both > weights, 0.0, weight)  # a mass rounded to above 1 counts as 1
    for k in range(K):
        logit = tl.load(at + k * p_channel, mask=mask, other=0.0).to(tl.float32)
        joint = logit
        for c in tl.static_range(C):
            level = _level(of_image + c * i_channel, mask)
            above, below, width, _ = _standard(at, (K + c * K + k) * p_channel, C * K * p_channel, level, mask)
            joint += _log_mass(level, above, below, width)
        share = tl.exp(joint - both)
        slope = weight * (tl.exp(logit - weights) - share)
        tl.store(to + k * p_channel, slope.to(out.dtype.element_ty), mask=mask)
        share = -weight * share
        for c in tl.static_range(C):
            level = _level(of_image + c * i_channel, mask)
            mean = (K + c * K + k) * p_channel
            above, below, width, within = _standard(at, mean, C * K * p_channel, level, mask)
            upper = tl.where(level >= 255.0, 0.0, _complement(above))
            lower = tl.where(level <= 0.0, 0.0, _complement(below))
            edge = (level <= 0.0) | (level >= 255.0)
            narrower = tl.where(edge, 0.0, width * tl.exp(-width) / _width(width))
            slope = share * 127.5 * width * (lower - upper)
            tl.store(to + mean, slope.to(out.dtype.element_ty), mask=mask)
            slope = tl.where(within, -share * (above * upper + below * lower + narrower), 0.0)
            tl.store(to + mean + C * K * p_channel, slope.to(out.dtype.element_ty), mask=mask)


def _sizes(parameters: Tensor, image: Tensor) -> tuple[int, int, int]:
    """Pixels, tiles, and channels of the image."""
    pixels = math.prod(parameters.shape[2:])
    return pixels, -(-pixels // _BLOCK), image.shape[1]


@torch.library.custom_op("tandem::logistic_mixture_nll", mutates_args=())
def _forward(parameters: Tensor, image: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """Nats (B,), and log-sum-exps for the backward (B, 2, pixels)."""
    parameters, image = dense(parameters), dense(image)
    pixels, tiles, channels = _sizes(parameters, image)
    nats = torch.empty((len(parameters), tiles), dtype=torch.float32, device=parameters.device)
    saved = nats.new_empty((len(parameters), 2, pixels))
    if nats.numel():
        _mixture_nll[(len(parameters), tiles)](
            parameters, image, nats, saved, pixels, tiles, *strides(parameters), *strides(image), K=components,
            C=channels, BLOCK=_BLOCK, num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return nats.sum(1), saved


@_forward.register_fake
def _(parameters: Tensor, image: Tensor, components: int) -> tuple[Tensor, Tensor]:
    batch, pixels = len(parameters), _sizes(parameters, image)[0]
    return parameters.new_empty(batch, dtype=torch.float32), parameters.new_empty(
        (batch, 2, pixels), dtype=torch.float32
    )


@torch.library.custom_op("tandem::logistic_mixture_nll_backward", mutates_args=())
def _backward(parameters: Tensor, image: Tensor, saved: Tensor, gradient: Tensor, components: int) -> Tensor:
    """The gradient of the parameters; gradient (B,), of any stride."""
    parameters, image = dense(parameters), dense(image)
    pixels, tiles, channels = _sizes(parameters, image)
    out = torch.empty_like(parameters)
    if out.numel():
        _mixture_nll_backward[(len(parameters), tiles)](
            parameters, image, saved, gradient, out, gradient.stride(0), pixels, *strides(parameters),
            *strides(image), K=components, C=channels, BLOCK=_BLOCK, num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return out


@_backward.register_fake
def _(parameters: Tensor, image: Tensor, saved: Tensor, gradient: Tensor, components: int) -> Tensor:
    return torch.empty_like(dense(parameters))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    parameters, image, ctx.components = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(parameters, image, output[1])


def _gradients(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, None, None]:
    parameters, image, saved = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph: the plain formula's, which has derivatives of its own
        nats = _plain(parameters, image, ctx.components)
        return torch.autograd.grad(nats, parameters, gradient, create_graph=True)[0], None, None
    return _backward(parameters, image, saved, gradient, ctx.components), None, None


_forward.register_autograd(_gradients, setup_context=_save)

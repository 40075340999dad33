"""Negative log-likelihoods of images whose elements are independent: Laplace, Gaussian, Charbonnier, Bernoulli.

Each takes what the decoder gives and the image, (B, C, H, W), and returns nats, float32 (float64 stays), (B,), summed
over C, H and W. The plain formula is differentiable any number of times; the kernel reads both tensors once, with no
intermediate: 4 bytes an element forward and 6 backward in bfloat16, where eager moves about 40 under autocast.

The backward reads them again. A forward that stored the gradient too would need each sample's weight beforehand, or a
third pass that scales what it stored: 6 bytes at best and 10 at worst, against 10; and it could not run twice.
"""

import math
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from trainer.kernels.choose import Impl, choose, compiled
from trainer.kernels.program import dense, like, tl, triton

Kind = Literal["laplace", "gaussian", "charbonnier", "bernoulli"]
_BLOCK = 2048  # elements of a program: 16 a thread
_WARPS = 4
_MOST = 65535 * _BLOCK  # elements of a sample: tiles are the grid's second dimension


def laplace_nll(
    median: Tensor, image: Tensor, log_scale: Tensor | None = None, *, scale: float = 1.0, impl: Impl | None = None
) -> Tensor:
    """|image - median| / s + log 2 s, with s = scale * exp(log_scale), log_scale (B,). L1 is that less N log 2."""
    return _density("laplace", median, image, log_scale, scale, 0.0, impl)


def gaussian_nll(
    mean: Tensor, image: Tensor, log_scale: Tensor | None = None, *, scale: float = 1.0, impl: Impl | None = None
) -> Tensor:
    """((image - mean) / s)^2 / 2 + log s + log(2 pi) / 2, with s = scale * exp(log_scale), log_scale (B,)."""
    return _density("gaussian", mean, image, log_scale, scale, 0.0, impl)


def charbonnier_nll(
    centre: Tensor,
    image: Tensor,
    log_scale: Tensor | None = None,
    *,
    softness: float,
    scale: float = 1.0,
    impl: Impl | None = None,
) -> Tensor:
    """sqrt(u^2 + softness^2) + log(2 s softness K1(softness)), with u = (image - centre) / s and s = scale *
    exp(log_scale), log_scale (B,). K1 is the modified Bessel function of the second kind."""
    return _density("charbonnier", centre, image, log_scale, scale, softness, impl)


def bernoulli_nll(logits: Tensor, image: Tensor, *, impl: Impl | None = None) -> Tensor:
    """The cross entropy of white with probability sigmoid(logits) and of white with probability (image + 1) / 2."""
    return _density("bernoulli", logits, image, None, 1.0, 0.0, impl)


def _density(
    kind: Kind,
    prediction: Tensor,
    image: Tensor,
    log_scale: Tensor | None,
    scale: float,
    softness: float,
    impl: Impl | None,
) -> Tensor:
    assert prediction.shape == image.shape, f"{tuple(prediction.shape)} of {tuple(image.shape)}"
    assert log_scale is None or log_scale.shape == prediction.shape[:1], "one log-scale a sample"
    picked = choose("reconstruction", prediction, impl=impl, unfit=lambda: _unfit(prediction, image, log_scale))
    if picked == "triton":
        prediction, image = _aligned(prediction, image)
        nats: Tensor = _forward(prediction, image, log_scale, kind, scale, softness)[0]
        return nats
    formula = compiled(_plain) if picked == "compiled" else _plain
    return formula(prediction, image, log_scale, kind, scale, softness)


def _unfit(prediction: Tensor, image: Tensor, log_scale: Tensor | None) -> str | None:
    if image.requires_grad:
        return "the image wants a gradient"
    if image.dtype == torch.float64 or (log_scale is not None and log_scale.dtype == torch.float64):
        return "float64 is for references"
    if not (prediction.is_floating_point() and image.is_floating_point()):
        return "integers"
    if prediction.dim() != 4:
        return f"{prediction.dim()} dimensions, not 4"
    return f"more than {_MOST} elements a sample" if prediction[:1].numel() > _MOST else None


# ------------------------------------------------------------------------------------------------- plain formula
def _plain(
    prediction: Tensor, image: Tensor, log_scale: Tensor | None, kind: Kind, scale: float, softness: float
) -> Tensor:
    """The definition. What belongs to a whole sample multiplies its sum and not its elements."""
    prediction, image = full(prediction), full(image)
    if kind == "bernoulli":  # torch's form is the fastest of those tried on CPU: trainer/losses/README.md
        target = torch.rsub(image, 0.5, alpha=-0.5)
        return total(functional.binary_cross_entropy_with_logits(prediction, target, reduction="none"))
    log = math.log(scale) if log_scale is None else math.log(scale) + full(log_scale)
    if kind == "laplace":
        sums = total((prediction - image).abs()) * _exp(-log)
    elif kind == "gaussian":
        sums = total(functional.mse_loss(prediction, image, reduction="none")) * (0.5 * _exp(-2.0 * log))
    else:
        soft = softness * _exp(log)
        soft = soft.view(-1, 1, 1, 1) if isinstance(soft, Tensor) else soft
        squares = functional.mse_loss(prediction, image, reduction="none")
        sums = total((squares + soft**2).sqrt() - soft) * _exp(-log)
    return sums + math.prod(image.shape[1:]) * (log + _constant(kind, softness))


def _constant(kind: Kind, softness: float) -> float:
    """What an element costs at its centre, at scale 1."""
    if kind == "charbonnier":
        constant: float = log_normaliser(softness)
        return constant
    return {"laplace": math.log(2.0), "gaussian": 0.5 * math.log(2.0 * math.pi), "bernoulli": 0.0}[kind]


@torch.compiler.assume_constant_result
def log_normaliser(softness: float) -> float:
    """log of the integral of exp(softness - sqrt(u^2 + softness^2)) over u: log(2 softness e^softness K1(softness))."""
    return _log_normaliser(softness)


@lru_cache(maxsize=64)
def _log_normaliser(softness: float) -> float:
    at = torch.tensor(softness, dtype=torch.float64, device="cpu")
    return math.log(2.0 * softness * float(torch.special.scaled_modified_bessel_k1(at)))


def full(x: Tensor) -> Tensor:
    """float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def total(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B,); over dimensions, so that channels-last memory is not copied."""
    return x.sum((1, 2, 3))


def _exp(x: Tensor | float) -> Tensor | float:
    return x.exp() if isinstance(x, Tensor) else math.exp(x)


# ------------------------------------------------------------------------------------------------------- kernels
@triton.jit
def log1p(q):
    """log(1 + q) for q in [0, 1], exact where 1 + q rounds."""
    w = 1.0 + q
    return tl.where(w == 1.0, q, tl.log(w) * (q / tl.where(w == 1.0, 1.0, w - 1.0)))


@triton.jit
def _inverse(log_scale, sample, INVERSE):
    """1 / s of a sample; in float64, once a program, for exp's float32 form is off by more than a sum is."""
    if log_scale is None:
        return INVERSE
    else:
        return (INVERSE * tl.exp(-tl.load(log_scale + sample).to(tl.float64))).to(tl.float32)


@triton.jit
def _density_nll(
    prediction, image, log_scale, nats, slopes, N, TILES, INVERSE, CONSTANT, SOFTNESS, KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Partial sums of a tile: its nats, and where the scale is learned also u * d nats / du, which is its gradient."""
    sample, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    element = tile * BLOCK + tl.arange(0, BLOCK)
    mask = element < N
    a = tl.load(prediction + sample * N + element, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(image + sample * N + element, mask=mask, other=0.0).to(tl.float32)
    if KIND == "bernoulli":
        q = tl.exp(-tl.abs(a))
        # log(1 + e^a) - a t, in which nothing of the size of a is lost: max(a, 0) - a t is a (1 - t) or -a t
        value = tl.where(a > 0.0, a * (0.5 - 0.5 * x), a * (-0.5 - 0.5 * x)) + log1p(q)
        each = 0.0
    else:
        u = (a - x) * _inverse(log_scale, sample, INVERSE)
        if KIND == "laplace":
            value = tl.abs(u)
            slope = value
        elif KIND == "gaussian":
            value = 0.5 * u * u
            slope = u * u
        else:
            squares = u * u
            far = squares == float("inf")  # where the formulas below are inf / inf
            r = tl.sqrt(tl.where(far, 1.0, squares + SOFTNESS * SOFTNESS))
            value = tl.where(far, squares, squares / (r + SOFTNESS))  # r - softness, without what that would cancel
            slope = tl.where(far, squares, squares / r)
        each = CONSTANT
        if log_scale is not None:
            each += tl.load(log_scale + sample).to(tl.float32)
            tl.store(slopes + sample * TILES + tile, tl.sum(tl.where(mask, slope, 0.0), 0))
    constant = each * tl.minimum(N - tile * BLOCK, BLOCK).to(tl.float32)
    tl.store(nats + sample * TILES + tile, tl.sum(tl.where(mask, value, 0.0), 0) + constant)


@triton.jit
def _density_nll_backward(
    prediction, image, log_scale, gradient, out, STRIDE, N, INVERSE, SOFTNESS, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    sample = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = element < N
    a = tl.load(prediction + sample * N + element, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(image + sample * N + element, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(gradient + sample * STRIDE).to(tl.float32)
    if KIND == "bernoulli":
        q = tl.exp(-tl.abs(a))
        slope = tl.where(a < 0.0, q, 1.0) / (1.0 + q) - (0.5 * x + 0.5)
    else:
        inverse = _inverse(log_scale, sample, INVERSE)
        u = (a - x) * inverse
        weight *= inverse
        if KIND == "laplace":
            slope = tl.where(u > 0.0, 1.0, tl.where(u < 0.0, -1.0, u))  # NaN stays
        elif KIND == "gaussian":
            slope = u
        else:
            slope = u / tl.sqrt(u * u + SOFTNESS * SOFTNESS)
    tl.store(out + sample * N + element, (weight * slope).to(out.dtype.element_ty), mask=mask)


def _sizes(prediction: Tensor) -> tuple[int, int]:
    """Elements of a sample, and its tiles."""
    count = math.prod(prediction.shape[1:])
    return count, -(-count // _BLOCK)


def _aligned(prediction: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one order of memory, the prediction's."""
    prediction = dense(prediction)
    return prediction, like(image, prediction)


@torch.library.custom_op("tandem::reconstruction_nll", mutates_args=())
def _forward(
    prediction: Tensor, image: Tensor, log_scale: Tensor | None, kind: str, scale: float, softness: float
) -> tuple[Tensor, Tensor]:
    """Nats (B,), and the tiles' shares (B, tiles) of the gradient of a learned scale."""
    prediction, image = _aligned(prediction, image)
    count, tiles = _sizes(prediction)
    nats = torch.empty((len(prediction), tiles), dtype=torch.float32, device=prediction.device)
    slopes = torch.empty_like(nats) if log_scale is not None else nats.new_empty(0)
    if nats.numel():
        constant = math.log(scale) + _constant(kind, softness)  # type: ignore[arg-type]
        _density_nll[(len(prediction), tiles)](
            prediction, image, None if log_scale is None else log_scale.contiguous(), nats, slopes, count, tiles,
            1.0 / scale, constant, softness, KIND=kind, BLOCK=_BLOCK, num_warps=_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return nats.sum(1), slopes


@_forward.register_fake
def _(
    prediction: Tensor, image: Tensor, log_scale: Tensor | None, kind: str, scale: float, softness: float
) -> tuple[Tensor, Tensor]:
    shape = (0,) if log_scale is None else (len(prediction), _sizes(prediction)[1])
    return prediction.new_empty(len(prediction), dtype=torch.float32), prediction.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("tandem::reconstruction_nll_backward", mutates_args=())
def _backward(
    prediction: Tensor,
    image: Tensor,
    log_scale: Tensor | None,
    gradient: Tensor,
    kind: str,
    scale: float,
    softness: float,
) -> Tensor:
    """The gradient of the prediction; gradient (B,), of any stride."""
    prediction, image = _aligned(prediction, image)
    count, tiles = _sizes(prediction)
    out = torch.empty_like(prediction)
    if out.numel():
        _density_nll_backward[(len(prediction), tiles)](
            prediction, image, None if log_scale is None else log_scale.contiguous(), gradient, out,
            gradient.stride(0), count, 1.0 / scale, softness, KIND=kind, BLOCK=_BLOCK, num_warps=_WARPS,
            enable_fp_fusion=True,
        )  # fmt: skip
    return out


@_backward.register_fake
def _(
    prediction: Tensor,
    image: Tensor,
    log_scale: Tensor | None,
    gradient: Tensor,
    kind: str,
    scale: float,
    softness: float,
) -> Tensor:
    return torch.empty_like(dense(prediction))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    prediction, image, log_scale, ctx.kind, ctx.scale, ctx.softness = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(prediction, image, log_scale, output[1])


def _gradients(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    prediction, image, log_scale, slopes = ctx.saved_tensors
    named = ctx.kind, ctx.scale, ctx.softness
    wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
    if torch.is_grad_enabled():  # create_graph: the plain formula's, which has derivatives of its own
        # each by itself: one may have been computed from the other
        prediction = prediction.view_as(prediction)
        log_scale = None if log_scale is None else log_scale.view_as(log_scale)
        inputs = [x for x, want in zip((prediction, log_scale), wanted, strict=True) if want]
        nats = _plain(prediction, image, log_scale, *named)
        found = iter(torch.autograd.grad(nats, inputs, gradient, create_graph=True))
        return next(found) if wanted[0] else None, None, next(found) if wanted[1] else None, None, None, None
    for_prediction = _backward(prediction, image, log_scale, gradient, *named) if wanted[0] else None
    for_scale = None
    if wanted[1]:
        for_scale = ((math.prod(prediction.shape[1:]) - slopes.sum(1)) * gradient).to(log_scale.dtype)
    return for_prediction, None, for_scale, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)

"""The posterior's sample and its KL, from the encoder's moments in one go (Kingma and Welling 2014, eq. 4 and appendix
B).

The kernel reads the moments once, whole, draws the noise itself (noise.py), and draws it again in the backward pass:
neither the noise nor a half of the moments is ever in memory. Inside and out everything is float32, and float64 stays:
the sample is small, and whoever wants it in half precision (a convolution under autocast) rounds it once.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor

from trainer.kernels.choose import Impl, choose, compiled
from trainer.kernels.noise import four_in_turn, normal_at, normals, philox
from trainer.kernels.program import channels_last, dense, like, tl, triton

LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0
"""Of the clamp (Rombach et al. 2022, their DiagonalGaussianDistribution): everything is finite, and a value beyond gets
no gradient."""
_TILE = 1024  # elements of a program


def reparameterize_kl(moments: Tensor, noise: Tensor, *, impl: Impl | None = None) -> tuple[Tensor, Tensor]:
    """A sample z (B, z, ...) of the posterior, and KL(q(z|x) || N(0, 1)) in nats, (B,): float32 both.

    moments: (B, 2z, ...), of any float dtype and in any memory format: mean, then logvar, which is clamped. noise: its
    address, int64 (B, 3), where value i of a sample is element i of its (z, ...) whatever lies where; or the standard
    normals themselves, float (B, z, ...)."""
    drawn = noise.is_floating_point()
    assert moments.shape[1] % 2 == 0, f"{moments.shape[1]} channels are no mean and logvar"
    assert noise.shape == ((len(moments), *_latent(moments)) if drawn else (len(moments), 3)), "noise of other samples"
    picked = choose(
        "reparameterize_kl",
        moments,
        impl=impl,
        unfit=lambda: "the noise is drawn already" if drawn else _unfit(moments),
    )
    if picked == "triton":
        z, kl = _fused(moments, noise)
        return z, kl
    eps = noise if drawn else normal_at(noise, _latent(moments))
    return (compiled(_plain) if picked == "compiled" else _plain)(moments, eps)


def posterior(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and logvar of moments (B, 2z, ...), each (B, z, ...) and float32 at least, logvar clamped."""
    mean, logvar = (moments if moments.dtype == torch.float64 else moments.float()).chunk(2, dim=1)
    return mean, logvar.clamp(LOGVAR_MIN, LOGVAR_MAX)


def _plain(moments: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    mean, logvar = posterior(moments)
    z = torch.addcmul(mean, (0.5 * logvar).exp(), eps.to(mean.dtype))
    # expm1: exact near logvar 0, where the prior is
    return z, 0.5 * (mean.square() + torch.expm1(logvar) - logvar).flatten(1).sum(1)


def _latent(moments: Tensor) -> tuple[int, ...]:
    """Shape of one latent."""
    channels, *places = moments.shape[1:]
    return (channels // 2, *places)


def _unfit(moments: Tensor) -> str | None:
    if moments[:1].numel() >= 2**31:
        return "a sample has 2^31 moments or more"
    if _launch(_laid(moments[:1]), _TILE)[0][1] > 65535:
        return "a sample has more tiles than a grid has"
    return None


# ---------------------------------------------------------------------------------------------------------- kernels
@triton.jit
def _excess(v):
    """e^v - 1 - v, without cancellation near 0: eleven terms, then no more than half of e^v cancels."""
    s = 1 / 3628800 + v * (1 / 39916800)
    s = 1 / 40320 + v * (1 / 362880 + v * s)
    s = 1 / 720 + v * (1 / 5040 + v * s)
    s = 1 / 24 + v * (1 / 120 + v * s)
    s = 0.5 + v * (1 / 6 + v * s)
    return tl.where(tl.abs(v) < 1.0, v * v * s, tl.exp(v) - 1.0 - v)


@triton.jit
def _drawn(address, sample, N, C: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr):
    """Noise of a program's elements: (TILE,) of the flat latent or, where C > 0, (CHANNELS, pixels)."""
    quad = tl.program_id(1) * (TILE // CHANNELS // 4) + tl.arange(0, TILE // CHANNELS // 4)
    if C > 0:
        quad = tl.arange(0, CHANNELS)[:, None] * (N // C // 4) + quad[None, :]
    a, b, c, d = philox(address, sample, quad)
    w, x = normals(a, b)
    y, z = normals(c, d)
    return four_in_turn(w, x, y, z)


@triton.jit
def _places(N, HW, Z, C: tl.constexpr, CHANNELS: tl.constexpr, APART: tl.constexpr, TILE: tl.constexpr):
    """Where these elements lie in the latent and in the mean, how far from there the logvar is, and which exist."""
    element = tl.program_id(1) * (TILE // CHANNELS) + tl.arange(0, TILE // CHANNELS)
    if C > 0:  # channels last, in whole pixels: along the channels, as memory runs
        channel, pixel = tl.arange(0, CHANNELS)[:, None], element[None, :]
        inside = pixel < N // C
        if CHANNELS != C:
            inside = inside & (channel < C)
        latent, mean, further = pixel * C + channel, pixel * (2 * C) + channel, C
    elif APART:  # channels last, where four values in a row may belong to two channels
        channel, pixel = element // HW, element % HW
        inside = element < N
        latent, mean, further = pixel * Z + channel, pixel * (2 * Z) + channel, Z
    else:
        inside = element < N
        latent, mean, further = element, element, N
    return latent, mean, further, inside


@triton.jit
def _sample_kl(
    moments, address, z, partial, N, HW, Z, LO, HI,
    C: tl.constexpr, CHANNELS: tl.constexpr, APART: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    eps = _drawn(address, sample, N, C, CHANNELS, TILE)
    out, place, further, inside = _places(N, HW, Z, C, CHANNELS, APART, TILE)
    moments += sample * (2 * N) + place
    mean = tl.load(moments, mask=inside, other=0.0).to(tl.float32)
    raw = tl.load(moments + further, mask=inside, other=0.0).to(tl.float32)
    logvar = tl.where(raw < LO, LO, tl.where(raw > HI, HI, raw))  # NaN stays
    tl.store(z + sample * N + out, mean + tl.exp(0.5 * logvar) * eps, mask=inside)
    nats = tl.where(inside, 0.5 * (mean * mean + _excess(logvar)), 0.0)
    tl.store(partial + sample * tl.num_programs(1) + tl.program_id(1), tl.sum(nats))


@triton.jit
def _sample_kl_backward(
    moments, address, z_gradient, kl_gradient, found, N, HW, Z, LO, HI,
    C: tl.constexpr, CHANNELS: tl.constexpr, APART: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    eps = _drawn(address, sample, N, C, CHANNELS, TILE)
    out, place, further, inside = _places(N, HW, Z, C, CHANNELS, APART, TILE)
    moments += sample * (2 * N) + place
    mean = tl.load(moments, mask=inside, other=0.0).to(tl.float32)
    raw = tl.load(moments + further, mask=inside, other=0.0).to(tl.float32)
    logvar = tl.where(raw < LO, LO, tl.where(raw > HI, HI, raw))
    g = tl.load(z_gradient + sample * N + out, mask=inside, other=0.0).to(tl.float32)
    k = tl.load(kl_gradient + sample).to(tl.float32)
    of_logvar = 0.5 * (g * eps * tl.exp(0.5 * logvar) + k * (_excess(logvar) + logvar))
    of_logvar = tl.where((raw >= LO) & (raw <= HI), of_logvar, 0.0)  # as torch.clamp
    found += sample * (2 * N) + place
    tl.store(found, (g + k * mean).to(found.dtype.element_ty), mask=inside)
    tl.store(found + further, of_logvar.to(found.dtype.element_ty), mask=inside)


def _laid(moments: Tensor) -> Tensor:
    """moments themselves where the kernels take their layout, else a contiguous copy."""
    return dense(moments) if moments.dim() == 4 else moments.contiguous()


def _launch(laid: Tensor, tile: int) -> tuple[tuple[int, int], dict[str, Any]]:
    """(grid, arguments that forward and backward share) for `_laid` moments."""
    channels, *sides = _latent(laid)
    places = prod(sides)
    last, width = laid.dim() == 4 and channels_last(laid), triton.next_power_of_2(channels)
    whole = last and places % 4 == 0 and 4 * width <= tile  # quads of noise then stay within a channel
    if not whole:
        width = 1
    return (len(laid), triton.cdiv(places if whole else channels * places, tile // width)), {
        "N": channels * places,
        "HW": places,
        "Z": channels,
        "LO": LOGVAR_MIN,
        "HI": LOGVAR_MAX,
        "C": channels if whole else 0,
        "CHANNELS": width,
        "APART": last and not whole,
        "TILE": tile,
        # every layout rounds alike, and every version of triton
        "num_warps": 8 if last and not whole else 4,  # whose places take more registers
        "enable_fp_fusion": False,
    }


def _sample_like(laid: Tensor, shape: tuple[int, ...]) -> Tensor:
    last = laid.dim() == 4 and channels_last(laid)
    form = torch.channels_last if last else torch.contiguous_format
    return torch.empty((len(laid), *shape), dtype=torch.float32, device=laid.device, memory_format=form)


@torch.library.custom_op("tandem::reparameterize_kl", mutates_args=())
def _fused(moments: Tensor, address: Tensor, tile: int = _TILE) -> tuple[Tensor, Tensor]:
    laid = _laid(moments)
    z, (grid, arguments) = _sample_like(laid, _latent(laid)), _launch(laid, tile)
    partial = torch.empty(grid, dtype=torch.float32, device=laid.device)
    if z.numel():
        _sample_kl[grid](laid, address.contiguous(), z, partial, **arguments)
    return z, partial.sum(1)


@_fused.register_fake
def _(moments: Tensor, address: Tensor, tile: int = _TILE) -> tuple[Tensor, Tensor]:
    laid = _laid(moments)
    return _sample_like(laid, _latent(laid)), laid.new_empty((len(laid),), dtype=torch.float32)


@torch.library.custom_op("tandem::reparameterize_kl_backward", mutates_args=())
def _fused_backward(
    moments: Tensor, address: Tensor, z_gradient: Tensor, kl_gradient: Tensor, tile: int = _TILE
) -> Tensor:
    laid = _laid(moments)
    found, (grid, arguments) = torch.empty_like(laid), _launch(laid, tile)
    given = like(z_gradient, laid) if laid.dim() == 4 else z_gradient.contiguous()
    if found.numel():
        _sample_kl_backward[grid](laid, address.contiguous(), given, kl_gradient.contiguous(), found, **arguments)
    return found


@_fused_backward.register_fake
def _(moments: Tensor, address: Tensor, z_gradient: Tensor, kl_gradient: Tensor, tile: int = _TILE) -> Tensor:
    return torch.empty_like(_laid(moments))


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    moments, address, ctx.tile = inputs
    ctx.save_for_backward(moments, address)


def _gradient(ctx: Any, z_gradient: Tensor, kl_gradient: Tensor) -> tuple[Tensor, None, None]:
    moments, address = ctx.saved_tensors
    if not torch.is_grad_enabled():
        return _fused_backward(moments, address, z_gradient, kl_gradient, ctx.tile), None, None
    values = _plain(moments, normal_at(address, _latent(moments)))  # create_graph: the definition, differentiable again
    (found,) = torch.autograd.grad(values, moments, (z_gradient, kl_gradient), create_graph=True)
    return found, None, None


_fused.register_autograd(_gradient, setup_context=_save)

"""The operations of the table of tools/bench/losses.py: inputs, who computes them, and the bytes that none can avoid.

`plain` is the code that people have: what the lineage of latent diffusion, lpips and StyleGAN writes in torch, on a GPU
under autocast in the dtype of the inputs.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from math import prod

import torch
from torch import Tensor
from torch.nn import functional

from trainer.kernels import noise
from trainer.kernels.choose import Impl
from trainer.kernels.group_norm_silu import group_norm_silu
from trainer.kernels.logistic_mixture import logistic_mixture_nll
from trainer.kernels.lpips_head import lpips_head
from trainer.kernels.reconstruction import bernoulli_nll, charbonnier_nll, gaussian_nll, laplace_nll
from trainer.kernels.reparameterize import reparameterize_kl
from trainer.losses import adversarial

Tensors = tuple[Tensor, ...]
Formula = Callable[..., Tensor | Sequence[Tensor]]
FLOAT32 = {torch.float32: (1e-6, 2e-6), torch.float16: (1e-3, 1e-3), torch.bfloat16: (2**-8, 2**-8)}
"""Largest error against float64 of a value and of a gradient, as a share of the largest: that of rounding inputs and
outputs of arithmetic in float32."""
GROUPS, EPSILON = 32, 1e-6
LIKELIHOODS = ("laplace", "charbonnier", "gaussian", "bernoulli")
LONGER = 8.0


@dataclass(frozen=True)
class Case:
    """One operation at one size, dtype and layout."""

    op: str
    shape: str
    dtype: torch.dtype
    layout: str
    make: Callable[[torch.Generator], Tensors]
    """Inputs, float32 on the CPU."""
    ours: Formula
    """(*inputs, impl=) -> a tensor or several."""
    plain: Formula | None
    forward: int
    """Bytes that a forward reads and writes at least."""
    backward: int
    """And a backward; 0 where there is none."""
    elements: int
    """That `saved bytes an element` refers to."""
    leaves: tuple[int, ...] = (0,)
    """Inputs that take a gradient."""
    weights: tuple[int, ...] = ()
    """Inputs that are there anyway; float32 whatever the dtype."""
    tolerance: tuple[float, float] | None = None
    """Where it is not that of FLOAT32."""
    others: dict[str, Formula] = field(default_factory=dict)
    """Further implementations, by name."""
    comparable: tuple[bool, bool] = (True, True)
    """Whether `plain` has the same value and gradient: not where it draws its own numbers, or leaves out a constant."""

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape} {str(self.dtype).removeprefix('torch.')} {self.layout}"

    def allowed(self, impl: str) -> tuple[float, float]:
        """Largest error of value and gradient. torch's own sums run in fewer parts than a kernel's, and round more."""
        value, gradient = FLOAT32[self.dtype] if self.tolerance is None else self.tolerance
        wider = LONGER if impl != "triton" and self.dtype == torch.float32 else 1.0
        return wider * value, wider * gradient

    def inputs(self, device: torch.device, *, double: bool = False) -> Tensors:
        """On the device, leaves that require a gradient where they take one; double: the same values in float64."""
        found = []
        for number, made in enumerate(self.make(torch.Generator().manual_seed(0))):
            taken = made.to(self.dtype) if made.is_floating_point() and number not in self.weights else made
            taken = taken.to(device, torch.float64 if double and made.is_floating_point() else taken.dtype)
            if taken.dim() == 4 and self.layout == "channels_last":
                taken = taken.contiguous(memory_format=torch.channels_last)
            found.append(taken.requires_grad_(self.backward > 0 and number in (*self.leaves, *self.weights)))
        return tuple(found)


def cases(device: str, *, quick: bool) -> Iterator[Case]:
    """All of them, the largest of every operation first; on a CPU 64 MiB at most, where a copy still has one speed."""
    cuda = device == "cuda"
    low = torch.bfloat16 if cuda else torch.float32
    if quick:
        norms, heads = [((1, 32, 8, 8), low)], [((2, 16, 8, 8), low)]
        images, latents = [(2, 3, 16, 16)], [(2, 4, 8, 8)]
    elif cuda:
        norms = [((8, 128, 256, 256), low), ((8, 256, 128, 128), low), ((8, 512, 64, 64), low), ((8, 512, 32, 32), low)]
        norms += [((2, 128, 256, 256), torch.float32), ((64, 64, 32, 32), low)]
        heads = [((8, 64, 256, 256), low), ((8, 512, 16, 16), low)]
        images, latents = [(64, 3, 256, 256), (8, 3, 256, 256), (64, 1, 28, 28)], [(64, 16, 64, 64), (8, 4, 32, 32)]
    else:
        norms = [((2, 128, 96, 96), low), ((8, 32, 14, 14), low), ((2, 128, 64, 64), torch.bfloat16)]
        heads = [((2, 64, 96, 96), low)]
        images, latents = [(16, 3, 128, 128), (64, 1, 28, 28)], [(16, 16, 64, 64), (8, 4, 32, 32)]
    mixed = (2, 3, 8, 8) if quick else (8, 3, 64, 64) if cuda else (4, 3, 64, 64)
    first = _norm(*norms[0])
    groups = [
        [first, replace(first, layout="contiguous"), *(_norm(*norm) for norm in norms[1:])],
        [_head(*head) for head in heads],
        [_posterior(shape, low) for shape in latents],
        *([_likelihood(kind, shape, low) for shape in images] for kind in LIKELIHOODS),
        [_noise(shape) for shape in latents],
        # tails of the mixture: eager's own error
        [replace(_likelihood("logistic mixture", mixed, torch.float32), tolerance=(1e-5, 1e-3))],
        *([_game(name, (8, 30, 30))] for name in ("hinge", "relativistic")),
    ]
    for row in zip_longest(*groups):
        yield from (case for case in row if case is not None)


def _size(shape: Sequence[int], dtype: torch.dtype) -> int:
    return prod(shape) * dtype.itemsize


# ---------------------------------------------------------------------------------------------- norm and activation
def _norm(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    def make(generator: torch.Generator) -> Tensors:
        weight, bias = torch.randn((2, shape[1]), generator=generator).mul(0.2).unbind()
        return torch.randn(shape, generator=generator) * 1.5 + 0.5, 1.0 + weight, bias.clone()

    def ours(x: Tensor, weight: Tensor, bias: Tensor, *, impl: Impl) -> Tensor:
        return group_norm_silu(x, GROUPS, weight, bias, EPSILON, impl=impl)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if x.device.type == "cpu":  # has no autocast for it: mixed dtypes are refused or slow
            weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        return functional.silu(functional.group_norm(x, GROUPS, weight, bias, EPSILON))

    size = _size(shape, dtype)
    # statistics come before the first output, sums before the first gradient: x is read twice, x and g are
    return Case(
        "group_norm_silu", _told(shape), dtype, "channels_last", make, ours, plain,
        forward=3 * size, backward=5 * size, elements=prod(shape), weights=(1, 2), others=_other_norms(shape),
    )  # fmt: skip


def _other_norms(shape: tuple[int, ...]) -> dict[str, Formula]:
    """Kernels of other packages, where they are installed."""
    found: dict[str, Formula] = {}
    if not torch.cuda.is_available():
        return found
    try:
        from apex.contrib.group_norm import GroupNorm  # type: ignore[import-not-found]

        module = GroupNorm(GROUPS, shape[1], eps=EPSILON, act="silu", device="cuda")

        def apex(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            module.weight, module.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
            out: Tensor = module(x)
            return out

        found["apex"] = apex
    except ImportError:
        pass
    try:
        from liger_kernel.ops.group_norm import LigerGroupNormFunction  # type: ignore[import-not-found]

        def liger(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return functional.silu(LigerGroupNormFunction.apply(x, weight, bias, shape[1], GROUPS, EPSILON))

        found["liger"] = liger
    except ImportError:
        pass
    return found


# ---------------------------------------------------------------------------------------------- perceptual distance
def _head(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    def make(generator: torch.Generator) -> Tensors:
        a, b = torch.randn((2, *shape), generator=generator).relu().unbind()  # what a relu leaves
        return a, b, torch.rand((1, shape[1], 1, 1), generator=generator)

    def ours(a: Tensor, b: Tensor, weight: Tensor, *, impl: Impl) -> Tensor:
        return lpips_head([a], [b.detach()], [weight.detach()], impl=impl)

    def plain(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:  # lpips 0.1.4
        u, v = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in (a, b.detach()))
        return functional.conv2d((u - v).square(), weight.detach().to(u.dtype)).mean((2, 3)).flatten()

    size = _size(shape, dtype)
    return Case(
        "lpips_head", _told(shape), dtype, "channels_last", make, ours, plain,
        forward=2 * size, backward=3 * size, elements=2 * prod(shape), weights=(2,),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- latents and noise
def _posterior(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    def make(generator: torch.Generator) -> Tensors:
        mean, logvar = torch.randn((2, *shape), generator=generator).unbind()
        return torch.cat([mean, logvar - 2.0], 1), noise.address(0, "posterior", torch.arange(shape[0]))

    def ours(moments: Tensor, address: Tensor, *, impl: Impl) -> Sequence[Tensor]:
        return reparameterize_kl(moments, address, impl=impl)

    def plain(moments: Tensor, address: Tensor) -> Sequence[Tensor]:  # diffusers' DiagonalGaussianDistribution
        mean, logvar = moments.chunk(2, 1)
        logvar = logvar.clamp(-30.0, 20.0)
        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        return z, 0.5 * (mean.pow(2) + logvar.exp() - 1.0 - logvar).sum((1, 2, 3))

    size = _size(shape, dtype)
    return Case(
        "reparameterize_kl", _told(shape), dtype, "channels_last", make, ours, plain,
        forward=3 * size, backward=5 * size, elements=prod(shape), comparable=(False, False),
    )  # fmt: skip


def _noise(shape: tuple[int, ...]) -> Case:
    def make(generator: torch.Generator) -> Tensors:
        return (noise.address(0, "posterior", torch.arange(shape[0])),)

    def ours(address: Tensor, *, impl: Impl) -> Tensor:
        return noise.normal_at(address, shape[1:], impl=impl)

    def plain(address: Tensor) -> Tensor:
        return torch.randn(shape, device=address.device)

    size = _size(shape, torch.float32)
    return Case(
        "noise", _told(shape), torch.float32, "contiguous", make, ours, plain,
        forward=size, backward=0, elements=prod(shape), comparable=(False, False), tolerance=(1e-5, 0.0),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- losses
COMPONENTS, SOFTNESS = 10, 0.1
NLL: dict[str, Formula] = {
    "laplace": laplace_nll,
    "charbonnier": partial(charbonnier_nll, softness=SOFTNESS),
    "gaussian": gaussian_nll,
    "bernoulli": bernoulli_nll,
    "logistic mixture": partial(logistic_mixture_nll, components=COMPONENTS),
}
PLAIN: dict[str, Formula] = {
    "laplace": lambda given, image: functional.l1_loss(given, image, reduction="none"),
    "charbonnier": lambda given, image: ((given - image).square() + SOFTNESS**2).sqrt(),
    "gaussian": lambda given, image: 0.5 * functional.mse_loss(given, image, reduction="none"),
    "bernoulli": lambda given, image: functional.binary_cross_entropy_with_logits(
        given, image * 0.5 + 0.5, reduction="none"
    ),
}
"""An element's, without the constant: of the mixture every code base has its own."""


def _likelihood(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    mixture = kind == "logistic mixture"
    given = (shape[0], COMPONENTS * (1 + 2 * shape[1]) if mixture else shape[1], *shape[2:])

    def make(generator: torch.Generator) -> Tensors:
        levels = torch.randint(0, 256, shape, generator=generator)
        return torch.randn(given, generator=generator), levels / 127.5 - 1.0

    def ours(parameters: Tensor, image: Tensor, *, impl: Impl) -> Tensor | Sequence[Tensor]:
        return NLL[kind](parameters, image, impl=impl)

    def plain(parameters: Tensor, image: Tensor) -> Tensor:
        element = PLAIN[kind](parameters, image)
        assert isinstance(element, Tensor)
        return element.sum((1, 2, 3))

    both, one = _size(given, dtype) + _size(shape, dtype), _size(given, dtype)
    return Case(
        kind, _told(shape), dtype, "channels_last", make, ours, None if mixture else plain,
        forward=both, backward=both + one, elements=prod(shape), comparable=(kind == "bernoulli", True),
    )  # fmt: skip


def _game(name: str, shape: tuple[int, ...]) -> Case:
    """Plain torch for ever: a few thousand logits."""

    def make(generator: torch.Generator) -> Tensors:
        return (torch.randn((2 * shape[0], *shape[1:]), generator=generator),)

    def ours(logits: Tensor, *, impl: Impl) -> Tensor:
        if impl not in ("auto", "eager"):
            raise ValueError("a few thousand logits are for plain torch")
        return adversarial.LOSSES[name].discriminator(logits, shape[0]).loss  # and the accuracies

    def plain(logits: Tensor) -> Tensor:
        real, fake = logits.chunk(2)
        if name == "hinge":
            return (functional.relu(1.0 - real) + functional.relu(1.0 + fake)).mean((1, 2))
        return functional.softplus(fake - real).mean((1, 2))

    size = 2 * _size(shape, torch.float32)
    return Case(
        name, _told(shape), torch.float32, "contiguous", make, ours, plain,
        forward=size, backward=2 * size, elements=2 * prod(shape),
    )  # fmt: skip


def _told(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))

"""Gradient penalties: the norm of a discriminator's gradient over the whole image, one value a sample, no weights.

The caller applies gamma / 2 to R1 and R2, lambda to `wasserstein`, and the factor of a lazy interval. Patch logits
count as their mean. Float32 (or float64) and eager: autocast is refused or switched off, double backward needs both.
The discriminator's forward belongs inside `choose.differentiated_twice`, which makes its layers' derivatives cheap.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from trainer.kernels.convolution import bias_of, inputs_only

TINY = 1e-12  # under the root: finite gradient where the norm is 0; 2e-13 of a norm of 3
LINEAR = {  # nodes of an autograd graph that are linear where they do not bend
    "_ConvolutionBackward", "_AddBiasBackward", "_LeakyReLUBackward", "MmBackward0", "AddBackward0", "PermuteBackward0",
    "ViewBackward0", "ReshapeAliasBackward0", "UnsafeViewBackward0", "CloneBackward0", "SqueezeBackward1",
}  # fmt: skip


def r1(logits: Tensor, image: Tensor) -> Tensor:
    """|grad_x D(x)|^2 at real images (Mescheder et al. 2018, eq. 9), (B,).

    logits: (B,) or (B, h, w), computed from `image` (B, C, H, W), which requires a gradient; row i from image i."""
    return with_norms(logits, image, image)[1]


def r2(logits: Tensor, image: Tensor) -> Tensor:
    """|grad_x D(x)|^2 at generated images (Mescheder et al. 2018, eq. 10), (B,); arguments as for `r1`."""
    return with_norms(logits, image, image)[1]


def wasserstein(discriminator: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    """(|grad_x D(x)| - 1)^2 at x = mix * real + (1 - mix) * fake (Gulrajani et al. 2017, algorithm 1), (B,).

    mix: uniform in [0, 1), (B,): one number an image."""
    assert mix.shape == (len(real),), f"one interpolation weight an image, not {tuple(mix.shape)}"
    assert real.shape == fake.shape, f"{tuple(real.shape)} and {tuple(fake.shape)} cannot be mixed"
    with torch.autocast(device_type=real.device.type, enabled=False):
        weight = mix.to(real.dtype).view(-1, 1, 1, 1)
        image = torch.lerp(fake.detach(), real.detach(), weight).requires_grad_(True)
        squares = r1(discriminator(image), image)
    return ((squares + TINY).sqrt() - 1.0).square()


def with_norms(logits: Tensor, seen: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """The logits (B,) or (B, h, w), for a loss, and |grad_x D|^2 (B,) at `image`, for R1 and R2.

    seen (B, C, H, W): what the network saw, computed from `image`, or `image` itself, which requires a gradient.

    A network whose layers are linear but for bends (convolutions and LeakyReLU, no norm), with one logit an image, is
    D(x) = <grad D, x> + sum over layers of <grad of D at the layer's output, its bias>. Such logits come back with the
    same values, but differentiate that sum, so that loss and penalty pass the graph of grad D together and the graph
    of D is done with: 4 passes of the network's cost (forward, grad D, and two that differentiate it) in place of 6."""
    assert image.requires_grad, "the image must require a gradient before the discriminator sees it"
    assert not torch.is_autocast_enabled(image.device.type), "penalties are taken in float32"
    assert logits.dtype in (torch.float32, torch.float64), f"penalties are taken in float32, not {logits.dtype}"
    biased = _biases(logits, seen)
    biased = biased if logits.dim() == 1 else None
    verdict = logits if logits.dim() == 1 else logits.flatten(1).mean(1)
    edges = [] if biased is None else [GradientEdge(node, 0) for node, _ in biased]
    inputs: list[Any] = [image, *([] if biased is None or seen is image else [seen]), *edges]
    with inputs_only():  # rows are independent, so the gradient of the sum holds each row's own
        gradient, *others = torch.autograd.grad(verdict.sum(), inputs, create_graph=True)
    assert gradient.requires_grad, "the penalty trains nothing: the discriminator is frozen"
    if biased is not None:
        at_seen, *at_layers = (gradient, *others) if seen is image else others
        biases = [bias for _, bias in biased]
        logits = _ThroughGradient.apply(logits.detach(), seen.detach(), at_seen, *at_layers, *biases)  # type: ignore[no-untyped-call]
    return logits, gradient.square().sum((1, 2, 3))


def finite_difference(logits: Tensor, moved: Tensor, sigma: float) -> Tensor:
    """|D(x + sigma n) - D(x)|^2 / sigma^2, (B,), from the logits at x and at x + sigma n, n standard normal (aR1 of Lin
    et al. 2025, without 1 / sigma^2 there): an approximation of |grad D|^2 without a second derivative.

    Over n its mean is |grad D|^2 + sigma^2 (tr(H)^2 / 4 + |H|_F^2 / 2 + <grad D, grad tr H>) + O(sigma^4), with H the
    Hessian of D, and its deviation about sqrt(2) times its mean."""
    change = (moved - logits).float() if moved.dtype != torch.float64 else moved - logits
    return ((change if change.dim() == 1 else change.flatten(1).mean(1)) / sigma).square()


class _ThroughGradient(torch.autograd.Function):
    """D(x) = <grad D, x> + sum of <grad D at a layer, its bias>: the value is known, the gradient is the sum's."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, x: Tensor, gradient: Tensor, *rest: Tensor) -> Tensor:
        ctx.save_for_backward(x, *rest)
        return logits.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        x, *rest = ctx.saved_tensors
        layers, biases = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        at_layers, at_biases = [], []
        for layer, bias in zip(layers, biases, strict=True):
            ones = [1] * (layer.dim() - 2)
            at_layers.append((g.view(-1, 1, *ones) * bias.view(1, -1, *ones)).expand_as(layer))
            each = layer.flatten(2).sum(2) if layer.dim() > 2 else layer  # (B, out)
            at_biases.append((g.view(-1, 1) * each).sum(0))
        return None, None, g.view(-1, 1, 1, 1) * x, *at_layers, *at_biases


def _biases(logits: Tensor, seen: Tensor) -> list[tuple[Any, Tensor]] | None:
    """The nodes from `seen` to `logits` that add a bias, and that; None where a node is not known to be linear."""
    end = torch.autograd.graph.get_gradient_edge(seen).node
    assert logits.grad_fn is not None, "the penalty trains nothing: the discriminator is frozen"
    on_the_way: dict[Any, bool] = {end: True}  # whether a node leads to `seen`; others are made of weights
    waiting: list[Any] = [logits.grad_fn]
    while waiting:
        before = [node for node, _ in waiting[-1].next_functions if node is not None]
        unknown = [node for node in before if node not in on_the_way]
        if unknown:
            waiting += unknown
        else:
            on_the_way[waiting.pop()] = any(on_the_way[node] for node in before)
    del on_the_way[end]
    path = [node for node, leads in on_the_way.items() if leads]
    compiled = next((node.name() for node in path if "Compiled" in node.name()), None)
    assert compiled is None, (
        f"a part of the discriminator is compiled ({compiled}), and torch.compile knows no double backward "
        "(pytorch#91469): run it inside choose.differentiated_twice, past torch.compile"
    )
    for node in path:
        inputs = [before is end or on_the_way.get(before, False) for before, _ in node.next_functions]
        if node.name() not in LINEAR or not (all(inputs) if node.name() == "AddBackward0" else sum(inputs) == 1):
            return None
        if node._input_metadata[0].shape[0] != len(seen) or getattr(node, "_saved_dims", (0,))[0] != 0:
            return None  # a view or permutation under which row i is no longer of image i
    return [(node, bias) for node in path if (bias := bias_of(node)) is not None]

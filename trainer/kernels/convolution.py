"""Layers of discriminators, for gradient penalties: the derivatives of a convolution are convolutions, at any order.

torch's own double backward takes the weights' gradient by a convolution whose kernel is as large as a feature map, and
gives LeakyReLU's input a gradient of zeros, which then passes the whole network. The functions here are closed: each
derivative is one of the three of them, as in StyleGAN2's conv2d_gradfix (Karras et al. 2020), which ends at torch 1.11.
The layers take them inside `choose.differentiated_twice` only, and are torch's own everywhere else, names included.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.kernels.choose import is_differentiated_twice

_weights_wanted: list[bool] = [True]


class Geometry(NamedTuple):
    stride: tuple[int, int]
    padding: tuple[int, int]


@contextlib.contextmanager
def inputs_only() -> Iterator[None]:
    """Gradients taken inside reach inputs and no weights: what asks for gradients at images spares the weights'.
    (`ctx.needs_input_grad` tells what could have a gradient, not what autograd.grad was asked for.)"""
    before, _weights_wanted[0] = _weights_wanted[0], False
    try:
        yield
    finally:
        _weights_wanted[0] = before


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """As torch's; x (B, in, H, W), weight (out, in, h, w), bias (out,)."""
    out: Tensor = _Convolution.apply(x, weight, bias, Geometry(stride, padding))
    return out


def leaky_relu(x: Tensor, slope: float) -> Tensor:
    """As torch's, but where it bends it has no second derivative rather than one of zeros."""
    out: Tensor = _LeakyReLU.apply(x, slope)
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As torch's; x (B, in), weight (out, in), bias (out,)."""
    out: Tensor = _AddBias.apply(functional.linear(x, weight), bias)
    return out


def bias_of(node: Any) -> Tensor | None:
    """The bias that the function of this node of an autograd graph added, if it is one of this file's."""
    found: Tensor | None = getattr(node, "bias", None) if node.name() in WITH_BIAS else None
    return found


class Conv2d(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if _plain(input):
            out: Tensor = super()._conv_forward(input, weight, bias)
            return out
        assert self.groups == 1 and set(self.dilation) == {1} and self.padding_mode == "zeros", "not written for these"
        assert not isinstance(self.padding, str), "not written for padding by name"
        return conv2d(input, weight, bias, *((one[0], one[1]) for one in (self.stride, self.padding)))


class Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        plain = _plain(input) or input.dim() != 2
        return super().forward(input) if plain else linear(input, self.weight, self.bias)


class LeakyReLU(nn.LeakyReLU):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if _plain(input) else leaky_relu(input, self.negative_slope)


def _plain(x: Tensor) -> bool:
    return not is_differentiated_twice() or torch.is_autocast_enabled(x.device.type)


class _Convolution(torch.autograd.Function):
    """y = W * x + b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, at: Geometry) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias, ctx.at = bias, at
        return functional.conv2d(x, weight, bias, at.stride, at.padding)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        wanted = _weights_wanted[0]
        needs = [need and (i == 0 or wanted) for i, need in enumerate(ctx.needs_input_grad[:3])]
        if not torch.is_grad_enabled() and not _one_channel(x):
            return *_backward(g, x, weight, ctx.at, needs), None
        return (
            _InputGradient.apply(g, weight, x.detach(), ctx.at) if needs[0] else None,
            _WeightGradient.apply(g, x, weight.detach(), ctx.at) if needs[1] else None,
            g.sum((0, 2, 3)) if needs[2] else None,
            None,
        )


class _InputGradient(torch.autograd.Function):
    """dx of <g, W * x>."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, weight: Tensor, x: Tensor, at: Geometry) -> Tensor:
        ctx.save_for_backward(g, weight)  # of x only the shape counts
        ctx.at = at
        if _one_channel(x):
            columns = functional.conv2d(g, weight.permute(1, 2, 3, 0).reshape(-1, g.shape[1], 1, 1)).flatten(2)
            dx = functional.fold(columns, x.shape[2:], weight.shape[2:], padding=at.padding, stride=at.stride)
        else:
            dx = _backward(g, x, weight, at, (True, False, False))[0]
        return dx

    @staticmethod
    def backward(ctx: Any, gg: Tensor) -> Any:
        g, weight = ctx.saved_tensors
        needs, wanted = ctx.needs_input_grad, _weights_wanted[0]
        return (
            conv2d(gg, weight, None, *ctx.at) if needs[0] else None,
            _WeightGradient.apply(g, gg, weight.detach(), ctx.at) if needs[1] and wanted else None,
            None,
            None,
        )


class _WeightGradient(torch.autograd.Function):
    """dW of <g, W * x>."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, weight: Tensor, at: Geometry) -> Tensor:
        ctx.save_for_backward(g, x)
        ctx.at = at
        dw: Tensor = _backward(g, x, weight, at, (False, True, False))[1]
        return dw

    @staticmethod
    def backward(ctx: Any, gg: Tensor) -> Any:
        g, x = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return (
            conv2d(x, gg, None, *ctx.at) if needs[0] else None,
            _InputGradient.apply(g, gg, x.detach(), ctx.at) if needs[1] else None,
            None,
            None,
        )


class _AddBias(torch.autograd.Function):
    """y = u + b."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, bias: Tensor) -> Tensor:
        ctx.bias = bias
        return u + bias

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g, g.sum(0) if ctx.needs_input_grad[1] and _weights_wanted[0] else None


class _LeakyReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.slope = slope
        return functional.leaky_relu(x, slope)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.leaky_relu_backward(g, x.detach(), ctx.slope, False), None


WITH_BIAS = ("_ConvolutionBackward", "_AddBiasBackward")


def _backward(g: Tensor, x: Tensor, weight: Tensor, at: Geometry, mask: Sequence[bool]) -> tuple[Any, Any, Any]:
    found: tuple[Any, Any, Any] = torch.ops.aten.convolution_backward(
        g, x, weight, [weight.shape[0]], at.stride, at.padding, (1, 1), False, (0, 0), 1, mask
    )
    return found


def _one_channel(x: Tensor) -> bool:
    """Where oneDNN's input gradient takes four times as long as the sum over columns."""
    return x.shape[1] == 1 and x.device.type == "cpu"

"""What a kernel is given may be computed from one another, and must be of one size: neither ever gives garbage."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.kernels.tolerances import DEVICE
from trainer.kernels import noise
from trainer.kernels.group_norm_silu import group_norm_silu
from trainer.kernels.lpips_head import lpips_head
from trainer.kernels.reconstruction import charbonnier_nll, laplace_nll
from trainer.kernels.reparameterize import reparameterize_kl

X = noise.normal(0, "x", torch.arange(2, device=DEVICE), (16, 4, 4))
Y = noise.normal(0, "y", torch.arange(2, device=DEVICE), (16, 4, 4))
ROWS = noise.address(0, "posterior", torch.arange(2, device=DEVICE))


def optimal_scale(x: Tensor, impl: str) -> Tensor:
    """The scale that is best for the prediction (Rybkin et al. 2021)."""
    return laplace_nll(x, Y, 0.5 * (x - Y).square().mean((1, 2, 3)).log(), impl=impl)


def norm_by_its_input(x: Tensor, impl: str) -> Tensor:
    weight = x.mean((0, 2, 3))
    return group_norm_silu(x, 4, weight, weight.square(), 1e-6, impl=impl).square().sum((1, 2, 3))


def map_beside_its_function(x: Tensor, impl: str) -> Tensor:
    return lpips_head([x, x], [x.square() + Y, Y], None, impl=impl)


def posterior(x: Tensor, impl: str) -> Tensor:
    z, kl = reparameterize_kl(x, ROWS, impl=impl)
    return kl + z.square().sum((1, 2, 3))


@pytest.mark.parametrize("function", [optimal_scale, norm_by_its_input, map_beside_its_function, posterior])
def test_inputs_may_depend_on_each_other(function: Callable[[Tensor, str], Tensor]) -> None:
    """First and second derivatives, with a graph and without."""
    found = {}
    for impl in ("eager", "triton"):
        x = X.clone().requires_grad_()
        (plain,) = torch.autograd.grad(function(x, impl).sum(), x)
        (first,) = torch.autograd.grad(function(x, impl).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        found[impl] = (plain, first.detach(), second)
    for mine, true in zip(found["triton"], found["eager"], strict=True):
        assert float((mine - true).abs().max() / true.abs().max()) < 2e-5


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_inputs_of_other_sizes_are_no_inputs(impl: str) -> None:
    scale = torch.zeros(1, device=DEVICE)
    for call in (
        lambda: laplace_nll(X, Y, scale, impl=impl),
        lambda: laplace_nll(X, Y[:, :8], impl=impl),
        lambda: reparameterize_kl(X, ROWS[:1], impl=impl),
        lambda: reparameterize_kl(X[:, :3], ROWS, impl=impl),
        lambda: group_norm_silu(X, 4, X[0, :8, 0, 0], X[0, :8, 0, 0], 1e-6, impl=impl),
        lambda: lpips_head([X], [Y[:, :8]], None, impl=impl),
        lambda: noise.normal(0, "x", torch.arange(2, dtype=torch.int32, device=DEVICE), (3,), impl=impl),
    ):
        with pytest.raises(AssertionError):
            call()


def test_an_implementation_that_there_is_not_is_no_implementation() -> None:
    with pytest.raises(AssertionError, match="foo"):
        laplace_nll(X, Y, impl="foo")


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of numpy, which interprets
@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_an_infinite_error_costs_infinitely_much(impl: str) -> None:
    for far in (torch.inf, 1e25):  # the square of the latter is none in float32
        found = charbonnier_nll(torch.full_like(X, far), Y, softness=0.1, impl=impl)
        assert found.tolist() == [torch.inf] * len(X)

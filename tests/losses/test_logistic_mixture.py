"""The discretised mixture of logistics: a distribution over 256 levels, exact in the tails."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.losses.reconstruction import LogisticMixture

LEVELS = torch.arange(256).double() / 127.5 - 1.0


def level_masses(likelihood: LogisticMixture, one_pixel: torch.Tensor) -> torch.Tensor:
    """(256,): the probability of each level of one grey pixel with these parameters (P,)."""
    every = one_pixel.view(1, -1, 1, 1).expand(256, -1, 1, 1)
    return (-likelihood.nll(every, LEVELS.view(256, 1, 1, 1).to(one_pixel.dtype))).exp()


@settings(deadline=None)
@given(st.lists(st.floats(-12.0, 12.0), min_size=6, max_size=6))
def test_the_masses_of_256_levels_sum_to_one(values: list[float]) -> None:
    masses = level_masses(LogisticMixture(components=2), torch.tensor(values, dtype=torch.float64))
    assert (masses >= 0).all()
    assert masses.sum().item() == pytest.approx(1.0, abs=1e-9)


def test_a_bin_holds_the_difference_of_two_logistic_functions() -> None:
    mean, log = 0.1, -2.0
    found = level_masses(LogisticMixture(components=1), torch.tensor([0.0, mean, log], dtype=torch.float64))
    edge = ((torch.arange(257).double() - 0.5) / 127.5 - 1.0 - mean) / math.exp(log)
    edge[0], edge[-1] = -math.inf, math.inf
    torch.testing.assert_close(found, edge.sigmoid().diff())


def test_the_mixture_weighs_its_components() -> None:
    logits, means, scales = [math.log(1.0), math.log(3.0)], [-0.5, 0.5], [-3.0, -2.0]
    both = level_masses(LogisticMixture(components=2), torch.tensor([*logits, *means, *scales], dtype=torch.float64))
    single = [
        level_masses(LogisticMixture(components=1), torch.tensor([0.0, m, s], dtype=torch.float64))
        for m, s in zip(means, scales, strict=True)
    ]
    torch.testing.assert_close(both, 0.25 * single[0] + 0.75 * single[1])
    mean = LogisticMixture(components=2).mean(torch.tensor([*logits, *means, *scales]).view(1, 6, 1, 1))
    assert mean.item() == pytest.approx(0.25 * -0.5 + 0.75 * 0.5, abs=1e-6)


def test_colour_shares_the_component_and_nothing_else() -> None:
    k, rng = 3, torch.Generator().manual_seed(5)
    likelihood = LogisticMixture(components=k)
    given = torch.randn(1, likelihood.parameters(3), 1, 1, generator=rng, dtype=torch.float64)
    x = LEVELS[[3, 120, 255]].view(1, 3, 1, 1)
    flat = given.flatten()
    means, scales = flat[k : 4 * k].view(3, k), flat[4 * k :].view(3, k)
    by_component = flat[:k].log_softmax(0)
    for channel in range(3):
        level = int(((x.flatten()[channel] + 1) * 127.5).round())
        for component in range(k):
            one = torch.stack([torch.zeros(()).double(), means[channel, component], scales[channel, component]])
            by_component = by_component.clone()
            by_component[component] += level_masses(LogisticMixture(components=1), one)[level].log()
    torch.testing.assert_close(likelihood.nll(given, x), -by_component.logsumexp(0).view(1))


@pytest.mark.parametrize("scale", [-1e3, -7.0, 0.0, 1e3])
@pytest.mark.parametrize("mean", [-1e4, 0.0, 1e4])
def test_the_mixture_and_its_gradient_are_finite_far_out(mean: float, scale: float) -> None:
    given = torch.tensor([0.0, mean, scale]).view(1, 3, 1, 1).expand(256, 3, 1, 1).clone().requires_grad_()
    nll = LogisticMixture(components=1).nll(given, LEVELS.view(-1, 1, 1, 1).float())
    (gradient,) = torch.autograd.grad(nll.sum(), given)
    assert nll.isfinite().all() and gradient.isfinite().all()
    assert (nll >= 0).all()

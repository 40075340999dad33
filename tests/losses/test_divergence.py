"""KL and free bits: the field's numbers (sum or mean, runaway log-variance), and what splits must not change."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from trainer.losses.divergence import clamped_share, free_bits, kl, kl_per_dimension

NUMBERS = st.floats(-3.0, 3.0)


@pytest.mark.parametrize("batch", [2, 16])
def test_kl_is_a_sum_over_the_latent_for_each_sample(batch: int) -> None:
    found = kl(torch.ones(batch, 4, 8, 8), torch.zeros(batch, 4, 8, 8))
    assert found.tolist() == [128.0] * batch  # F3-1: half a nat for each of 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("logvar", [-1000.0, -30.0, 0.0, 12.0, 20.0, 1000.0])
def test_a_log_variance_that_runs_away_stays_finite(logvar: float, dtype: torch.dtype) -> None:
    mean = torch.zeros(1, 1, dtype=dtype, requires_grad=True)
    given = torch.full((1, 1), logvar, dtype=dtype, requires_grad=True)
    found = kl(mean, given)
    found.sum().backward()
    assert found.dtype == torch.float32 and found.isfinite().all()
    assert mean.grad is not None and mean.grad.isfinite().all()
    assert given.grad is not None and given.grad.isfinite().all()
    assert (given.grad.item() > 0) == (0 < logvar <= 20)


def test_kl_at_the_ends_of_the_clamp_is_the_fields() -> None:
    found = kl_per_dimension(torch.zeros(1, 5), torch.tensor([[0.0, 20.0, 1000.0, -30.0, -1000.0]]))[0].tolist()
    assert found[0] == 0.0
    assert found[1] == found[2] == pytest.approx(242582587.2, rel=1e-7)
    assert found[3] == found[4] == pytest.approx(0.5 * (30.0 - 1.0), rel=1e-6)


@settings(deadline=None)
@given(NUMBERS, NUMBERS)
def test_kl_is_that_of_torch_distributions_and_never_negative(mean: float, logvar: float) -> None:
    m, v = torch.tensor([[mean]], dtype=torch.float64), torch.tensor([[logvar]], dtype=torch.float64)
    expected = kl_divergence(Normal(m, (0.5 * v).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(kl_per_dimension(m, v), expected, rtol=1e-9, atol=1e-12)
    assert kl(m.float(), v.float()).item() >= 0.0


def test_kl_near_the_prior_keeps_its_digits_in_float32() -> None:
    small = 1e-3
    found = kl(torch.zeros(1, 1), torch.full((1, 1), small)).item()
    assert found == pytest.approx(0.25 * small**2 + small**3 / 12, rel=1e-3)  # e^s - 1 - s loses them


def test_gradients_are_those_of_finite_differences() -> None:
    rng = torch.Generator().manual_seed(0)
    mean, logvar = torch.randn(2, 3, 4, generator=rng, dtype=torch.float64).requires_grad_().unbind(0)
    assert torch.autograd.gradcheck(kl, (mean.detach().requires_grad_(), logvar.detach().requires_grad_()))


def test_maps_and_vectors_count_every_element_as_a_dimension() -> None:
    mean, logvar = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0)).unbind(0)
    assert kl_per_dimension(mean, logvar).shape == (3, 16)
    torch.testing.assert_close(kl(mean, logvar), kl(mean.flatten(1), logvar.flatten(1)))


# ---------------------------------------------------------------- free bits
def test_free_bits_cost_each_dimension_at_least_their_number() -> None:
    given = torch.tensor([[0.1, 0.5, 2.0], [0.0, 0.0, 0.0]])
    assert free_bits(given, 0.5).tolist() == pytest.approx([0.5 + 0.5 + 2.0, 1.5])
    assert free_bits(given, 0.0).tolist() == pytest.approx(given.sum(1).tolist())


def test_a_dimension_below_the_floor_feels_no_pull_and_one_above_feels_all_of_it() -> None:
    given = torch.tensor([[0.1, 2.0]], requires_grad=True)
    (found,) = torch.autograd.grad(free_bits(given, 0.5).sum(), given)
    assert found.tolist() == [[0.0, 1.0]]


@settings(deadline=None)
@given(st.lists(st.lists(st.floats(0.0, 5.0), min_size=3, max_size=3), min_size=4, max_size=4), st.floats(0.0, 2.0))
def test_free_bits_do_not_depend_on_the_split_of_a_batch(rows: list[list[float]], nats: float) -> None:
    whole = torch.tensor(rows)
    halves = torch.cat([free_bits(part, nats) for part in whole.split(2)])
    assert torch.equal(free_bits(whole, nats), halves)
    assert free_bits(whole, nats).mean() >= whole.mean(0).clamp(min=nats).sum() - 1e-5  # the paper's form, from above


# ---------------------------------------------------------------- the clamp is visible
def test_the_share_of_clamped_values_is_that_of_each_sample() -> None:
    logvar = torch.tensor([[0.0, 1.0, -29.0, 19.0], [-30.0, 20.0, math.inf, 0.0]])
    assert clamped_share(logvar).tolist() == [0.0, 0.75]
    assert clamped_share(torch.full((2, 4, 2, 2), -1000.0)).tolist() == [1.0, 1.0]

"""Frechet distance: real and finite at any count (F5-1), the same for any split, right where a closed form exists."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.metrics.frechet import frechet
from trainer.metrics.moments import Moments

FEW = "ignore:frechet"  # sets smaller than their dimensions are what some tests are about


def features(n: int, dims: int = 64, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def moments(rows: torch.Tensor) -> Moments:
    found = Moments()
    found.add(rows)
    return found


@pytest.mark.filterwarnings(FEW)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("n", [1, 2, 32, 100, 5000])
def test_identical_sets_have_distance_zero_at_any_count(n: int, scale: float) -> None:
    rows = features(n) * scale
    value = frechet(moments(rows), moments(rows)).value
    assert abs(value) < 1e-3 and math.isfinite(value)


@pytest.mark.filterwarnings(FEW)
@pytest.mark.parametrize(("n", "low", "high"), [(32, 20.0, 120.0), (100, 18.0, 30.0), (5000, 0.3, 0.6)])
def test_two_sets_of_one_distribution_are_closer_the_more_there_are(n: int, low: float, high: float) -> None:
    assert low < frechet(moments(features(n, seed=1)), moments(features(n, seed=2))).value < high


@pytest.mark.filterwarnings(FEW)
@pytest.mark.parametrize("n", [32, 100, 5000])
def test_a_shift_of_a_half_in_64_dimensions_is_sixteen(n: int) -> None:
    rows = features(n)
    assert frechet(moments(rows), moments(rows + 0.5)).value == pytest.approx(16.0, abs=1e-3)
    if n == 5000:
        other = features(n, seed=1, shift=0.5)
        assert frechet(moments(rows), moments(other)).value == pytest.approx(16.0, abs=1.5)


def test_the_distance_is_that_of_the_matrix_root() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(300, 6)) @ rng.normal(size=(6, 6)), rng.normal(size=(200, 6)) + 0.3
    ca, cb = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(ca @ cb).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(ca + cb - 2 * root)
    found = frechet(moments(torch.from_numpy(a)), moments(torch.from_numpy(b)))
    assert found.value == pytest.approx(expected, rel=1e-9)


@pytest.mark.filterwarnings(FEW)
def test_it_is_symmetric() -> None:
    a, b = moments(features(50, 8, seed=1)), moments(features(60, 8, seed=2, shift=1.0))
    assert frechet(a, b).value == pytest.approx(frechet(b, a).value, rel=1e-9)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_any_split_over_batches_and_ranks_has_the_statistics_of_the_whole(sizes: list[int]) -> None:
    rows = features(sum(sizes) + 5, 4)
    parts = torch.split(rows, [*sizes, 5])
    ranks = [Moments() for _ in range(2)]
    for rank in ranks:
        rank.add(rows[:0])  # a rank may have had nothing but padding
    for index, part in enumerate(parts):
        ranks[index % 2].add(part)
    merged, whole = over_ranks(ranks), moments(rows)
    assert merged.count == whole.count == len(rows)
    torch.testing.assert_close(merged.mean(), whole.mean())
    torch.testing.assert_close(merged.covariance(), whole.covariance())
    torch.testing.assert_close(merged.covariance(), rows.T.cov())
    torch.testing.assert_close(merged.variances(), rows.var(0, correction=0))


def over_ranks(ranks: list[Moments]) -> Moments:
    """merged() as every rank calls it: what each hands in, summed."""
    handed: list[torch.Tensor] = []

    def collect(mine: torch.Tensor) -> torch.Tensor:
        handed.append(mine.clone())
        return mine

    for rank in ranks:
        rank.merged(collect)
    return ranks[0].merged(lambda mine: sum(handed, torch.zeros_like(mine)))


def test_float32_features_are_summed_in_float64() -> None:
    # variances of 1e-6 about 100: float64 keeps a few eps * 100^2 = 2e-12, float32 would keep nothing
    rows = (features(1000, 3) * 1e-3 + 100.0).float()
    parts = Moments()
    for part in rows.split(7):
        parts.add(part)
    torch.testing.assert_close(parts.covariance(), rows.double().T.cov(), rtol=0, atol=2e-11)


def test_the_counts_stand_beside_the_value() -> None:
    found = frechet(moments(features(200, 8)), moments(features(300, 8, seed=1)))
    assert (found.samples, found.reference, found.dims) == (200, 300, 8)
    assert "200 against 300" in str(found)


def test_too_few_samples_for_the_dimensions_give_a_warning() -> None:
    with pytest.warns(UserWarning, match="64 samples in 64 dimensions"):
        frechet(moments(features(64)), moments(features(100)))


def test_features_of_different_networks_and_empty_sets_are_refused() -> None:
    with pytest.raises(ValueError, match="64 and 32 dimensions"):
        frechet(moments(features(100)), moments(features(100, 32)))
    with pytest.raises(ValueError, match="no samples"):
        frechet(Moments(), moments(features(100)))
    with pytest.raises(ValueError, match="no samples"):
        frechet(moments(features(0)), moments(features(100)))

"""Active units by the covariance criterion, over any split; slerp stays on the sphere (F5-7)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.metrics.interpolate import slerp
from trainer.metrics.latent import ActiveUnits


def means(n: int = 400) -> torch.Tensor:
    """Four dimensions that vary with variance 1, .02, .005 and 0 about means far from 0."""
    rows = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    rows = (rows - rows.mean(0)) / rows.std(0, correction=0)
    return rows * torch.tensor([1.0, 0.02, 0.005, 0.0]).sqrt() + torch.tensor([0.0, 5.0, 5.0, 5.0])


def test_a_unit_is_active_above_a_hundredth_of_variance_over_the_data() -> None:
    units = ActiveUnits()
    units.add(means())
    assert units.count() == 2  # a constant far from the prior is not active
    assert units.variances().tolist() == pytest.approx([1.0, 0.02, 0.005, 0.0], abs=1e-5)


@pytest.mark.parametrize("batch", [1, 3, 400])
def test_batches_and_ranks_count_what_one_batch_counts(batch: int) -> None:
    ranks = [ActiveUnits(), ActiveUnits()]
    for index, part in enumerate(means().split(batch)):
        ranks[index % 2].add(part)
    for rank in ranks:
        rank.add(means()[:0])
    handed: list[torch.Tensor] = []

    def collect(mine: torch.Tensor) -> torch.Tensor:
        handed.append(mine.clone())
        return mine

    for rank in ranks:
        rank.merged(collect)
    merged = ranks[0].merged(lambda mine: mine + handed[1])
    assert merged.count() == 2
    assert merged.variances().tolist() == pytest.approx([1.0, 0.02, 0.005, 0.0], abs=1e-5)


def test_every_place_of_a_map_is_a_unit() -> None:
    units = ActiveUnits()
    units.add(means().view(400, 1, 2, 2))
    assert units.count() == 2 and units.variances().shape == (4,)


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        ActiveUnits().count()


# ---------------------------------------------------------------- slerp
@pytest.mark.parametrize("shape", [(2,), (512,), (4, 8, 8)])
def test_orthogonal_ends_of_equal_norm_keep_it_on_the_way(shape: tuple[int, ...]) -> None:
    a, b = torch.zeros(shape), torch.zeros(shape)
    a.view(-1)[0], b.view(-1)[1] = 3.0, 3.0
    middle = slerp(a, b, 0.5)
    assert middle.shape == a.shape and middle.dtype == a.dtype
    assert middle.norm().item() == pytest.approx(3.0, rel=1e-6)
    torch.testing.assert_close(middle, (a + b) / math.sqrt(2))


@settings(deadline=None)
@given(st.integers(0, 1000), st.floats(0.0, 1.0))
def test_norm_goes_evenly_from_end_to_end_and_ends_are_exact(seed: int, t: float) -> None:
    a, b = torch.randn(2, 16, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(slerp(a, b, 0.0), a) and torch.equal(slerp(a, b, 1.0), b)
    expected = (1 - t) * a.norm() + t * b.norm()
    assert slerp(a, b, t).norm().item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_angle_is_walked_evenly() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    angles = [math.atan2(*reversed(slerp(a, b, t).tolist())) for t in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert angles == pytest.approx([t * math.pi / 2 for t in (0.0, 0.25, 0.5, 0.75, 1.0)], abs=1e-6)


@settings(deadline=None)
@given(st.floats(0.0, 1.0))
def test_equal_opposite_and_zero_latents_stay_finite(t: float) -> None:
    a = torch.randn(8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(slerp(a, a.clone(), t), a)
    for other in (-a, torch.zeros(8), 2 * a, a * (1 + 1e-7)):
        assert slerp(a, other, t).isfinite().all()

"""The clock in images: what is due, and how ramps, cycles and decays run, at any batch size."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer import progress

BATCHES = st.integers(1, 512)


@given(batch=BATCHES, every=st.integers(1, 10_000), updates=st.integers(1, 400))
def test_something_is_due_once_for_each_multiple_that_an_update_crosses(batch: int, every: int, updates: int) -> None:
    due = [n for n in range(1, updates + 1) if progress.due(n * batch, every=every, batch=batch)]
    # the first update that ends at or after each multiple of `every`
    expected = {-(-multiple // batch) for multiple in range(every, updates * batch + 1, every)}
    assert set(due) == expected


@given(batch=BATCHES, images=st.integers(0, 10**9))
def test_every_0_is_never(batch: int, images: int) -> None:
    assert not progress.due(images, every=0, batch=batch)


@given(start=st.integers(0, 10**6), length=st.integers(1, 10**6), images=st.integers(0, 3 * 10**6))
def test_a_ramp_is_0_up_to_its_start_1_from_its_end_and_rises_between(start: int, length: int, images: int) -> None:
    value = progress.ramp(images, start=start, length=length)
    assert 0.0 <= value <= 1.0
    assert (value == 0.0) == (images <= start)
    assert (value == 1.0) == (images >= start + length)
    assert progress.ramp(images + 1, start=start, length=length) >= value


def test_a_ramp_without_length_is_a_step_at_its_start() -> None:
    assert [progress.ramp(images, start=100, length=0) for images in (0, 99, 100, 101)] == [0.0, 0.0, 1.0, 1.0]
    assert progress.ramp(0, start=0, length=0) == 1.0
    assert progress.ramp(150, start=100, length=100) == 0.5


def test_a_cycle_rises_in_its_first_half_and_stays_again_and_again() -> None:
    """Fu et al. 2019."""
    found = [progress.cyclic(images, period=100) for images in (0, 25, 50, 99, 100, 125, 150, 1_000_025)]
    assert found == [0.0, 0.5, 1.0, 1.0, 0.0, 0.5, 1.0, 0.5]
    assert progress.cyclic(25, period=100, rising=0.25) == 1.0


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
def test_a_decay_holds_then_falls_to_its_floor_at_the_end_and_stays_there(shape: str) -> None:
    values = [progress.decay(n, total=1000, hold=0.5, floor=0.1, shape=shape) for n in range(0, 1201, 50)]
    assert values[:11] == 11 * [1.0]
    assert values == sorted(values, reverse=True)
    assert values[20:] == pytest.approx(5 * [1.0 if shape == "constant" else 0.1])


def test_the_shapes_are_the_ones_of_their_names() -> None:
    def at(n: int, shape: str) -> float:
        return progress.decay(n, total=1000, hold=0.0, floor=0.0, shape=shape)

    assert [at(n, "linear") for n in (250, 500, 750)] == pytest.approx([0.75, 0.5, 0.25])
    assert [at(n, "cosine") for n in (250, 500, 750)] == pytest.approx(
        [0.5 * (1 + math.cos(math.pi * share)) for share in (0.25, 0.5, 0.75)]
    )

"""The order of samples is a pure function of (seed, position)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.order import Order, mix, permutation

SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=12)


def test_mix_is_splitmix64() -> None:
    # the reference generator seeded with 1234567 (Vigna's splitmix64.c): state += gamma before each output
    gamma, state, found = 0x9E3779B97F4A7C15, 1234567, []
    for _ in range(5):
        found.append(int(mix(np.array([state], np.uint64))[0]))
        state = (state + gamma) % 2**64
    assert found == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
    ]  # fmt: skip


def test_the_order_is_the_same_for_ever() -> None:
    order = Order([5, 1, 7, 3], seed=11, window=2)
    assert order.take(0, 16).tolist() == [0, 1, 2, 5, 4, 3, 8, 7, 6, 15, 14, 13, 10, 9, 11, 12]
    assert permutation(10, 1, 0, 3).tolist() == [8, 1, 3, 6, 5, 4, 2, 9, 0, 7]


@settings(deadline=None)
@given(SIZES, st.integers(-(2**63), 2**63), st.integers(1, 14), st.integers(0, 3))
def test_each_epoch_shows_every_sample_once(sizes: list[int], seed: int, window: int, epoch: int) -> None:
    total = sum(sizes)
    found = Order(sizes, seed=seed, window=window).take(epoch * total, total)
    assert sorted(found.tolist()) == list(range(total))


@settings(deadline=None)
@given(SIZES, st.integers(0, 99), st.integers(1, 14), st.data())
def test_any_part_equals_the_whole(sizes: list[int], seed: int, window: int, data: st.DataObject) -> None:
    total = sum(sizes)
    start = data.draw(st.integers(0, 3 * total))
    count = data.draw(st.integers(0, 2 * total))
    whole = Order(sizes, seed=seed, window=window).take(0, 5 * total)
    assert Order(sizes, seed=seed, window=window).take(start, count).tolist() == whole[start : start + count].tolist()


def test_epochs_and_seeds_differ() -> None:
    order = Order([50, 50], seed=0, window=2)
    orders = [order.take(0, 100), order.take(100, 100), Order([50, 50], seed=1, window=2).take(0, 100)]
    for i in range(3):
        for j in range(i):
            assert (orders[i] != orders[j]).mean() > 0.9


@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_window_holds_no_more_shards_than_asked(window: int) -> None:
    order = Order([10] * 7, seed=3, window=window)
    shards = order.take(0, 70) // 10
    for start in range(0, 70, 10 * window):
        part = set(shards[start : start + 10 * window].tolist())
        assert len(part) <= window
        assert part == set(order.shards(start).tolist())


def test_positions_are_uniform_over_epochs() -> None:
    # 4000 epochs of 8: 500 expected in each cell; chi-square of 64 - 15 = 49 degrees of freedom, p = 1e-6 at 113
    order = Order([3, 5], seed=5, window=2)
    rows = order.take(0, 8 * 4000).reshape(4000, 8)
    counts = np.stack([np.bincount(rows[:, k], minlength=8) for k in range(8)])
    assert ((counts - 500) ** 2 / 500).sum() < 113

"""The order of samples is a pure function of (seed, position), whoever reads it and wherever it was stopped."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.soak import reference
from trainer.data.order import Order, mix, permutation
from trainer.data.source import Evaluation, Training

SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=12)
WINDOWS = st.one_of(st.integers(1, 14), st.none())
PROPERTY = settings(deadline=None)


def right(sizes: list[int], *, seed: int, window: int | None, batch: int | None, count: int) -> list[int]:
    return list(islice(reference.order(sizes, seed=seed, window=window or len(sizes), batch=batch), count))


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


@PROPERTY
@given(st.integers(0, 3000), st.lists(st.integers(-(2**64), 2**64), max_size=4))
def test_a_permutation_is_that_of_a_stable_sort_by_the_hash(n: int, key: list[int]) -> None:
    assert permutation(n, *key).tolist() == reference.shuffled(range(n), *key)


@PROPERTY
@given(SIZES, st.integers(-(2**63), 2**63), WINDOWS, st.sampled_from(["carry", "drop"]), st.data())
def test_any_part_from_any_start_equals_the_reference(
    sizes: list[int], seed: int, window: int | None, tail: str, data: st.DataObject
) -> None:
    batch = data.draw(st.integers(1, sum(sizes))) if tail == "drop" else None
    expected = right(sizes, seed=seed, window=window, batch=batch, count=5 * sum(sizes))
    order = Order(sizes, seed=seed, window=window, batch=batch)
    for _ in range(3):  # of one order too, which keeps what it worked out
        start = data.draw(st.integers(0, 3 * sum(sizes)))
        part = expected[start : start + data.draw(st.integers(0, 2 * sum(sizes)))]
        assert order.take(start, len(part)).tolist() == part
        assert Order(sizes, seed=seed, window=window, batch=batch).take(start, len(part)).tolist() == part


@PROPERTY
@given(SIZES, st.integers(-(2**63), 2**63), WINDOWS, st.integers(0, 3), st.data())
def test_an_epoch_shows_every_sample_once_or_every_whole_batch(
    sizes: list[int], seed: int, window: int | None, epoch: int, data: st.DataObject
) -> None:
    total, batch = sum(sizes), data.draw(st.integers(1, sum(sizes)))
    carried = Order(sizes, seed=seed, window=window)
    assert carried.length == carried.samples == total
    assert sorted(carried.take(epoch * total, total).tolist()) == list(range(total))
    dropped = Order(sizes, seed=seed, window=window, batch=batch)
    assert (dropped.length, dropped.samples) == (total // batch * batch, total)
    found = dropped.take(epoch * dropped.length, dropped.length).tolist()
    assert found == carried.take(epoch * total, dropped.length).tolist()
    assert len(set(found)) == len(found) > total - batch


def test_a_dropped_tail_is_seen_in_other_epochs() -> None:
    order = Order([9, 4, 6], seed=2, window=2, batch=10)
    missed = [set(range(19)) - set(order.take(epoch * 10, 10).tolist()) for epoch in range(8)]
    assert all(len(some) == 9 for some in missed)
    assert not set.intersection(*missed)


def test_a_batch_larger_than_an_epoch_is_refused_where_its_tail_is_dropped() -> None:
    with pytest.raises(ValueError, match=r"^data\.tail: drop leaves nothing of 7 samples, as a batch is 8; .*carry"):
        Order([3, 4], seed=0, window=None, batch=8)
    assert Order([3, 4], seed=0, window=None, batch=7).length == 7


# ------------------------------------------------------------------ ranks, stops, and other world sizes
@PROPERTY
@given(
    sizes=SIZES, seed=st.integers(0, 99), window=WINDOWS, share=st.integers(1, 3), first=st.integers(0, 40),
    worlds=st.lists(st.tuples(st.integers(1, 8), st.integers(0, 6)), min_size=1, max_size=5), drop=st.booleans(),
)  # fmt: skip
def test_no_stop_and_no_other_world_size_loses_doubles_or_moves_a_sample(
    sizes: list[int], seed: int, window: int | None, share: int, first: int, worlds: list[tuple[int, int]], drop: bool
) -> None:
    """worlds: (ranks, batches until the stop) of each start; the batch is such that all of them divide it."""
    batch = share * int(np.lcm.reduce([world for world, _ in worlds]))
    tail = batch if drop and batch <= sum(sizes) else None
    position, found, places = first * batch, [], []
    for world, steps in worlds:
        sources = [
            Training(Order(sizes, seed=seed, window=window, batch=tail), position, batch, rank, world)()
            for rank in range(world)
        ]
        for _ in range(steps):
            for request in map(next, sources):
                assert request.weight is None and len(request.sample) == batch // world
                found += request.sample.tolist()
                places += request.position.tolist()
        position += steps * batch
    expected = right(sizes, seed=seed, window=window, batch=tail, count=position)
    assert places == list(range(first * batch, position))
    assert found == expected[first * batch :]


@PROPERTY
@given(samples=st.integers(1, 60), world=st.integers(1, 8), share=st.integers(1, 9))
def test_an_evaluation_has_each_sample_once_and_as_many_batches_on_each_rank(
    samples: int, world: int, share: int
) -> None:
    batches = [list(Evaluation(samples, world * share, rank, world)()) for rank in range(world)]
    found: list[int] = []
    for requests in zip(*batches, strict=True):
        for request in requests:
            assert request.weight is not None and len(request.sample) == share
            found += request.sample[request.weight > 0].tolist()
    assert found == list(range(samples))


# ------------------------------------------------------------------ windows
@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_window_holds_no_more_shards_than_asked(window: int) -> None:
    order = Order([10] * 7, seed=3, window=window)
    shards = order.take(0, 70) // 10
    for start in range(0, 70, 10 * window):
        part = set(shards[start : start + 10 * window].tolist())
        assert len(part) <= window
        assert part == set(order.shards(start).tolist())


@PROPERTY
@given(SIZES, st.integers(0, 99), WINDOWS, st.booleans(), st.data())
def test_the_following_window_is_the_one_that_comes(
    sizes: list[int], seed: int, window: int | None, drop: bool, data: st.DataObject
) -> None:
    batch = data.draw(st.integers(1, sum(sizes))) if drop else None
    order = Order(sizes, seed=seed, window=window, batch=batch)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    position = 0
    while position < 3 * order.length:
        shards, following = order.shards(position).tolist(), order.following(position).tolist()
        until = position
        while order.shards(until).tolist() == shards and until // order.length == position // order.length:
            assert owner[order.take(until, 1)[0]] in shards
            until += 1
        assert order.shards(until).tolist() == following
        position = until


# ------------------------------------------------------------------ chance
def test_epochs_and_seeds_differ() -> None:
    order = Order([50, 50], seed=0, window=2)
    orders = [order.take(0, 100), order.take(100, 100), Order([50, 50], seed=1, window=2).take(0, 100)]
    for i in range(3):
        for j in range(i):
            assert (orders[i] != orders[j]).mean() > 0.9


def test_positions_are_uniform_over_epochs() -> None:
    # 4000 epochs of 8: 500 expected in each cell; chi-square of 64 - 15 = 49 degrees of freedom, p = 1e-6 at 113
    order = Order([3, 5], seed=5, window=2)
    rows = order.take(0, 8 * 4000).reshape(4000, 8)
    counts = np.stack([np.bincount(rows[:, k], minlength=8) for k in range(8)])
    assert ((counts - 500) ** 2 / 500).sum() < 113


def test_what_was_taken_is_the_callers_own() -> None:
    order = Order([5, 5], seed=0, window=2)
    before = order.take(0, 10)
    expected = before.tolist()
    before[:] = 0
    assert order.take(0, 10).tolist() == expected


def test_a_window_of_more_shards_than_there_are_is_all_of_them() -> None:
    sizes = [3, 1, 4]
    expected = Order(sizes, seed=1, window=None).take(0, 20)
    for window in (3, 4, 10**23):
        assert (Order(sizes, seed=1, window=window).take(0, 20) == expected).all()

"""Several sets in one order: exact proportions, each set's own epochs complete, a function of (seed, position)."""

from dataclasses import dataclass
from itertools import islice

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tools.soak import reference
from trainer.data.config import MixtureConfig, SetConfig, ShardsConfig
from trainer.data.mixture import BLOCK, Mixture, counts, order_of
from trainer.data.order import Order
from trainer.data.source import Training

SETS = st.lists(
    st.tuples(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.sampled_from([0.1, 0.25, 1, 1.5, 3, 7.7])),
    min_size=1, max_size=4,
)  # fmt: skip
Sets = list[tuple[list[int], float]]
# a block is 4096 positions: to look for a smaller example would take longer than a test may
FEW = settings(deadline=None, max_examples=20, phases=[Phase.explicit, Phase.reuse, Phase.generate])


def mixture(sets: Sets, *, seed: int, window: int | None) -> Mixture:
    orders = [Order(sizes, seed=seed + number, window=window) for number, (sizes, _) in enumerate(sets)]
    return Mixture(orders, [weight for _, weight in sets], seed=seed)


def right(sets: Sets, *, seed: int, window: int | None, count: int) -> list[int]:
    orders, bases = [], []
    for number, (sizes, _) in enumerate(sets):
        bases.append(sum(sum(earlier) for earlier, _ in sets[:number]))
        orders.append(reference.order(sizes, seed=seed + number, window=window or len(sizes)))
    return list(islice(reference.mixture(orders, bases, [weight for _, weight in sets], seed=seed), count))


@FEW
@given(SETS, st.integers(0, 99), st.one_of(st.integers(1, 7), st.none()), st.data())
def test_any_part_from_any_start_equals_the_reference(
    sets: Sets, seed: int, window: int | None, data: st.DataObject
) -> None:
    expected = right(sets, seed=seed, window=window, count=3 * BLOCK)
    one = mixture(sets, seed=seed, window=window)
    for _ in range(4):
        start = data.draw(st.integers(0, 3 * BLOCK))
        part = expected[start : start + data.draw(st.integers(0, 2 * BLOCK))]
        assert one.take(start, len(part)).tolist() == part
        assert mixture(sets, seed=seed, window=window).take(start, len(part)).tolist() == part


@FEW
@given(
    sets=SETS, seed=st.integers(0, 99), first=st.integers(0, 2 * BLOCK),
    worlds=st.lists(st.tuples(st.integers(1, 8), st.integers(0, 3)), min_size=1, max_size=4),
)  # fmt: skip
def test_no_stop_and_no_other_world_size_loses_doubles_or_moves_a_sample(
    sets: Sets, seed: int, first: int, worlds: list[tuple[int, int]]
) -> None:
    batch = int(np.lcm.reduce([world for world, _ in worlds]))
    position, found = first, []
    for world, steps in worlds:
        sources = [
            Training(mixture(sets, seed=seed, window=2), position, batch, rank, world)() for rank in range(world)
        ]
        found += [sample for _ in range(steps) for source in sources for sample in next(source).sample.tolist()]
        position += steps * batch
    assert found == right(sets, seed=seed, window=2, count=position)[first:]


@FEW
@given(SETS, st.integers(0, 99), st.integers(0, 1000))
def test_every_block_holds_each_set_by_its_weight_exactly(sets: Sets, seed: int, block: int) -> None:
    one = mixture(sets, seed=seed, window=None)
    bases = np.cumsum([0, *(sum(sizes) for sizes, _ in sets)])
    found = np.histogram(one.take(block * BLOCK, BLOCK), bases)[0]
    total = sum(weight for _, weight in sets)
    assert found.sum() == BLOCK
    for count, (_, weight) in zip(found.tolist(), sets, strict=True):
        assert abs(count - BLOCK * weight / total) < 1


@FEW
@given(SETS, st.integers(0, 99), st.one_of(st.integers(1, 7), st.none()))
def test_each_set_goes_through_complete_epochs_of_its_own(sets: Sets, seed: int, window: int | None) -> None:
    found = mixture(sets, seed=seed, window=window).take(0, 2 * BLOCK)
    base = 0
    for sizes, _ in sets:
        total = sum(sizes)
        mine = found[(found >= base) & (found < base + total)] - base
        for begin in range(0, len(mine), total):  # the last may have begun only
            epoch = mine[begin : begin + total]
            assert len(np.unique(epoch)) == len(epoch)
        base += total


@FEW
@given(SETS, st.integers(0, 99), st.integers(0, BLOCK + 50), st.integers(1, 7))
def test_the_shards_in_use_are_those_of_the_next_sample_of_each_set(
    sets: Sets, seed: int, start: int, window: int
) -> None:
    one = mixture(sets, seed=seed, window=window)
    bases = np.cumsum([0, *(sum(sizes) for sizes, _ in sets)])
    drawn = np.histogram(one.take(0, start), bases)[0].tolist()
    shards, following, base = [], [], 0
    for number, (sizes, _) in enumerate(sets):
        alone = Order(sizes, seed=seed + number, window=window)
        shards += [base + shard for shard in alone.shards(drawn[number]).tolist()]
        following += [base + shard for shard in alone.following(drawn[number]).tolist()]
        base += len(sizes)
    assert one.shards(start).tolist() == shards
    assert one.following(start).tolist() == following


def test_weights_are_rounded_by_largest_remainder_and_only_their_ratio_counts() -> None:
    assert counts([1, 1, 1]) == [1366, 1365, 1365]
    assert counts([3, 1]) == counts([0.75, 0.25]) == counts([300, 100]) == [3072, 1024]
    assert counts([0.1, 0.2, 0.7]) == [410, 819, 2867]  # 409.6, 819.2, 2867.2
    assert counts([5.0]) == [BLOCK]


def test_a_weight_that_gives_no_image_in_a_block_is_refused() -> None:
    assert counts([1, 4095]) == [1, 4095]
    with pytest.raises(ValueError, match=r"^data\.sets\[1\]\.weight: 0\.001 of 10\.001 in all is less than one image"):
        counts([10, 0.001])


# ------------------------------------------------------------------ from a config
@dataclass
class Sized:
    """What an order needs of an index."""

    starts: np.ndarray
    sets: tuple[int, ...]


INDEX = Sized(np.cumsum([0, 5, 1, 7, 3]), (3, 1))


def test_a_config_says_which_order_it_is() -> None:
    plain = ShardsConfig(path="a", size=4, window="all")
    one = order_of(INDEX, plain, seed=1, batch=5)  # type: ignore[arg-type]
    assert one.take(0, 40).tolist() == list(islice(reference.order([5, 1, 7, 3], seed=1, window=4), 40))
    dropped = ShardsConfig(path="a", size=4, window=2, tail="drop")
    one = order_of(INDEX, dropped, seed=1, batch=5)  # type: ignore[arg-type]
    assert one.take(0, 40).tolist() == list(islice(reference.order([5, 1, 7, 3], seed=1, window=2, batch=5), 40))
    mixed = MixtureConfig(sets=(SetConfig(path="a", weight=3), SetConfig(path="b", weight=2)), size=4, window=2)
    one = order_of(INDEX, mixed, seed=1, batch=5)  # type: ignore[arg-type]
    orders = [
        reference.order(sizes, seed=reference.derived(1, reference.SETS, number), window=2)
        for number, sizes in enumerate(([5, 1, 7], [3]))
    ]
    assert one.take(0, 9000).tolist() == list(islice(reference.mixture(orders, [0, 13], [3, 2], seed=1), 9000))
    assert one.length == one.samples == 16


def test_a_mixture_has_no_tail_to_drop() -> None:
    mixed = MixtureConfig(sets=(SetConfig(path="a"), SetConfig(path="b")), size=4, tail="drop")
    with pytest.raises(ValueError, match=r"^data\.tail: drop does not go with a mixture"):
        order_of(INDEX, mixed, seed=1, batch=5)  # type: ignore[arg-type]

"""What ranks must agree on, and what they must not share."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.cases import BATCH


class Answers(dict[str, Any]):
    """Probe -> what it found, of one rank."""


def answers(folder: Path, *, world: int) -> list[Answers]:
    return [Answers(json.loads((folder / f"probes-{world}-{rank}.json").read_text())) for rank in range(world)]


@pytest.fixture(scope="module")
def one(starts: Path) -> Answers:
    return answers(starts, world=1)[0]


@pytest.fixture(scope="module")
def two(starts: Path) -> list[Answers]:
    return answers(starts, world=2)


# ---------------------------------------------------------------- buffers
@pytest.mark.parametrize("kind", ["batch_norm", "spectral_norm", "plain"])
def test_a_discriminator_with_buffers_trains_and_its_buffers_are_equal_once_exported(
    two: list[Answers], kind: str
) -> None:
    first, second = (rank["buffers"][kind] for rank in two)
    assert first["finite"] and second["finite"]
    assert first["weights"] == second["weights"]
    for key in ("after", "exported", "average"):
        assert first[key] == second[key], key
    assert first["before"]["generator"] != second["before"]["generator"]  # each rank's statistics were of its own data
    assert first["average"] == first["after"]["generator"]
    # one forward an update: the generator's pass for the discriminator's phase waits for its own
    assert first["tracked"] == second["tracked"] == 3


def test_batch_statistics_of_a_discriminator_follow_each_ranks_own_data_until_they_are_exported(
    two: list[Answers],
) -> None:
    for kind in ("batch_norm", "plain"):
        first, second = (rank["buffers"][kind]["before"]["discriminator"] for rank in two)
        assert first != second, kind
    first, second = (rank["buffers"]["spectral_norm"]["before"]["discriminator"] for rank in two)
    assert first == second  # of the weights alone, which are equal


# ---------------------------------------------------------------- reductions
@pytest.mark.parametrize("accumulate", [1, 4])
def test_each_phase_reduces_its_own_network_once_and_no_other(two: list[Answers], accumulate: int) -> None:
    for rank in two:
        found = rank["reductions"]
        assert found[f"generator/{accumulate}"] == {"generator": 1, "discriminator": 0}
        assert found[f"discriminator/{accumulate}"] == {"generator": 0, "discriminator": 1}


def test_no_network_holds_a_gradient_after_its_own_or_another_phase(one: Answers, two: list[Answers]) -> None:
    for rank in (one, *two):
        held = {name: count for name, count in rank["reductions"].items() if name.endswith("held")}
        assert len(held) == 4
        assert set(held.values()) == {0}


# ---------------------------------------------------------------- adaptive weight
@pytest.mark.parametrize("method", ["vaegan_output", "vaegan_last_layer"])
def test_the_adaptive_weight_is_one_value_on_all_ranks_and_any_number_of_them(
    one: Answers, two: list[Answers], method: str
) -> None:
    first, second = (rank["adaptive_weight"][method] for rank in two)
    assert first == second
    used = [value for update in first for value in update]
    assert used[0] == 0.0  # nothing was measured yet
    assert all(value > 0.0 for value in used[1:]) and len(used) >= 4
    # float32 sums in another order, in two gradients and six updates of Adam: see test_parity.py
    assert used == pytest.approx([value for update in one["adaptive_weight"][method] for value in update], rel=1e-5)


@pytest.mark.parametrize("method", ["vaegan_output", "vaegan_last_layer"])
def test_an_adversarial_gradient_of_zero_takes_the_weight_to_its_ceiling_and_no_further(
    one: Answers, two: list[Answers], method: str
) -> None:
    for rank in (one, *two):
        found = rank["adaptive_weight"]
        used = [value for update in found[f"{method}/blind"] for value in update]
        assert used[0] == 0.0 and len(used) >= 4 and set(used[1:]) == {found[f"{method}/ceiling"]}


# ---------------------------------------------------------------- rate
def test_the_learning_rate_is_halved_at_step_5_of_10_whatever_the_world(one: Answers, two: list[Answers]) -> None:
    assert one["rates"] == two[0]["rates"] == two[1]["rates"]  # bit for bit
    assert one["rates"]["generator"][5] == pytest.approx(0.5e-3)
    assert one["rates"]["discriminator"][5] == pytest.approx(2e-3)
    assert one["rates"]["generator"][0] == 1e-3


# ---------------------------------------------------------------- noise
@pytest.mark.parametrize("stream", ["latent", "posterior", "mix", "augment"])
def test_no_two_ranks_share_a_row_of_noise_and_together_they_draw_what_one_process_draws(
    one: Answers, two: list[Answers], stream: str
) -> None:
    first, second = (rank["draws"]["streams"][stream] for rank in two)
    assert not set(first) & set(second)
    whole = one["draws"]["streams"][stream]
    assert len(set(whole)) == len(whole) == (3 if stream == "augment" else 1) * 3 * BATCH
    assert sorted(first + second) == sorted(whole)  # bit for bit


def test_initial_weights_and_the_fixed_sheet_are_the_same_for_every_world(one: Answers, two: list[Answers]) -> None:
    for key in ("weights", "sheet"):
        assert one["draws"][key] == two[0]["draws"][key] == two[1]["draws"][key]


# ---------------------------------------------------------------- non-finite gradient
def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_update_on_all(one: Answers, two: list[Answers]) -> None:
    assert len(one["nonfinite"]) == 12
    for case in one["nonfinite"]:
        for rank in (one, *two):
            found = rank["nonfinite"][case]
            assert found["unchanged"], case
            assert set(found["skipped"].values()) == {1}, case
            assert found["moved"], f"{case}: the update after it must be taken"
            assert found["largest"] < 2.0, f"{case}: weights of {found['largest']} after a skipped update"
        assert two[0]["nonfinite"][case]["next"] == two[1]["nonfinite"][case]["next"], case


def test_a_balance_whose_first_measure_is_not_finite_waits_for_a_finite_one(one: Answers, two: list[Answers]) -> None:
    """With 0 in place of "not measured" the next weight was the ceiling of 10000, and stayed in the average."""
    for rank in (one, *two):
        assert rank["nonfinite"]["vaegan_output/adam/0"]["weight"] == [0.0]


# ---------------------------------------------------------------- agreement
def test_ranks_tell_each_other_values_of_any_length(one: Answers, two: list[Answers]) -> None:
    for world, ranks in ((1, [one]), (2, two)):
        for rank in ranks:
            assert rank["agreement"]["gathered"] == [{"rank": r, "text": "ä" * 1000 * r} for r in range(world)]


def test_a_fault_of_any_rank_is_raised_on_all_with_the_words_of_the_first(one: Answers, two: list[Answers]) -> None:
    for rank in (one, *two):
        found = rank["agreement"]
        assert (found["last"], found["all"], found["none"]) == ("cut", "rank 0", None)

"""Two ranks under any stage of ZeRO are one process with the whole batch: every method, and every way of saving."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.parallel.cases import UPDATES
from tests.parallel.test_parity import FLOOR, SMALL, written
from tests.parallel.zero import CHAIN, LEG, STAGES, Case, cases

pytestmark = pytest.mark.timeout(900)  # the first test waits for one launch that serves them all

# as in test_parity.py; DeepSpeed also adds 1e-6 to the norm that it clips by, and norms here are above 0.1
TOLERANCE = 1e-5
CASES = [pytest.param(case, id=case.name) for case in cases()]


@pytest.fixture(scope="module")
def ranks(zero: Path) -> list[dict[str, Any]]:
    return [json.loads((zero / f"zero-{rank}.json").read_text()) for rank in (0, 1)]


def worst_loss(found: list[dict[str, float]], expected: list[dict[str, float]]) -> float:
    """The largest difference, relative where a mean does not cancel."""
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    return max(
        abs(one[name] - value) / max(abs(value), FLOOR)
        for one, row in zip(found, expected, strict=True)
        for name, value in row.items()
    )


def worst(zero: Path, starts: Path, case: Case) -> float:
    """Of all losses, weights and averages of a case against one process with the whole batch."""
    one = written(starts, case.method, case.optim, accumulate=1, world=1)
    found = json.loads((zero / f"{case.name}.json").read_text())
    assert found["world"] == 2 and len(found["losses"]) == UPDATES
    tensors = load_file(zero / f"{case.name}.safetensors")
    errors = [worst_loss(found["losses"], one.losses)]
    for name, tensor in one.weights.items():
        network, part, key = name.split("/", 2)
        mine = tensors[f"{network}.{part}/{key}" if part else f"{network}/{key}"]
        errors.append(float((mine - tensor).abs().max() / tensor.abs().max().clamp(min=SMALL)))
    return max(errors)


def test_there_really_were_two_processes(ranks: list[dict[str, Any]]) -> None:
    assert [(rank["rank"], rank["world"]) for rank in ranks] == [(0, 2), (1, 2)]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one_process(zero: Path, starts: Path, case: Case) -> None:
    assert worst(zero, starts, case) < TOLERANCE


def test_stage_3_without_a_new_start_of_each_micro_batch_is_another_run(
    ranks: list[dict[str, Any]], starts: Path
) -> None:
    """What the comparison above sees: DeepSpeed keeps the last micro-batch alone, without a word."""
    one = written(starts, "gan", "sgd", accumulate=1, world=1)
    assert worst_loss(ranks[0]["forgetful"], one.losses[:LEG]) > 10 * TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_a_rank_holds_its_share_of_the_average_and_what_is_evaluated_is_what_is_saved(
    ranks: list[dict[str, Any]], case: Case
) -> None:
    first, second = (rank["parity"][case.name] for rank in ranks)
    assert first["evaluated"] == second["evaluated"] == first["saved"]
    for name, whole in first["whole"].items():
        held = [rank["averages"].get(name) for rank in (first, second)]
        if name == "discriminator":
            assert held == [None, None]
        else:
            parameters = 32  # of a small network, each padded by less than the number of ranks
            assert all(whole / 2 <= share < whole / 2 + 2 * parameters for share in held)


@pytest.mark.parametrize("optim", ["sgd", "adam"])
@pytest.mark.parametrize("method", ["gan", "vaegan_last_layer"])
def test_a_run_that_is_handed_on_through_all_backends_is_the_uninterrupted_one(
    ranks: list[dict[str, Any]], method: str, optim: str
) -> None:
    tolerance = {"sgd": 1e-6, "adam": TOLERANCE}[optim]  # see test_parity.py
    for rank in ranks:
        found = rank["chain"][f"{method}-{optim}"]
        assert len(found["losses"]) == LEG * len(CHAIN) and found["names"]
        assert worst_loss(found["losses"], found["expected"]) < tolerance
        for name, (difference, size) in found["weights"].items():
            assert difference < tolerance * max(size, SMALL), name


@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("optim", ["sgd", "adam"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_goes_on_in_the_same_layout_has_the_same_bits(
    ranks: list[dict[str, Any]], stage: int, optim: str, offload: str
) -> None:
    assert all(rank["again"][f"{stage}-{optim}-{offload}"] for rank in ranks)


def test_the_page_has_the_table_that_was_measured(zero: Path, starts: Path) -> None:
    from tests.parallel import table  # it imports this file

    figures, stated = table.measured(zero, starts), table.stated(table.PAGE.read_text())
    assert figures.keys() == stated.keys()
    wrong = {place: value for place, value in figures.items() if not value < stated[place] <= TOLERANCE}
    assert not wrong, "\n".join(table.render(figures))

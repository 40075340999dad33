"""Two ranks with half the batch each are one rank with all of it, and two micro-batches are one: every method."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.parallel.cases import METHODS, OPTIM, UPDATES

pytestmark = pytest.mark.timeout(900)  # the first test waits for one launch that serves them all

# The splits differ by the order of float32 sums alone. A sum of n = 16 samples x 64 pixels in another order moves by
# about sqrt(n) = 32 roundings of 6e-8 / 32, a few 1e-7 of its size. SGD passes that on as it is: 1e-6. Adam divides the
# first moment by the root of the second, so where a gradient is no larger than its eps (1e-4 here) an error of 1e-7 in
# the loss becomes 1e-7 / 1e-4 = 1e-3 of an update of 1e-3, 1e-6 of a weight of order 1. Twenty updates add up: 1e-5.
TOLERANCE = {"sgd": 1e-6, "clipped": 1e-6, "adam": 1e-5}
FLOOR = 0.1  # a mean that cancels, as of logits, is compared at the scale of what was summed
SMALL = 1e-2  # biases that begin at 0 have come this far, or, where their gradient cancels (hinge's head), not at all


class Written(NamedTuple):
    world: int
    losses: list[dict[str, float]]
    weights: dict[str, Tensor]


def written(folder: Path, method: str, optim: str, *, accumulate: int, world: int, rank: int = 0) -> Written:
    stem = folder / f"{method}-{optim}-{accumulate}-{world}-{rank}"
    found = json.loads(stem.with_suffix(".json").read_text())
    return Written(found["world"], found["losses"], load_file(stem.with_suffix(".safetensors")))


def test_there_really_were_two_processes(starts: Path) -> None:
    assert written(starts, "vae", "sgd", accumulate=1, world=1).world == 1
    assert {written(starts, "vae", "sgd", accumulate=1, world=2, rank=rank).world for rank in (0, 1)} == {2}


@pytest.mark.parametrize(("accumulate", "world"), [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("optim", OPTIM)
@pytest.mark.parametrize("method", METHODS)
def test_any_split_of_the_batch_gives_the_same_losses_and_weights(
    starts: Path, method: str, optim: str, accumulate: int, world: int
) -> None:
    one = written(starts, method, optim, accumulate=1, world=1)
    split = written(starts, method, optim, accumulate=accumulate, world=world)
    assert len(one.losses) == len(split.losses) == UPDATES
    for update, (expected, found) in enumerate(zip(one.losses, split.losses, strict=True)):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            error = abs(found[name] - value) / max(abs(value), FLOOR)
            assert error < TOLERANCE[optim], f"update {update}, {name}: {found[name]} instead of {value}"
    assert split.weights.keys() == one.weights.keys()
    for name, tensor in one.weights.items():
        error = float((split.weights[name] - tensor).abs().max() / tensor.abs().max().clamp(min=SMALL))
        assert error < TOLERANCE[optim], f"{name}: {error} of its largest value"


@pytest.mark.parametrize("optim", OPTIM)
@pytest.mark.parametrize("method", METHODS)
def test_both_ranks_hold_the_same_bits(starts: Path, method: str, optim: str) -> None:
    for accumulate in (1, 2):
        first, second = (
            written(starts, method, optim, accumulate=accumulate, world=2, rank=rank).weights for rank in (0, 1)
        )
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", METHODS)
def test_training_moves_every_network(starts: Path, method: str) -> None:
    """What the comparison above would not notice: that nothing was trained."""
    sgd = written(starts, method, "sgd", accumulate=1, world=1).weights
    adam = written(starts, method, "adam", accumulate=1, world=1).weights
    networks = {name.split("/")[0] for name in sgd}
    moved = {name.split("/")[0] for name in sgd if not torch.equal(sgd[name], adam[name])}
    assert moved == networks
    averaged = {name.split("/")[0] for name in adam if "/ema/" in name}
    assert averaged == networks - {"discriminator"}
    assert any(not torch.equal(adam[name], adam[name.replace("/ema/", "//")]) for name in adam if "/ema/" in name)

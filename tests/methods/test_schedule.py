"""When the discriminator starts to learn and the autoencoder to feel it: in images, in every layout, after a resume."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parallel.cases import BATCH, Small, global_batch, make_config, small
from trainer.parallel.ranks import Ranks

LEARNS, FELT, UPDATES = 5, 10, 20  # in updates
METHOD: dict[str, Any] = {
    "kind": "vaegan",
    "autoencoder": {"kind": "conv", "width": 8, "multipliers": [1, 2], "latent": 4},
    "discriminator": {"kind": "global", "width": 8, "multipliers": [1, 2]},
    "likelihood": {"kind": "laplace"},
    "critic": {"loss": "hinge"},
    "balance": {"kind": "none"},
    "discriminator_learns_from": LEARNS * BATCH,
    "adversarial_from": FELT * BATCH,
}
OPTIM = {"decay": "cosine", "hold": 0.2, "warmup": 3 * BATCH, "discriminator": {"lr": 3e-3}}


def build(ranks: Ranks, *, accumulate: int = 1, **method: Any) -> Small:
    return small(make_config(METHOD | method, "adam", accumulate, 1, images=UPDATES * BATCH, optim=OPTIM), ranks)


def go_on(made: Small, ranks: Ranks, *, accumulate: int = 1, **method: Any) -> Small:
    """A new process's run from the state of an old one: named tensors and nothing else."""
    found = build(ranks, accumulate=accumulate, **method)
    for name, engine in made.engines.items():
        found.engines[name].load(engine.export())
    found.run.balance.load(made.run.balance.export(), ranks.device)
    return found


def run(ranks: Ranks, *, resume_at: int | None = None, accumulate: int = 1, **method: Any) -> tuple[Small, list[Any]]:
    """The run at its end, and of each update the notes and the rates."""
    made, seen = build(ranks, accumulate=accumulate, **method), []
    for number in range(UPDATES):
        if number == resume_at:
            made = go_on(made, ranks, accumulate=accumulate, **method)
        made.run.kept.clear()
        made.update(number)
        notes = {
            name: [float(v) for value in values for v in value.flatten()] for name, values in made.run.kept.items()
        }
        rates = {name: engine.rate(number * BATCH) for name, engine in made.engines.items()}
        seen.append((notes, rates))
    return made, seen


def weights(made: Small) -> dict[str, Tensor]:
    return {
        f"{name}/{part}/{key}": tensor
        for name, engine in made.engines.items()
        for part, tensors in engine.export().items()
        for key, tensor in tensors.items()
    }


def starts(seen: list[Any]) -> tuple[int, int]:
    """(first update of the discriminator, first update with an adversarial term)."""
    learns = [number for number, (notes, _) in enumerate(seen) if "loss/discriminator/adversarial" in notes]
    felt = [number for number, (notes, _) in enumerate(seen) if "loss/autoencoder/adversarial" in notes]
    assert learns == list(range(learns[0], UPDATES)) and felt == list(range(felt[0], UPDATES))
    return learns[0], felt[0]


@pytest.mark.parametrize("resume_at", [None, 2, 6, 14])
def test_straight_or_resumed_anywhere_both_start_at_their_image_and_every_bit_is_the_same(
    ranks: Ranks, resume_at: int | None
) -> None:
    made, seen = run(ranks, resume_at=resume_at)
    assert starts(seen) == (LEARNS, FELT)
    straight, expected = run(ranks)
    assert seen == expected  # losses and rates of both optimisers, each update
    for name, tensor in weights(straight).items():
        assert torch.equal(weights(made)[name], tensor), name


@pytest.mark.parametrize("resume_at", [None, 6, 14])
def test_accumulation_changes_no_start_and_no_rate(ranks: Ranks, resume_at: int | None) -> None:
    made, seen = run(ranks, accumulate=2, resume_at=resume_at)
    straight, expected = run(ranks)
    assert starts(seen) == (LEARNS, FELT)
    assert [rates for _, rates in seen] == [rates for _, rates in expected]
    steps = {
        name: {int(state["step"]) for state in engine.optimizer.state.values()}  # type: ignore[attr-defined]
        for name, engine in made.engines.items()
    }
    assert steps == {"autoencoder": {UPDATES}, "discriminator": {UPDATES - LEARNS}}
    for name, tensor in weights(straight).items():  # see tests/parallel/test_parity.py; 20 updates in place of 6
        error = float((weights(made)[name] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-2))
        assert error < 1e-4, name


def test_up_to_its_start_the_adversarial_term_has_moved_nothing(ranks: Ranks) -> None:
    """Against a run that never feels its discriminator."""
    made, never = build(ranks), build(ranks, adversarial_from=10**6)
    equal = []
    for number in range(FELT + 1):
        for either in (made, never):
            either.update(number)
        mine, others = (either.engines["autoencoder"].network.parameters() for either in (made, never))
        equal.append(all(torch.equal(p, q) for p, q in zip(mine, others, strict=True)))
    assert equal == FELT * [True] + [False]


@pytest.mark.parametrize("length", [0, 4])
def test_the_ramp_rises_in_images_from_the_start(ranks: Ranks, length: int) -> None:
    """The applied weight, by the terms themselves: 0 at the start of a ramp, all of it at its end."""
    made = build(ranks, adversarial_ramp=length * BATCH, adversarial_weight=0.8, prior_weight=3.0)
    found = []
    for number in range(FELT - 1, FELT + 6):
        terms = terms_at(made, number)
        both = (terms.get(name) for name in ("adversarial", "adversarial_prior"))
        main, prior = (0.0 if term is None else term.weight * term.scale for term in both)
        assert prior == pytest.approx(3.0 * main)
        found.append(main / 0.8)
    expected = [0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0] if length else [0.0] + 6 * [1.0]
    assert found == pytest.approx(expected)


def terms_at(made: Small, number: int) -> dict[str, Any]:
    batch = global_batch(number)
    made.run.end()
    made.run.begin("autoencoder", batch, images=number * BATCH, last=True, share=True, count=len(batch.image))
    found: dict[str, Any] = made.method.autoencoder(batch, made.run)  # type: ignore[attr-defined]
    return found


def test_a_balanced_term_acts_from_its_start_because_it_is_measured_in_the_update_before(ranks: Ranks) -> None:
    _, seen = run(ranks, balance={"kind": "output", "smoothing": 0.5})
    used = [notes["weight/adversarial"][0] for notes, _ in seen if "weight/adversarial" in notes]
    assert len(used) == UPDATES - FELT + 1
    assert used[0] == 0.0 and all(weight > 0 for weight in used[1:])


@pytest.mark.parametrize("resume_at", [6, 11, 14])
def test_a_balance_goes_on_where_it_was(ranks: Ranks, resume_at: int) -> None:
    balance = {"kind": "last_layer", "smoothing": 0.5}
    made, seen = run(ranks, resume_at=resume_at, balance=balance)
    straight, expected = run(ranks, balance=balance)
    assert seen == expected
    assert all(torch.equal(weights(made)[name], tensor) for name, tensor in weights(straight).items())


def test_a_start_before_the_discriminator_learns_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"adversarial_from: at 80 images .* learns from 160"):
        make_config(METHOD | {"discriminator_learns_from": 160, "adversarial_from": 80}, "adam", 1, 1)

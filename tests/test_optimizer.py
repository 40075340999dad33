"""One network's optimiser: its rate as a function of images, its average, its state by name."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer import optimizer
from trainer.optimizer import CriticOptim, NetworkOptim, OptimConfig

BATCH, TOTAL = 64, 640
BAD = {"lr": 0.0, "eps": 0.0, "ema_ramp": 0.0, "hold": 1.0, "clip": -1.0, "warmup": -5, "weight_decay": -0.1,
       "floor": -1.0, "ema_half_life": -4, "betas": (1.5, 2.0)}  # fmt: skip


def resolve(network: str = "generator", *, total: int = TOTAL, **config: Any) -> NetworkOptim:
    return optimizer.resolve(OptimConfig(**config), network=network, total=total)


# ---------------------------------------------------------------- rates
def test_the_rate_warms_up_in_images_and_then_decays() -> None:
    optim = resolve(lr=1.0, warmup=100, decay="linear", hold=0.5, floor=0.0)
    assert [optim.rate(images) for images in (0, 49, 99, 100, 320)] == pytest.approx([0.01, 0.5, 1.0, 1.0, 1.0])
    assert [optim.rate(images) for images in (480, 640)] == pytest.approx([0.5, 0.0])


def test_no_first_update_is_lost_to_a_rate_of_zero() -> None:
    assert resolve(warmup=10_000).rate(0) > 0.0


def test_a_new_rate_and_a_new_budget_take_effect_from_the_first_update_after_a_resume() -> None:
    """F4-2: a rate from the command line was silently replaced by the stored one."""
    weight = nn.Parameter(torch.ones(3))
    old, new = resolve(lr=1e-4, decay="linear"), resolve(lr=5e-5, decay="linear", total=2 * TOTAL)
    before = step(optimizer.build([weight], old), weight, rate=old.rate(4 * BATCH))
    state = optimizer.export_state(before, ["weight"])
    after = optimizer.build([weight], new)
    optimizer.load_state(after, ["weight"], state)
    assert after.param_groups[0]["lr"] == 5e-5
    assert new.rate(5 * BATCH) == 5e-5  # of the new budget: still in its hold
    assert old.rate(9 * BATCH) < 1e-4


def test_the_discriminator_takes_its_own_values_and_for_the_rest_the_common_ones() -> None:
    own = CriticOptim(lr=4e-4, betas=(0.0, 0.99), clip=2.0)
    generator, discriminator = (resolve(name, lr=1e-4, discriminator=own) for name in ("generator", "discriminator"))
    assert (generator.lr, generator.betas, generator.clip) == (1e-4, (0.9, 0.99), None)
    assert (discriminator.lr, discriminator.betas, discriminator.clip) == (4e-4, (0.0, 0.99), 2.0)
    common = resolve("discriminator", lr=1e-4, clip=3.0)
    assert (common.lr, common.betas, common.clip) == (1e-4, (0.9, 0.99), 3.0)


@pytest.mark.parametrize("batch", [8, 64, 512])
def test_the_rate_is_never_scaled_with_the_batch(batch: int) -> None:
    assert resolve(lr=1e-4).rate(3 * batch) == 1e-4


# ---------------------------------------------------------------- the average
def test_a_weights_share_in_the_average_halves_in_a_half_life_whatever_the_batch() -> None:
    for batch in (8, 64, 256):
        share = 1.0
        for images in range(100_000, 104_096, batch):
            share *= resolve(ema_half_life=4096).ema_decay(images, batch=batch)
        assert share == pytest.approx(0.5, rel=1e-9)


def test_an_early_average_forgets_the_initial_weights() -> None:
    """With a plain decay of 0.999 they count for 0.905 after 100 updates."""
    optim = resolve(ema_half_life=10**9)
    assert optim.ema_decay(0, batch=BATCH) == 0.0  # the first update replaces them
    share = 1.0  # of the weights after 10 updates, at update 100: the half-life is 5% of the images seen
    for number in range(10, 100):
        share *= optim.ema_decay(number * BATCH, batch=BATCH)
    assert share < 1e-6


# ---------------------------------------------------------------- state
NAMES = ["a.weight", "a.bias", "scale", "conv.weight"]


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    conv = torch.randn(4, 3, 2, 2, generator=generator).to(memory_format=torch.channels_last)
    shapes: list[Tensor] = [torch.randn(3, 2, generator=generator), torch.randn(3, generator=generator)]
    return [nn.Parameter(tensor) for tensor in (*shapes, torch.randn((), generator=generator), conv)]


Found = torch.optim.Optimizer


def step(found: Found, *weights: nn.Parameter, rate: float = 1e-2, seed: int = 0) -> Found:
    generator = torch.Generator().manual_seed(seed)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)
    found.param_groups[0]["lr"] = rate
    found.step()
    return found


@pytest.mark.parametrize("algorithm", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("at", [0, 1, 4])
def test_ten_updates_straight_and_with_a_restart_give_the_same_bits(algorithm: str, at: int) -> None:
    optim = resolve(algorithm=algorithm, lr=1e-2, weight_decay=1e-2)
    straight, resumed = parameters(), parameters()
    one, other = (optimizer.build(weights, optim) for weights in (straight, resumed))
    for number in range(10):
        if number == at:
            state = optimizer.export_state(other, NAMES)
            assert all(key.partition(".")[2] in NAMES for key in state)
            resumed = [nn.Parameter(weight.detach().clone()) for weight in resumed]
            other = optimizer.build(resumed, optim)
            optimizer.load_state(other, NAMES, {key: state[key] for key in sorted(state)})  # order is no matter
        step(one, *straight, seed=number)
        step(other, *resumed, seed=number)
    for mine, theirs in zip(straight, resumed, strict=True):
        assert torch.equal(mine, theirs)
    first, second = (optimizer.export_state(found, NAMES) for found in (one, other))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_state_is_named_by_parameter_and_is_a_copy() -> None:
    weights = parameters()
    found = step(optimizer.build(weights, resolve()), *weights)
    state = optimizer.export_state(found, NAMES)
    kinds = ("exp_avg", "exp_avg_sq", "step")
    assert sorted(state) == sorted(f"{kind}.{name}" for kind in kinds for name in NAMES)
    kept = {key: value.clone() for key, value in state.items()}
    step(found, *weights, seed=1)
    assert all(torch.equal(state[key], kept[key]) for key in state)


def test_loaded_moments_lie_in_memory_as_their_parameters_do() -> None:
    weights = parameters()
    state = optimizer.export_state(step(optimizer.build(weights, resolve()), *weights), NAMES)
    again = optimizer.build(weights, resolve())
    optimizer.load_state(again, NAMES, {key: value.contiguous() for key, value in state.items()})
    assert again.state[weights[3]]["exp_avg"].stride() == weights[3].stride()


def test_state_of_another_network_is_refused_by_name() -> None:
    weights = parameters()
    state = optimizer.export_state(step(optimizer.build(weights, resolve()), *weights), NAMES)
    fresh = optimizer.build(weights, resolve())
    with pytest.raises(ValueError, match=r"optimizer state 'exp_avg.b.weight' belongs to no parameter of this network"):
        optimizer.load_state(fresh, NAMES, state | {"exp_avg.b.weight": state["exp_avg.a.weight"]})
    part = {key: value for key, value in state.items() if not key.endswith("scale")}
    with pytest.raises(ValueError, match="optimizer state is missing for 1 parameters, the first is 'scale'"):
        optimizer.load_state(fresh, NAMES, part)


def test_no_state_is_the_state_before_the_first_update() -> None:
    weights = parameters()
    optimizer.load_state(optimizer.build(weights, resolve()), NAMES, {})


# ---------------------------------------------------------------- updates that are skipped
@pytest.mark.parametrize("algorithm", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("at", [0, 2])
def test_a_skipped_update_leaves_weights_and_state_as_if_it_had_not_been(algorithm: str, at: int) -> None:
    """torch's fused SGD left its momentum uninitialised when the very first update was skipped."""
    optim = resolve(algorithm=algorithm, lr=1e-2)
    never, skipped = parameters(), parameters()
    one, other = (optimizer.build(weights, optim) for weights in (never, skipped))
    for number in range(5):
        if number == at:
            other.found_inf = torch.ones(())  # type: ignore[attr-defined]
            for weight in skipped:
                weight.grad = torch.full_like(weight, torch.nan)
            other.step()
            other.found_inf = torch.zeros(())  # type: ignore[attr-defined]
        step(one, *never, seed=number)
        step(other, *skipped, seed=number)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(never, skipped, strict=True))


@pytest.mark.parametrize(("name", "value"), BAD.items())
def test_a_value_out_of_range_names_its_field(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        dataclasses.replace(OptimConfig(), **{name: value})

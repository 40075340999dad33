"""The adaptive weight as the methods use it is the papers' ratio, taken by autograd from the update before."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parallel.cases import BATCH, METHODS, Small, global_batch, make_config, small
from trainer.kernels import noise
from trainer.parallel.ranks import Ranks

TREE = METHODS["vaegan_last_layer"] | {"discriminator_learns_from": 0, "adversarial_from": 0, "kl": {"weight": 0.5}}


def build(ranks: Ranks, kind: str, *, accumulate: int = 1, **changes: Any) -> Small:
    tree = TREE | {"balance": {"kind": kind, "smoothing": 0.0}} | changes
    return small(make_config(tree, "sgd", accumulate, 1, optim={"lr": 1e-4, "betas": [0.0, 0.9]}), ranks)


def by_autograd(made: Small, number: int, kind: str) -> float:
    """The ratio at the weights as they are, without any of our machinery: one graph, two losses, torch.autograd.grad.

    Esser et al. 2021, eq. 7 (the reconstruction loss against the generator's, both means over the batch)."""
    batch = global_batch(number)
    autoencoder = made.engines["autoencoder"].network
    discriminator = made.engines["discriminator"].network
    z = noise.normal(made.config.seed, "posterior", batch.position, made.method.latent_size)
    out = autoencoder(batch.image, z)
    nll = (out["reconstruction"] - batch.image).abs().flatten(1).sum(1).mean()  # Laplace of scale 1, up to a constant
    adversarial = -discriminator(out["reconstruction"]).mean()  # hinge
    at: Tensor = autoencoder.last_layer if kind == "last_layer" else out["reconstruction"]
    norms = [torch.autograd.grad(loss, at, retain_graph=True)[0].norm() for loss in (nll, adversarial)]
    return float(norms[0] / (norms[1] + (1e-4 if kind == "last_layer" else 0.0)))


def used(made: Small, number: int) -> float:
    made.run.kept.clear()
    made.update(number)
    (weight,) = {float(value) for value in made.run.kept["weight/adversarial"]}
    return weight


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", ["last_layer", "output"])
def test_the_weight_is_the_ratio_of_the_norms_of_the_update_before(ranks: Ranks, kind: str, accumulate: int) -> None:
    made = build(ranks, kind, accumulate=accumulate)
    assert made.method.likelihood.scale == 1.0  # type: ignore[attr-defined]
    assert used(made, 0) == 0.0
    for number in (1, 2, 3):
        # the discriminator of the update that measured had taken its step; so measure after that step, before the next
        expected = measured(made, number - 1, kind, accumulate)
        found = used(made, number)
        assert found == pytest.approx(expected, rel=2e-4)  # a norm of 72 weights in float32, conv2d in another order


def measured(made: Small, number: int, kind: str, accumulate: int) -> float:
    """What update `number` must have measured: its autoencoder was the one before its step, its discriminator the one
    after. A copy of the run is taken back to there."""
    again = build(ranks=made.ranks, kind=kind, accumulate=accumulate)
    for earlier in range(number):
        again.update(earlier)
    before = {key: p.detach().clone() for key, p in again.engines["autoencoder"].network.named_parameters()}
    again.update(number)
    with torch.no_grad():
        for key, parameter in again.engines["autoencoder"].network.named_parameters():
            parameter.copy_(before[key])
    return by_autograd(again, number, kind)


@pytest.mark.parametrize("kind", ["last_layer", "output"])
def test_the_configured_weight_scales_the_pull_and_not_the_ratio(ranks: Ranks, kind: str) -> None:
    """Measured with the weight inside, the ratio cancelled it: 0.1, 0.5 and 2 all pulled as 1 does."""
    ratios, pulls = [], []
    for weight in (0.5, 1.0, 2.0):
        made = build(ranks, kind, adversarial_weight=weight, adversarial_ramp=0)
        made.update(0)
        batch = global_batch(0)
        made.run.kept.clear()
        made.run.begin("autoencoder", batch, images=BATCH, last=True, share=True, count=BATCH)
        terms = made.method.autoencoder(batch, made.run)  # type: ignore[attr-defined]
        (_, everything) = made.run.gradients(terms)
        ratios.append(float(made.run.kept["weight/adversarial"][0]))
        (_, plain) = made.run.gradients(terms_without(made, batch))
        pulls.append(float((everything[index(made)] - plain[index(made)]).norm()))
    assert ratios == pytest.approx(3 * [ratios[0]], rel=1e-5)
    # a difference of two sums, one of which is about as large as the difference
    assert pulls == pytest.approx([0.5 * pulls[1], pulls[1], 2.0 * pulls[1]], rel=1e-4)


def terms_without(made: Small, batch: Any) -> dict[str, Any]:
    made.run.end()
    made.run.begin("autoencoder", batch, images=BATCH, last=True, share=True, count=BATCH)
    terms = made.method.autoencoder(batch, made.run)  # type: ignore[attr-defined]
    return {name: term for name, term in terms.items() if term.group is None}


def index(made: Small) -> int:
    return [name for name in made.run.outputs if name != "features"].index("reconstruction")


@pytest.mark.parametrize("kind", ["last_layer", "output"])
def test_a_ramp_is_a_ramp_under_a_balance_too(ranks: Ranks, kind: str) -> None:
    """The ratio must not depend on how far the ramp has come."""
    ramp, full = (build(ranks, kind, adversarial_ramp=length) for length in (1000 * BATCH, 0))
    found = []
    for made in (ramp, full):
        batch = global_batch(0)
        for _ in range(2):
            made.run.end()
            made.run.kept.clear()
            made.run.begin("autoencoder", batch, images=10 * BATCH, last=True, share=True, count=BATCH)
            made.run.gradients(made.method.autoencoder(batch, made.run))  # type: ignore[attr-defined]
            made.run.balance.update(made.ranks.sum, world=1)
        found.append(float(made.run.kept["weight/adversarial"][0]))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_a_weight_of_zero_switches_the_term_off(ranks: Ranks) -> None:
    made = build(ranks, "output", adversarial_weight=0.0)
    for number in range(2):
        made.update(number)
    assert "loss/autoencoder/adversarial" not in made.run.kept
    assert all(bool(p.isfinite().all()) for p in made.engines["autoencoder"].network.parameters())

"""Adversarial losses: each pulls the way its paper says, by finite differences, and pairs what belongs together."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.losses.adversarial import LOSSES

NAMES = sorted(LOSSES)
LOGITS = st.floats(-4.0, 4.0)
SMALL = 1e-4
# d/d logit of the discriminator at real and at fake, and of the generator at fake, from the papers
SLOPES = {
    "non_saturating": (lambda r, f: -_s(-r), lambda r, f: _s(f), lambda r, f: -_s(-f)),
    "hinge": (lambda r, f: -float(r < 1), lambda r, f: float(f > -1), lambda r, f: -1.0),
    "least_squares": (lambda r, f: r - 1, lambda r, f: f, lambda r, f: f - 1),
    "wasserstein": (lambda r, f: -1.0, lambda r, f: 1.0, lambda r, f: -1.0),
    "relativistic": (lambda r, f: -_s(f - r), lambda r, f: _s(f - r), lambda r, f: -_s(r - f)),
}


def _s(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def one(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


def judged(name: str, real: torch.Tensor, *fakes: torch.Tensor) -> torch.Tensor:
    """The discriminator's loss, (B,)."""
    return LOSSES[name].discriminator(torch.cat([real, *fakes]), len(real)).loss


def slope(function, at: float) -> float:
    return (function(at + SMALL) - function(at - SMALL)) / (2 * SMALL)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None)
@given(real=LOGITS, fake=LOGITS)
def test_each_player_is_pulled_by_the_papers_slope(name: str, real: float, fake: float) -> None:
    if name == "hinge" and min(abs(real - 1), abs(fake + 1)) < 2 * SMALL:
        return  # at its kinks the hinge has no slope
    loss, expected = LOSSES[name], [f(real, fake) for f in SLOPES[name]]
    found = [
        slope(lambda r: judged(name, one(r), one(fake)).item(), real),
        slope(lambda f: judged(name, one(real), one(f)).item(), fake),
        slope(lambda f: loss.generator(one(f), one(real)).item(), fake),
    ]
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_autograd_agrees_with_finite_differences(name: str) -> None:
    rng = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(n, 2, 3, generator=rng, dtype=torch.float64).requires_grad_() for n in (2, 4))
    assert torch.autograd.gradcheck(lambda *rows: judged(name, *rows), (real, fake))
    assert torch.autograd.gradcheck(LOSSES[name].generator, (fake, real))


@pytest.mark.parametrize("name", NAMES)
def test_the_discriminator_feels_both_real_and_fake_and_the_two_players_pull_apart(name: str) -> None:
    real, fake = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    at_real, at_fake = torch.autograd.grad(judged(name, real, fake).sum(), (real, fake))
    (of_generator,) = torch.autograd.grad(LOSSES[name].generator(fake, real.detach()).sum(), fake)
    assert (at_real < 0).all()  # real logits rise
    # fake logits fall; least squares wants them at 0, where they are
    assert (at_fake > 0).all() if name != "least_squares" else (at_fake == 0).all()
    assert (of_generator < 0).all()  # the generator raises its own


@pytest.mark.parametrize(
    ("name", "discriminator", "generator"),
    [
        ("non_saturating", 2 * math.log(2), math.log(2)),
        ("hinge", 2.0, 0.0),
        ("least_squares", 0.5, 0.5),
        ("wasserstein", 0.0, 0.0),
        ("relativistic", math.log(2), math.log(2)),
    ],
)
def test_a_discriminator_that_knows_nothing_has_the_known_loss(
    name: str, discriminator: float, generator: float
) -> None:
    zero = torch.zeros(2)
    assert judged(name, zero, zero).tolist() == pytest.approx([discriminator] * 2)
    assert LOSSES[name].generator(zero, zero).tolist() == pytest.approx([generator] * 2)


@pytest.mark.parametrize("name", NAMES)
def test_k_fakes_are_paired_with_the_real_image_of_their_row(name: str) -> None:
    rng = torch.Generator().manual_seed(0)
    real, fakes = torch.randn(3, generator=rng), torch.randn(2, 3, generator=rng)
    loss = LOSSES[name]
    apart = torch.stack([judged(name, real, fake) for fake in fakes])
    torch.testing.assert_close(judged(name, real, *fakes), apart.mean(0))
    torch.testing.assert_close(
        loss.generator(fakes.flatten(), real), torch.cat([loss.generator(fake, real) for fake in fakes])
    )


@pytest.mark.parametrize("name", NAMES)
def test_patches_are_averaged_after_the_loss_one_value_a_sample(name: str) -> None:
    rng = torch.Generator().manual_seed(0)
    real, fake = torch.randn(2, 3, 4, generator=rng), torch.randn(2, 3, 4, generator=rng)
    loss = LOSSES[name]
    for function, first, second in ((partial(judged, name), real, fake), (loss.generator, fake, real)):
        by_patch = function(first.flatten(), second.flatten()).view(2, -1).mean(1)
        torch.testing.assert_close(function(first, second), by_patch)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_logits_give_float32(name: str) -> None:
    zero = torch.zeros(2, dtype=torch.bfloat16)
    verdict = LOSSES[name].discriminator(torch.cat([zero, zero]), 2)
    assert {verdict.loss.dtype, *(share.dtype for share in verdict.accuracy.values())} == {torch.float32}
    assert LOSSES[name].generator(zero, zero).dtype == torch.float32


def test_only_paired_losses_need_real_logits_for_the_generator() -> None:
    assert [name for name in NAMES if LOSSES[name].paired] == ["relativistic"]
    for name in NAMES:
        if LOSSES[name].paired:
            with pytest.raises(AssertionError, match="real logits"):
                LOSSES[name].generator(torch.zeros(2), None)
        else:
            assert LOSSES[name].generator(torch.zeros(2), None).shape == (2,)


def test_logits_that_cannot_be_paired_are_a_bug() -> None:
    with pytest.raises(AssertionError, match="whole number"):
        LOSSES["hinge"].discriminator(torch.zeros(5), 2)
    with pytest.raises(AssertionError, match="whole number"):
        LOSSES["hinge"].discriminator(torch.zeros(2), 2)  # no fakes
    with pytest.raises(AssertionError, match="whole number"):
        LOSSES["relativistic"].generator(torch.zeros(3), torch.zeros(2))
    with pytest.raises(AssertionError, match="paired"):
        LOSSES["relativistic"].generator(torch.zeros(2, 3, 3), torch.zeros(2, 3, 4))


@pytest.mark.parametrize("name", NAMES)
def test_accuracies_are_the_shares_that_were_told_right(name: str) -> None:
    real = torch.tensor([[1.0, -1.0], [2.0, 0.5], [0.0, 0.0]])  # two patches each
    fakes = torch.tensor([[[2.0, -2.0], [-1.0, -1.0], [0.0, 1.0]], [[-1.0, -2.0], [-1.0, 3.0], [-1.0, -1.0]]])
    found = LOSSES[name].discriminator(torch.cat([real, *fakes]).requires_grad_(), 3).accuracy
    assert not any(share.requires_grad for share in found.values())
    shares = {key: share.tolist() for key, share in found.items()}
    if LOSSES[name].paired:
        assert shares == {"pairs": [0.5, 1.0, 0.0, 1.0, 0.5, 1.0]}
    else:  # a logit of 0 tells neither
        assert shares == {"real": [0.5, 1.0, 0.0], "fake": [0.5, 1.0, 0.0, 1.0, 0.5, 1.0]}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_stays_so(name: str) -> None:
    for bad in (float("nan"), float("inf")):
        loss = judged(name, torch.zeros(2), torch.tensor([bad, 0.0]))
        assert not loss[0].isfinite() and loss[1].isfinite()

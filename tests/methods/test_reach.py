"""Which loss reaches which network, for every method and phase, and that it pushes the way its paper says.

The references get this wrong in ways that still train; each such mistake is a test of its name at the end.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.parallel.cases import BATCH, Small, global_batch, make_config, small
from trainer.losses import adversarial
from trainer.losses.balance import Term
from trainer.parallel.ranks import Ranks

IMAGES = 8 * BATCH  # every schedule of tests/parallel/cases.py has begun, and a lazy penalty is due


CONV = {"kind": "conv", "width": 8, "multipliers": [1, 2], "latent": 4}
CRITIC = {"kind": "global", "width": 8, "multipliers": [1, 2]}
METHODS: dict[str, dict[str, Any]] = {
    "vae": {"kind": "vae", "autoencoder": CONV, "likelihood": {"kind": "gaussian", "learn_scale": True}},
    "gan": {
        "kind": "gan",
        "generator": CONV,
        "discriminator": CRITIC,
        "critic": {"loss": "relativistic", "r1": 0.2, "r2": 0.2},
    },
    "gan_wasserstein": {
        "kind": "gan",
        "generator": CONV,
        "discriminator": CRITIC,
        "critic": {"loss": "wasserstein", "gradient_penalty": 10.0, "augment": ["color", "translation", "cutout"]},
    },
    "vaegan": {
        "kind": "vaegan",
        "autoencoder": CONV,
        "discriminator": {"kind": "patch", "width": 8, "layers": 1},
        "likelihood": {"kind": "laplace"},
        "kl": {"weight": 0.1},
        "critic": {"loss": "hinge", "r1": 0.2},
        "balance": {"kind": "none"},
        "prior_weight": 3.0,
    },
    "vaegan_larsen": {
        "kind": "vaegan_larsen",
        "encoder": CONV,
        "decoder": CONV,
        "discriminator": CRITIC,
        "critic": {"loss": "non_saturating", "r1": 0.2},
    },
}

# (method, phase, loss) -> the parts of networks that its gradient reaches; everything else must get none. A part is
# the first name of a parameter, or of a network whose parts are no different ("*").
E, D, S = "autoencoder.encoder", "autoencoder.decoder", "autoencoder.log_scale"
REACH: dict[tuple[str, str, str], set[str]] = {
    ("vae", "autoencoder", "nll"): {E, D, S},
    ("vae", "autoencoder", "kl"): {E},
    ("gan", "discriminator", "adversarial"): {"discriminator"},
    ("gan", "discriminator", "r1"): {"discriminator"},
    ("gan", "discriminator", "r2"): {"discriminator"},
    ("gan", "generator", "adversarial"): {"generator"},
    ("gan_wasserstein", "discriminator", "adversarial"): {"discriminator"},
    ("gan_wasserstein", "discriminator", "gradient_penalty"): {"discriminator"},
    ("gan_wasserstein", "generator", "adversarial"): {"generator"},
    ("vaegan", "discriminator", "adversarial"): {"discriminator"},
    ("vaegan", "discriminator", "r1"): {"discriminator"},
    ("vaegan", "autoencoder", "nll"): {E, D},
    ("vaegan", "autoencoder", "kl"): {E},
    ("vaegan", "autoencoder", "adversarial"): {E, D},
    ("vaegan", "autoencoder", "adversarial_prior"): {D},
    ("vaegan_larsen", "discriminator", "adversarial"): {"discriminator"},
    ("vaegan_larsen", "discriminator", "r1"): {"discriminator"},
    ("vaegan_larsen", "decoder", "similarity"): {"decoder"},
    ("vaegan_larsen", "decoder", "adversarial"): {"decoder"},
    ("vaegan_larsen", "decoder", "adversarial_prior"): {"decoder"},
    ("vaegan_larsen", "encoder", "kl"): {"encoder"},
    ("vaegan_larsen", "encoder", "similarity"): {"encoder"},
}


def part(network: str, parameter: str) -> str:
    return f"{network}.{parameter.split('.')[0]}" if network == "autoencoder" else network


def prepare(ranks: Ranks, method: str, **changes: Any) -> Small:
    made = small(make_config(METHODS[method], "sgd", 1, 1, **changes), ranks)
    with torch.no_grad():  # an encoder at its initialisation is nearly the prior: move it so that each gradient shows
        for engine in made.engines.values():
            for name, parameter in engine.network.named_parameters():
                if name.endswith("encoder.head.bias"):
                    parameter.add_(0.3)
    return made


def terms_of(made: Small, phase: str, *, update: int = 0) -> dict[str, Term]:
    """The terms of a phase, on their leaves."""
    made.run.end()
    batch = global_batch(update)
    made.run.begin(phase, batch, images=IMAGES, last=True, share=True, count=len(batch.image))
    found: dict[str, Term] = getattr(made.method, phase)(batch, made.run)
    return found


def hand_over(made: Small, phase: str, terms: dict[str, Term]) -> dict[str, dict[str, Tensor]]:
    """network -> parameter -> gradient, of every network, after the phase's backward; and clears them."""
    made.engines[phase].backward(*made.run.gradients(terms), last=True)
    found = {
        name: {key: p.grad.clone() for key, p in engine.network.named_parameters() if p.grad is not None}
        for name, engine in made.engines.items()
    }
    for engine in made.engines.values():
        engine.network.zero_grad()
    return found


def test_the_table_names_every_loss_of_every_phase(ranks: Ranks) -> None:
    found = set()
    for method in METHODS:
        made = prepare(ranks, method)
        for phase in made.method.phases(IMAGES):
            found |= {(method, phase, loss) for loss in terms_of(made, phase)}
    assert found == set(REACH)


@pytest.mark.parametrize(("method", "phase", "loss"), REACH)
def test_each_loss_reaches_the_networks_that_it_should_and_no_other(
    ranks: Ranks, method: str, phase: str, loss: str
) -> None:
    made = prepare(ranks, method)
    for other in made.method.phases(IMAGES)[: made.method.phases(IMAGES).index(phase)]:
        hand_over(made, other, terms_of(made, other))  # what ran before in this update must leave nothing
    gradients = hand_over(made, phase, {loss: terms_of(made, phase)[loss]})
    reached = {
        part(name, key) for name, found in gradients.items() for key, gradient in found.items() if bool(gradient.any())
    }
    assert reached == REACH[method, phase, loss]
    for name, found in gradients.items():
        if name != phase:
            assert not found, f"{name} holds gradients after the phase of {phase}"


@pytest.mark.parametrize(("method", "phase", "loss"), REACH)
def test_the_gradient_is_the_slope_of_the_applied_loss(ranks: Ranks, method: str, phase: str, loss: str) -> None:
    """Weights moved by e against the gradient lower the mean of weight * loss by e |g|^2: central differences.

    Values of size L are float32, with errors of about 1e-7 L; the change is 1e-3 L, so the slope is right
    to 1e-4. What remains are kinks of LeakyReLUs within the step, where a penalty's own slope jumps: 5%."""
    made = prepare(ranks, method)
    term = terms_of(made, phase)[loss]
    gradient = hand_over(made, phase, {loss: term})[phase]
    square = sum(float(g.double().square().sum()) for g in gradient.values())
    parameters = dict(made.engines[phase].network.named_parameters())

    def value() -> float:
        found = terms_of(made, phase)[loss]
        return found.weight * found.scale * float(found.value.detach().double().mean())

    step = 1e-3 * term.weight * term.scale * float(term.value.detach().abs().mean()) / square

    def moved(factor: float) -> float:
        with torch.no_grad():
            for key, g in gradient.items():
                parameters[key].add_(g, alpha=factor)
        try:
            return value()
        finally:
            with torch.no_grad():
                for key, g in gradient.items():
                    parameters[key].sub_(g, alpha=factor)

    slope = (moved(step) - moved(-step)) / (2 * step)
    assert slope == pytest.approx(square, rel=0.05)
    assert slope > 0


# ---------------------------------------------------------------- the way each player moves
def logits(made: Small, generator: str) -> tuple[Tensor, Tensor]:
    """D(real) and D(fake) of the batch as it stands."""
    batch = global_batch(0)
    networks = {name: engine.network for name, engine in made.engines.items()}
    made.run.begin("discriminator", batch, images=IMAGES, last=True, share=True, count=BATCH)
    with torch.no_grad():
        if generator == "generator":
            fake = made.method.decode(networks, made.run.normal("latent", made.method.latent_size))
        else:
            z = made.run.normal("posterior", made.method.latent_size)
            mean, logvar = made.method.encode(networks, batch.image)  # type: ignore[attr-defined]
            fake = made.method.decode(networks, mean + (0.5 * logvar).exp() * z)
        verdict = networks["discriminator"]
        return verdict(batch.image), verdict(fake)


def take(made: Small, phase: str, losses: set[str] | None = None) -> None:
    """One step of SGD of a phase, of some of its losses."""
    terms = terms_of(made, phase)
    chosen = {name: term for name, term in terms.items() if losses is None or name in losses}
    made.engines[phase].backward(*made.run.gradients(chosen), last=True)
    made.engines[phase].step(IMAGES, batch=BATCH)
    made.run.end()


GAMES = [("gan", name) for name in adversarial.LOSSES] + [("vaegan", name) for name in adversarial.LOSSES]
GENERATOR = {"gan": "generator", "vaegan": "autoencoder", "vaegan_larsen": "decoder"}


def game(ranks: Ranks, method: str, loss: str) -> Small:
    # the smallest of penalties for the loss that is refused without: it moves nothing that these tests can see
    bound = {"gradient_penalty": 1e-9} if loss == "wasserstein" else {}
    tree = METHODS[method] | {"critic": {"loss": loss, **bound}}
    return small(make_config(tree, "sgd", 1, 1, optim={"lr": 1e-3, "betas": [0.0, 0.9], "ema_half_life": 0}), ranks)


@pytest.mark.parametrize(("method", "loss"), GAMES)
def test_a_discriminators_update_raises_real_over_fake(ranks: Ranks, method: str, loss: str) -> None:
    made = game(ranks, method, loss)
    real, fake = logits(made, GENERATOR[method])
    take(made, "discriminator")
    real_after, fake_after = logits(made, GENERATOR[method])
    assert float(real_after.mean() - fake_after.mean()) > float(real.mean() - fake.mean())


@pytest.mark.parametrize(("method", "loss"), GAMES)
def test_a_generators_update_raises_what_the_discriminator_says_of_fakes(ranks: Ranks, method: str, loss: str) -> None:
    made = game(ranks, method, loss)
    real, fake = logits(made, GENERATOR[method])
    take(made, GENERATOR[method], {"adversarial"})
    real_after, fake_after = logits(made, GENERATOR[method])
    assert float(fake_after.mean()) > float(fake.mean())
    assert torch.equal(real_after, real)  # the discriminator has not moved


def test_larsens_decoder_raises_what_the_discriminator_says_of_reconstructions(ranks: Ranks) -> None:
    made = game(ranks, "vaegan_larsen", "non_saturating")
    real, fake = logits(made, "decoder")
    take(made, "decoder", {"adversarial"})
    real_after, fake_after = logits(made, "decoder")
    assert float(fake_after.mean()) > float(fake.mean())
    assert torch.equal(real_after, real)


@pytest.mark.parametrize(
    ("method", "phase", "loss"),
    [
        ("vae", "autoencoder", "nll"),
        ("vae", "autoencoder", "kl"),
        ("vaegan", "autoencoder", "nll"),
        ("vaegan", "autoencoder", "kl"),
        ("vaegan_larsen", "encoder", "kl"),
        ("vaegan_larsen", "encoder", "similarity"),
        ("vaegan_larsen", "decoder", "similarity"),
    ],
)
def test_an_update_by_a_loss_alone_lowers_it(ranks: Ranks, method: str, phase: str, loss: str) -> None:
    made = prepare(ranks, method, optim={"lr": 1e-4, "betas": [0.0, 0.9], "ema_half_life": 0})
    before = float(terms_of(made, phase)[loss].value.detach().double().mean())
    take(made, phase, {loss})
    assert float(terms_of(made, phase)[loss].value.detach().double().mean()) < before


# ---------------------------------------------------------------- mistakes of references that still train
def slope_at(made: Small, phase: str, loss: str, of: Callable[[Any], Tensor]) -> Tensor:
    terms = terms_of(made, phase)
    (found,) = torch.autograd.grad(terms[loss].value.sum(), of(made.run.leaves), allow_unused=True)
    assert found is not None
    return found


@pytest.mark.parametrize("loss", adversarial.LOSSES)
def test_not_llamagen_the_discriminator_learns_from_fakes_as_much_as_from_real_images(ranks: Ranks, loss: str) -> None:
    """Arguments of the cross entropy swapped: the gradient at the fake logits was 0, at the real ones a constant."""
    made = game(ranks, "gan", loss)
    real, fake = slope_at(made, "discriminator", "adversarial", lambda leaves: leaves["logits"]).chunk(2)
    assert bool((real < 0).all()), "minimised: D(real) must rise"
    assert bool((fake > 0).all()), "minimised: D(fake) must fall"
    if loss in ("hinge", "wasserstein", "relativistic", "non_saturating"):  # at logits near 0 both pull alike
        assert float(-real.mean()) == pytest.approx(float(fake.mean()), rel=0.2)


def test_not_pythae_the_decoders_adversarial_sign_does_not_turn_when_the_discriminator_updates_too(
    ranks: Ranks,
) -> None:
    """The decoder's step was taken after the discriminator's backward without clearing: (1 - s) rec + (1 - s) L_D.

    Here: the decoder's gradient after a discriminator's phase is that of a copy that never ran one."""
    made, alone = (game(ranks, "vaegan_larsen", "non_saturating") for _ in range(2))
    terms = terms_of(made, "discriminator")
    made.engines["discriminator"].backward(*made.run.gradients(terms), last=True)  # gradients stay in D, on purpose
    with_both = hand_over(made, "decoder", terms_of(made, "decoder"))["decoder"]
    expected = hand_over(alone, "decoder", terms_of(alone, "decoder"))["decoder"]
    assert with_both.keys() == expected.keys()
    for key, gradient in expected.items():
        assert torch.allclose(with_both[key], gradient, rtol=1e-6, atol=1e-9), key


def test_not_diffusers_the_perceptual_distance_trains_the_autoencoder(ranks: Ranks) -> None:
    """The distance was computed inside no_grad, so its weight changed nothing."""

    class Pixels(nn.Module):
        def distance(self, x: Tensor, y: Tensor) -> Tensor:
            return (x - y).square().mean((1, 2, 3))

    made = prepare(ranks, "vaegan")
    made.method.perceptual = Pixels()  # type: ignore[attr-defined]
    terms = terms_of(made, "autoencoder")
    gradients = hand_over(made, "autoencoder", {"perceptual": terms["perceptual"]})
    reached = {part("autoencoder", key) for key, gradient in gradients["autoencoder"].items() if bool(gradient.any())}
    assert reached == {E, D}
    assert not gradients["discriminator"]


@pytest.mark.parametrize("method", ["gan", "vaegan", "vaegan_larsen"])
def test_not_taming_the_discriminators_gradient_is_that_of_one_which_never_saw_a_generators_update(
    ranks: Ranks, method: str
) -> None:
    """F2-2: the generator's loss filled D's gradients, and D's next update added them, of the opposite sign."""
    made, fresh = (game(ranks, method, "non_saturating") for _ in range(2))
    phase = GENERATOR[method]
    terms = terms_of(made, phase)
    made.engines[phase].backward(*made.run.gradients(terms), last=True)
    assert all(p.grad is None for p in made.engines["discriminator"].network.parameters())
    made.engines[phase].network.zero_grad()
    found = hand_over(made, "discriminator", terms_of(made, "discriminator"))
    expected = hand_over(fresh, "discriminator", terms_of(fresh, "discriminator"))
    for key, gradient in expected["discriminator"].items():
        assert torch.allclose(found["discriminator"][key], gradient, rtol=1e-6, atol=1e-9), key
    assert not found[phase], "not vqgan-training: the discriminator's loss reached the generator"


@pytest.mark.parametrize("method", ["gan", "vaegan", "vaegan_larsen"])
def test_not_nemo_the_discriminator_is_frozen_in_no_update_of_its_own(ranks: Ranks, method: str) -> None:
    """The order of clearing and stepping froze D; here every phase of an update moves its network, twice in a row."""
    made = small(make_config(METHODS[method], "sgd", 1, 1), ranks)
    for number in range(2):
        before = {name: [p.detach().clone() for p in e.network.parameters()] for name, e in made.engines.items()}
        made.update(number)
        for name, engine in made.engines.items():
            moved = [not torch.equal(p, q) for p, q in zip(engine.network.parameters(), before[name], strict=True)]
            assert sum(moved) > len(moved) / 2, f"{name}, update {number}"


def test_not_diffusers_each_batch_trains_both_networks(ranks: Ranks) -> None:
    """Batches alternated between the two networks; here one update is one step of each active network."""
    for method, phases in (
        ("vae", ("autoencoder",)),
        ("gan", ("discriminator", "generator")),
        ("vaegan", ("discriminator", "autoencoder")),
        ("vaegan_larsen", ("discriminator", "decoder", "encoder")),
    ):
        made = small(make_config(METHODS[method], "adam", 1, 1), ranks)
        assert made.method.phases(IMAGES) == phases
        for number in range(3):
            made.update(number)
        for name in phases:
            steps = {int(state["step"]) for state in made.engines[name].optimizer.state.values()}  # type: ignore[attr-defined]
            assert steps == {3}, name


def test_not_ganomaly_the_discriminator_is_trained_by_the_game_itself(ranks: Ranks) -> None:
    for method in ("gan", "vaegan", "vaegan_larsen"):
        assert "adversarial" in terms_of(prepare(ranks, method), "discriminator")


def test_not_bolts_the_weight_of_the_kl_is_applied(ranks: Ranks) -> None:
    """kl_coeff was read and never used (lightning-bolts#328)."""
    gradients = []
    for weight in (0.1, 0.3):
        made = small(make_config(METHODS["vae"] | {"kl": {"weight": weight}}, "sgd", 1, 1), ranks)
        terms = terms_of(made, "autoencoder")
        gradients.append(hand_over(made, "autoencoder", {"kl": terms["kl"]})["autoencoder"])
    for key, gradient in gradients[0].items():
        assert torch.allclose(gradients[1][key], 3.0 * gradient, rtol=1e-5, atol=1e-8), key

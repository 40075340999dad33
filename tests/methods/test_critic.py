"""Penalties as the methods apply them: their arithmetic, and the factor of a lazy interval."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.methods.test_reach import hand_over
from tests.parallel.cases import BATCH, SIZE, Small, global_batch, make_config, small
from trainer.losses.balance import Term
from trainer.parallel.ranks import Ranks

GAMMA, LAZY = 10.0, 4


class Linear(nn.Module):
    """D(x) = w.x over the flattened image, |w| = 3, whatever the size."""

    def __init__(self) -> None:
        super().__init__()
        w = torch.arange(1.0, SIZE * SIZE + 1)
        self.w = nn.Parameter(3.0 * w / w.norm())

    def forward(self, image: Tensor) -> Tensor:
        return image.flatten(1) @ self.w


def game(ranks: Ranks, critic: dict[str, Any], *, accumulate: int = 1) -> Small:
    tree = {
        "kind": "gan",
        "generator": {"kind": "conv", "width": 8, "multipliers": [1, 2], "latent": 4},
        "discriminator": {"kind": "global", "width": 8, "multipliers": [1]},  # `Linear` takes its place
        "critic": critic,
    }
    return small(make_config(tree, "sgd", accumulate, 1), ranks, networks={"discriminator": Linear()})


def terms_at(made: Small, update: int) -> dict[str, Term]:
    batch = global_batch(update)
    made.run.end()
    images = update * BATCH
    made.run.begin("discriminator", batch, images=images, last=True, share=True, count=len(batch.image))
    found: dict[str, Term] = made.method.discriminator(batch, made.run)  # type: ignore[attr-defined]
    return found


def test_r1_and_r2_are_gamma_half_times_the_squared_norm(ranks: Ranks) -> None:
    made = game(ranks, {"loss": "relativistic", "r1": GAMMA, "r2": GAMMA})
    terms = terms_at(made, 0)
    w = made.engines["discriminator"].network.w.detach()
    for name in ("r1", "r2"):
        assert terms[name].value.tolist() == pytest.approx(BATCH * [9.0], rel=1e-6)
        assert terms[name].weight * float(terms[name].value.detach().mean()) == pytest.approx(45.0, rel=1e-6)
        gradient = hand_over(made, "discriminator", {name: terms_at(made, 0)[name]})["discriminator"]["w"]
        assert torch.allclose(gradient, GAMMA * w, rtol=1e-5)  # d(gamma / 2 |w|^2) / dw


def test_the_two_sided_wasserstein_penalty_is_lambda_times_the_squared_distance_to_one(ranks: Ranks) -> None:
    made = game(ranks, {"loss": "wasserstein", "gradient_penalty": GAMMA})
    term = terms_at(made, 0)["gradient_penalty"]
    assert term.value.tolist() == pytest.approx(BATCH * [4.0], rel=1e-5)
    assert term.weight == GAMMA


class Quadratic(nn.Module):
    """D(x) = |x|^2 / 2, whose gradient at x is x."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, image: Tensor) -> Tensor:
        return 0.5 * self.one * image.flatten(1).square().sum(1)


@pytest.mark.parametrize("augment", [[], ["cutout"]])
def test_the_wasserstein_penalty_is_taken_between_the_real_image_and_every_fake_unaugmented(
    ranks: Ranks, augment: list[str]
) -> None:
    """real 0, reconstructions 0 and prior samples of norm 8: a mix with the latter has norm 8 u, u uniform."""
    tree = {
        "kind": "vaegan",
        "autoencoder": {"kind": "conv", "width": 8, "multipliers": [1, 2], "latent": 4},
        "discriminator": {"kind": "global", "width": 8, "multipliers": [1]},  # `Quadratic` takes its place
        "critic": {"loss": "wasserstein", "gradient_penalty": GAMMA, "augment": augment},
        "prior_weight": 1.0,
    }
    made = small(make_config(tree, "sgd", 1, 1), ranks, networks={"discriminator": Quadratic()})
    batch = global_batch(0)
    made.run.begin("discriminator", batch, images=0, last=True, share=True, count=BATCH)
    real = torch.zeros_like(batch.image)
    fakes = [torch.zeros_like(real), torch.full_like(real, 8.0 / SIZE)]  # one channel
    term = made.method.critic.discriminate(made.run, real, fakes)["gradient_penalty"]  # type: ignore[attr-defined]
    assert term.value.shape == (BATCH,) and term.weight == GAMMA
    values = term.value.detach()  # the mean of 1, at the mix of zeros, and (8 u - 1)^2, which is 0 to 49
    assert bool((values >= 0.5 - 1e-5).all()) and bool((values <= 25.0 + 1e-3).all())
    assert len(set(values.tolist())) == BATCH
    assert float(values.mean()) == pytest.approx(7.67, abs=5.8)  # of 16 draws with a deviation of 7.7 each, 3 sigma


@pytest.mark.parametrize(
    ("name", "critic"),
    [
        ("r1", {"loss": "hinge", "r1": GAMMA}),
        ("r2", {"loss": "relativistic", "r2": GAMMA}),
        ("gradient_penalty", {"loss": "wasserstein", "gradient_penalty": GAMMA}),
    ],
)
def test_a_lazy_penalty_comes_every_kth_update_k_times_as_large_and_is_logged_as_it_is(
    ranks: Ranks, name: str, critic: dict[str, Any]
) -> None:
    always, lazy = game(ranks, critic), game(ranks, critic | {"penalty_interval": LAZY * BATCH})
    came = []
    for update in range(2 * LAZY):
        terms = terms_at(lazy, update)
        came.append(name in terms)
        assert "adversarial" in terms
        if name not in terms:
            continue
        each = terms_at(always, update)
        assert torch.equal(terms[name].value, each[name].value)
        assert terms[name].weight == LAZY * each[name].weight
        applied = hand_over(lazy, "discriminator", {name: terms_at(lazy, update)[name]})["discriminator"]["w"]
        expected = hand_over(always, "discriminator", {name: terms_at(always, update)[name]})["discriminator"]["w"]
        assert torch.allclose(applied, LAZY * expected, rtol=1e-6)
    assert came == 2 * ([True] + (LAZY - 1) * [False])
    for made in (always, lazy):
        made.run.kept.clear()
        made.update(0)
    (logged,), (plain,) = (made.run.kept[f"loss/discriminator/{name}"] for made in (lazy, always))
    assert torch.equal(logged, plain)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_a_lazy_penalty_counts_images_not_micro_batches(ranks: Ranks, accumulate: int) -> None:
    made = game(ranks, {"loss": "hinge", "r1": GAMMA, "penalty_interval": LAZY * BATCH}, accumulate=accumulate)
    came = []
    for update in range(2 * LAZY):
        made.run.kept.clear()
        made.update(update)
        came.append(len(made.run.kept.get("loss/discriminator/r1", [])))
    assert came == 2 * ([accumulate] + (LAZY - 1) * [0])


@pytest.mark.parametrize("interval", [BATCH - 1, BATCH + 8, 1])
def test_an_interval_that_is_no_multiple_of_the_batch_is_refused_with_the_nearest(ranks: Ranks, interval: int) -> None:
    nearest = max(1, round(interval / BATCH)) * BATCH
    with pytest.raises(
        ValueError, match=f"critic.penalty_interval: {interval} images .* batch of 16; nearest: {nearest}"
    ):
        game(ranks, {"loss": "hinge", "r1": 1.0, "penalty_interval": interval})


def test_augmentation_changes_real_and_fake_of_a_position_alike_and_in_both_phases(ranks: Ranks) -> None:
    made = game(ranks, {"loss": "hinge", "augment": ["color", "translation", "cutout"]})
    critic = made.method.critic  # type: ignore[attr-defined]
    batch = global_batch(0)
    made.run.begin("discriminator", batch, images=0, last=True, share=True, count=BATCH)
    same = critic.augmented(made.run, torch.cat([batch.image, batch.image]))
    assert torch.equal(same[:BATCH], same[BATCH:])
    assert not torch.equal(same[:BATCH], batch.image)
    made.run.begin("generator", batch, images=0, last=True, share=True, count=BATCH)
    assert torch.equal(critic.augmented(made.run, batch.image), same[:BATCH])


def test_penalties_are_taken_at_the_images_before_augmentation(ranks: Ranks) -> None:
    """Huang et al. 2024. Cutout takes a part of the image out of reach, so the norm there is smaller than |w| = 3."""
    made = game(ranks, {"loss": "hinge", "r1": GAMMA, "augment": ["cutout"]})
    values = terms_at(made, 0)["r1"].value
    assert bool((values < 9.0).all())
    assert math.isfinite(float(values.detach().sum()))


@pytest.mark.parametrize("name", ["r1", "r2"])
def test_over_an_interval_a_lazy_penalty_pulls_as_much_as_one_in_every_update_in_as_many_steps(
    ranks: Ranks, name: str
) -> None:
    """So the rate and the betas of Karras et al. 2020, appendix B, which make up for k + 1 steps in the place of k, do
    not apply. On a discriminator whose penalty is the same at every image, the means are the same."""
    critic = {"loss": "relativistic", name: GAMMA}
    means, rates, steps = [], [], []
    for interval in (0, LAZY * BATCH):
        made = game(ranks, critic | {"penalty_interval": interval})
        network = made.engines["discriminator"].network
        total = torch.zeros_like(network.w)
        for update in range(LAZY):
            terms = terms_at(made, update)
            if name in terms:
                total += hand_over(made, "discriminator", {name: terms[name]})["discriminator"]["w"]
        means.append(total / LAZY)
        rates.append(made.engines["discriminator"].rate(BATCH))
        taken: list[None] = []
        optimizer = made.engines["discriminator"].optimizer  # type: ignore[attr-defined]
        optimizer.register_step_post_hook(lambda *_, taken=taken: taken.append(None))
        for update in range(LAZY):
            made.update(update)
        steps.append(len(taken))
    torch.testing.assert_close(means[0], means[1], rtol=1e-5, atol=0)
    assert rates[0] == rates[1] and steps == [LAZY, LAZY]


@pytest.mark.parametrize("loss", ["relativistic", "hinge"])
@pytest.mark.parametrize("augment", [[], ["color", "cutout"]])
def test_each_penalty_alone_is_that_of_both(ranks: Ranks, loss: str, augment: list[str]) -> None:
    """Alone it differentiates its own images only, in a forward of their own."""
    found = {}
    for given in ({"r1": GAMMA, "r2": GAMMA}, {"r1": GAMMA}, {"r2": GAMMA}, {}):
        tree = {
            "kind": "gan",
            "generator": {"kind": "conv", "width": 8, "multipliers": [1, 2], "latent": 4},
            "discriminator": {"kind": "global", "width": 8, "multipliers": [1, 2]},
            "critic": {"loss": loss, "augment": augment, **given},
        }
        made = small(make_config(tree, "sgd", 1, 1), ranks)
        terms = terms_at(made, 0)
        assert set(terms) == {"adversarial", *given}
        found[tuple(given)] = {
            name: (
                term.value.detach(),
                hand_over(made, "discriminator", {name: terms_at(made, 0)[name]})["discriminator"],
            )
            for name, term in terms.items()
        }
    both = found["r1", "r2"]
    for some in found.values():
        for name, (value, gradients) in some.items():
            torch.testing.assert_close(value, both[name][0], rtol=1e-5, atol=1e-6)
            largest = max(float(one.abs().max()) for one in both[name][1].values())
            for key, one in gradients.items():
                torch.testing.assert_close(one, both[name][1][key], rtol=1e-4, atol=1e-5 * largest)


def test_finite_differences_are_those_of_each_images_own_noise(ranks: Ranks) -> None:
    """D(x) = w x, so each is (w n)^2, whatever sigma: by position, the same for any sharing out."""
    critic = {"loss": "relativistic", "r1": GAMMA, "r2": GAMMA, "penalty": "finite_difference", "sigma": 0.1}
    made = game(ranks, critic)
    terms, w = terms_at(made, 0), made.engines["discriminator"].network.w.detach()
    noise = made.run.normal("critic/step2", (2, 1, SIZE, SIZE))
    for name, own in zip(("r1", "r2"), noise.unbind(1), strict=True):
        torch.testing.assert_close(terms[name].value, (own.flatten(1) @ w).square(), rtol=1e-3, atol=1e-3)
        assert terms[name].weight == 0.5 * GAMMA
    gradient = hand_over(made, "discriminator", {"r1": terms_at(made, 0)["r1"]})["discriminator"]["w"]
    n = noise[:, 0].flatten(1)
    torch.testing.assert_close(gradient, GAMMA * ((n @ w)[:, None] * n).mean(0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("critic", "match"),
    [
        ({"loss": "hinge", "r1": 1.0, "penalty": "finite_difference", "sigma": 0.0}, "sigma: 0.0 is no step"),
        ({"loss": "hinge", "r1": 1.0, "penalty": "finite_difference", "sigma": 1e-300}, "sigma: 1e-300 is no step"),
        (
            {"loss": "hinge", "gradient_penalty": 1.0, "penalty": "finite_difference"},
            "gradient_penalty is always exact",
        ),
        ({"loss": "hinge", "r1": 1.0, "penalty": "quick"}, "penalty"),
    ],
)
def test_a_penalty_that_cannot_be_taken_so_is_refused(ranks: Ranks, critic: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        game(ranks, critic)

"""The arithmetic of gradient penalties on a discriminator whose gradient is known: D(x) = w . x, |w| = 3 (F2-8)."""

import pytest
import torch
from torch import Tensor, nn

from trainer.losses import penalties

SIZES = [(2, 4), (8, 4), (2, 8), (8, 8)]


def weight(size: int, channels: int = 1) -> Tensor:
    """|w| = 3 over the whole image."""
    w = torch.randn(channels, size, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    return (3.0 * w / w.norm()).requires_grad_()


def linear(w: Tensor):
    return lambda x: (x * w).sum((1, 2, 3))


def image(batch: int, size: int, channels: int = 1, seed: int = 0) -> Tensor:
    return torch.rand(batch, channels, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def small_network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(2, 3, 3, padding=1), nn.Softplus(), nn.Flatten(), nn.Linear(48, 1), nn.Flatten(0)]
        return nn.Sequential(*layers).double()


@pytest.mark.parametrize("penalty", [penalties.r1, penalties.r2])
@pytest.mark.parametrize(("batch", "size"), SIZES)
def test_the_penalty_is_the_squared_norm_over_the_whole_image(penalty, batch: int, size: int) -> None:
    w, x = weight(size), image(batch, size).requires_grad_()
    gamma = 10.0
    found = gamma / 2 * penalty(linear(w)(x), x)
    assert found.tolist() == pytest.approx([45.0] * batch)
    (gradient,) = torch.autograd.grad(found.mean(), w)
    torch.testing.assert_close(gradient, gamma * w.detach())


@pytest.mark.parametrize(("batch", "size"), SIZES)
def test_the_wasserstein_penalty_is_two_sided(batch: int, size: int) -> None:
    w = weight(size)
    real, fake, mix = image(batch, size), image(batch, size, seed=1), torch.linspace(0, 0.9, batch)
    found = penalties.wasserstein(linear(w), real, fake, mix)
    assert found.tolist() == pytest.approx([4.0] * batch)
    below = penalties.wasserstein(linear(w / 6), real, fake, mix)
    assert below.tolist() == pytest.approx([0.25] * batch)


def test_a_gradient_over_three_channels_is_one_norm() -> None:
    w, x = weight(4, channels=3), image(2, 4, channels=3).requires_grad_()
    assert penalties.r1(linear(w)(x), x).tolist() == pytest.approx([9.0] * 2)


def test_one_interpolation_weight_is_drawn_for_each_image() -> None:
    seen = []

    def discriminator(x: Tensor) -> Tensor:
        seen.append(x.detach())
        return x.square().sum((1, 2, 3)) * torch.ones((), dtype=x.dtype, requires_grad=True)

    real, fake, mix = image(3, 4), image(3, 4, seed=1), torch.tensor([0.0, 0.25, 1.0]).double()
    penalties.wasserstein(discriminator, real, fake, mix)
    assert torch.equal(seen[0][0], fake[0]) and torch.equal(seen[0][2], real[2])
    torch.testing.assert_close(seen[0][1], 0.25 * real[1] + 0.75 * fake[1])
    with pytest.raises(AssertionError, match="one interpolation weight"):
        penalties.wasserstein(discriminator, real, fake, torch.rand(3, 1, 4, 4))


@pytest.mark.parametrize("penalty", [penalties.r1, penalties.r2])
def test_the_penalty_is_that_of_finite_differences(penalty) -> None:
    network, x = small_network(), image(2, 4, channels=2)
    step, squares = 1e-5, torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for flat in range(x[0].numel()):
            move = torch.zeros(32, dtype=torch.float64)
            move[flat] = step
            move = move.view(1, 2, 4, 4)
            squares += ((network(x + move) - network(x - move)) / (2 * step)).square()
    x.requires_grad_()
    torch.testing.assert_close(penalty(network(x), x).detach(), squares, rtol=1e-7, atol=0)


def test_the_penalty_reaches_the_weights_by_the_slope_of_finite_differences() -> None:
    network, x = small_network(), image(2, 4, channels=2).requires_grad_()
    first = network[0].weight

    def value() -> Tensor:
        return penalties.r1(network(x), x).mean()

    (found,) = torch.autograd.grad(value(), first)
    step = 1e-5
    for place in [(0, 0, 1, 1), (2, 1, 0, 2)]:
        with torch.no_grad():
            first[place] += step
        above = value().item()
        with torch.no_grad():
            first[place] -= 2 * step
        below = value().item()
        with torch.no_grad():
            first[place] += step
        assert found[place].item() == pytest.approx((above - below) / (2 * step), rel=1e-5)


def test_each_value_is_its_own_images() -> None:
    network, x = small_network(), image(3, 4, channels=2)
    whole = x.clone().requires_grad_()
    together = penalties.r1(network(whole), whole)
    for row in range(3):
        alone = x[row : row + 1].clone().requires_grad_()
        torch.testing.assert_close(penalties.r1(network(alone), alone), together[row : row + 1])


def test_patches_count_as_their_mean() -> None:
    w, x = weight(4), image(2, 4).requires_grad_()
    logits = torch.stack([linear(w)(x), 3 * linear(w)(x)], 1).view(2, 1, 2)
    assert penalties.r1(logits, x).tolist() == pytest.approx([36.0] * 2)  # twice the gradient


def test_a_flat_discriminator_has_a_finite_gradient() -> None:
    w = torch.zeros(1, 4, 4, dtype=torch.float64, requires_grad=True)
    found = penalties.wasserstein(linear(w), image(2, 4), image(2, 4, seed=1), torch.rand(2))
    (gradient,) = torch.autograd.grad(found.sum(), w)
    assert found.tolist() == pytest.approx([1.0] * 2, abs=1e-5)
    assert gradient.isfinite().all()


def test_a_penalty_that_would_train_nothing_is_a_bug() -> None:
    w, x = weight(4), image(2, 4)
    with pytest.raises(AssertionError, match="require a gradient"):
        penalties.r1(linear(w)(x), x)
    x.requires_grad_()
    with pytest.raises(AssertionError, match="frozen"):
        penalties.r1(linear(w.detach())(x), x)


def test_a_penalty_in_half_precision_is_refused_or_switched_off() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 1), nn.Flatten(0))
    x = torch.rand(2, 1, 4, 4).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network(x)
        with pytest.raises(AssertionError, match="float32"):
            penalties.r1(logits, x)
        inside = penalties.wasserstein(network, x, x.flip(0), torch.rand(2))
    with pytest.raises(AssertionError, match="float32"):
        penalties.r1(logits, x)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, ((network[1].weight.norm() - 1) ** 2).expand(2), rtol=1e-5, atol=1e-6)

"""The arithmetic of gradient penalties on a discriminator whose gradient is known: D(x) = w . x, |w| = 3 (F2-8), and
on shipped ones against plain torch in float64."""

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from trainer.kernels.choose import differentiated_twice
from trainer.kernels.convolution import Conv2d, LeakyReLU, Linear
from trainer.losses import penalties
from trainer.losses.adversarial import LOSSES
from trainer.networks import GlobalDiscriminatorConfig, ImageShape, PatchDiscriminatorConfig

CONVOLUTIONS = ("aten::convolution", "aten::convolution_backward")
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


# ---------------------------------------------------------------- the passes that loss and penalty share
NETWORKS = {
    "global": (GlobalDiscriminatorConfig(width=8, multipliers=(1, 2)), ImageShape(1, 14, 14), True),
    "global of an odd size with blocks": (
        GlobalDiscriminatorConfig(width=4, multipliers=(1, 2), blocks=1), ImageShape(3, 11, 9), True),
    "global with norm": (
        GlobalDiscriminatorConfig(width=8, multipliers=(1, 2), norm="group"), ImageShape(1, 14, 14), False),
    "patch": (PatchDiscriminatorConfig(width=8, layers=2), ImageShape(3, 24, 24), False),
    "patch without norm": (PatchDiscriminatorConfig(width=8, layers=1, norm="none"), ImageShape(1, 16, 16), False),
}  # fmt: skip


def discriminator(name: str, **changes: object) -> tuple[nn.Module, ImageShape, bool]:
    config, shape, shared = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = dataclasses.replace(config, **changes).build(image=shape)
        for bias in (p for n, p in network.named_parameters() if n.endswith("bias")):
            nn.init.normal_(bias, 0.0, 0.3)  # as after training: the initial ones may be 0
    return network.to(memory_format=torch.channels_last), shape, shared


def plainly(network: Callable[[Tensor], Tensor], images: Tensor, change: Callable[[Tensor], Tensor]) -> tuple:
    """R1 and R2 as everybody writes them."""
    images = images.detach().requires_grad_()
    logits = network(change(images))
    (gradient,) = torch.autograd.grad(logits.flatten(1).mean(1).sum() if logits.dim() > 1 else logits.sum(), images,
                                      create_graph=True)  # fmt: skip
    return logits, gradient.square().sum((1, 2, 3))


def gradients(network: nn.Module, logits: Tensor, squares: Tensor, loss: str) -> list[Tensor]:
    value = LOSSES[loss].discriminator(logits, len(logits) // 2).loss.mean() + 0.7 * squares.mean()
    return list(torch.autograd.grad(value, list(network.parameters())))


def brightened(x: Tensor) -> Tensor:
    return functional.pad(x * 1.1 + 0.2, (1, -1))  # affine, as augmentation is


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("change", [lambda x: x, brightened])
@pytest.mark.parametrize("loss", ["relativistic", "least_squares"])
@pytest.mark.parametrize("name", NETWORKS)
def test_loss_and_penalty_train_the_weights_as_in_plain_float64(
    name: str, loss: str, change: Callable[[Tensor], Tensor], recompute: bool
) -> None:
    network, shape, shared = discriminator(name, recompute=recompute)
    images = torch.rand(6, *shape, generator=torch.Generator().manual_seed(2)).requires_grad_()
    exact = copy.deepcopy(network).double()
    wanted = plainly(exact, images.double(), change)
    true = gradients(exact, *wanted, loss)
    with differentiated_twice():
        seen = change(images)
        logits, squares = penalties.with_norms(network(seen), seen, images)
    torch.testing.assert_close(logits.double(), wanted[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(squares.double(), wanted[1], rtol=1e-5, atol=0)
    assert (logits.grad_fn.name() == "_ThroughGradientBackward") is shared
    plain32 = gradients(network, *plainly(network, images, change), loss)
    largest = max(float(one.abs().max()) for one in true)
    for key, found, plain, one in zip(dict(network.named_parameters()), gradients(network, logits, squares, loss),
                                      plain32, true, strict=True):  # fmt: skip
        off, usual = (float((two.double() - one).abs().max()) for two in (found, plain))
        # as far as float32 itself is off, but for a few roundings of the largest gradient
        assert off <= 4 * usual + 1e-6 * largest, (key, off, usual, largest)


def test_each_of_both_outputs_may_be_used_alone_and_twice() -> None:
    network, shape, _ = discriminator("global")
    images = torch.rand(4, *shape).requires_grad_()
    with differentiated_twice():
        logits, squares = penalties.with_norms(network(images), images, images)
    weights = list(network.parameters())
    alone = [torch.autograd.grad(value.sum(), weights, retain_graph=True, allow_unused=True)
             for value in (logits, squares, logits)]  # fmt: skip
    plain = torch.autograd.grad(network(images).sum(), weights)
    for one, other, again in zip(alone[0], plain, alone[2], strict=True):
        torch.testing.assert_close(one, other)
        assert torch.equal(one, again)
    assert alone[1][-1] is None or not alone[1][-1].any()  # the head's bias moves no gradient


@pytest.mark.parametrize("broken", ["shift", "product", "softplus"])
def test_a_network_that_is_not_linear_between_bends_takes_all_passes(broken: str) -> None:
    """Constants and weights that are added outside its layers, products, smooth activations."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, shape, _ = discriminator("global")
            self.shift = nn.Parameter(torch.rand(tuple(shape)))

        def forward(self, x: Tensor) -> Tensor:
            if broken == "shift":
                return self.inner(x + self.shift)
            return self.inner(x) * self.inner(x) if broken == "product" else self.inner(functional.softplus(x))

    network = Network()
    images = torch.rand(4, *NETWORKS["global"][1]).requires_grad_()
    with differentiated_twice():
        logits, squares = penalties.with_norms(network(images), images, images)
    assert logits.grad_fn.name() != "_ThroughGradientBackward"
    used = [p for n, p in network.named_parameters() if n != "shift" or broken == "shift"]
    found = torch.autograd.grad(logits.sum() + squares.sum(), used)
    plain = plainly(network, images, lambda x: x)
    for one, other in zip(found, torch.autograd.grad(plain[0].sum() + plain[1].sum(), used), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


class Tokens(nn.Module):
    """A layer on each row of the image, as on a token."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.bend, self.head = Linear(8, 6), LeakyReLU(0.2), Linear(48, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bend(self.each(x[:, 0])).flatten(1)).squeeze(1)


class Halves(nn.Module):
    """Convolutions on the halves of an image, each a row of its own meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.bend, self.head = Conv2d(1, 5, 3, padding=1), LeakyReLU(0.2), Linear(320, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.bend(self.each(x.view(2 * len(x), 1, 4, 8)))
        return self.head(maps.view(len(x), -1)).squeeze(1)


class Mixed(nn.Module):
    """Rows that change places on their way."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.bend, self.head = Linear(4, 64), LeakyReLU(0.2), Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        turned = x.view(4, 64).permute(1, 0)[:4].permute(1, 0)  # (4, 4)
        return self.head(self.bend(self.each(turned.permute(1, 0)))).squeeze(1)


@pytest.mark.parametrize("make", [Tokens, Halves, Mixed])
def test_a_network_in_which_rows_are_no_images_takes_all_passes(make: type[nn.Module]) -> None:
    network = make()
    images = torch.rand(4, 1, 8, 8).requires_grad_()
    with differentiated_twice():
        logits, squares = penalties.with_norms(network(images), images, images)
    assert logits.grad_fn.name() != "_ThroughGradientBackward"
    weights = list(network.parameters())
    found = torch.autograd.grad(logits.sum() + squares.sum(), weights, allow_unused=True)
    plain = plainly(network, images, lambda x: x)
    true = torch.autograd.grad(plain[0].sum() + plain[1].sum(), weights, allow_unused=True)
    for one, other in zip(found, true, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_weights_put_in_place_of_the_networks_own_take_the_gradient() -> None:
    """As under stage 3, or with weights in half precision, of which the float32 ones are made."""
    network, shape, _ = discriminator("global")
    images = torch.rand(4, *shape).requires_grad_()
    for leaf in (False, True):
        held = {n: p.detach().requires_grad_() if leaf else p.bfloat16().float() for n, p in network.named_parameters()}
        with differentiated_twice():
            logits, squares = penalties.with_norms(functional_call(network, held, images), images, images)
        assert logits.grad_fn.name() == "_ThroughGradientBackward"
        found = torch.autograd.grad(logits.sum() + squares.sum(), list(held.values()))
        plain = plainly(lambda x, held=held: functional_call(network, held, x), images, lambda x: x)
        for one, other in zip(
            found, torch.autograd.grad(plain[0].sum() + plain[1].sum(), list(held.values())), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_penalty_computes_no_gradient_of_zeros() -> None:
    """The gradient penalty's own forward is not passed backward, since its bends are not differentiated."""
    network, shape, _ = discriminator("global")
    images = torch.rand(2, *shape)
    counts = []
    for context in (contextlib.nullcontext(), differentiated_twice()):
        with context:
            value = penalties.wasserstein(network, images, images.flip(0), torch.rand(2)).sum()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            value.backward()
        counts.append(sum(e.count for e in profile.key_averages() if e.key in CONVOLUTIONS))
    assert counts == [6, 4]  # for two layers: forwards, weights, and torch's zeros


# ---------------------------------------------------------------- what may not lie under a double backward
@pytest.mark.parametrize("whole", [False, True])
def test_a_compiled_part_under_a_penalty_is_a_bug(whole: bool) -> None:
    torch.compiler.reset()
    network, shape, _ = discriminator("global")
    images = torch.rand(2, *shape).requires_grad_()
    if whole:
        run = torch.compile(network, backend="aot_eager")
    else:
        inner = torch.compile(network.stages[0], backend="aot_eager")
        run = lambda x: network.head(  # noqa: E731
            network.stages[1](inner(x)).permute(0, 2, 3, 1).flatten(1)
        ).squeeze(1)
    logits = run(images)
    with pytest.raises(AssertionError, match=r"compiled .* no double backward"):
        penalties.r1(logits, images)
    with differentiated_twice():  # which runs the compiled part as it is written
        penalties.r1(run(images), images).sum().backward()


# ---------------------------------------------------------------- the approximation
def test_finite_differences_of_a_quadratic_have_the_known_mean_and_deviation() -> None:
    """D(x) = x A x / 2 + b x: the mean over n is |g|^2 + sigma^2 (tr(A)^2 / 4 + |A|_F^2 / 2), g = A x + b.

    200,000 draws; bounds of 5 standard errors, the deviation about sqrt(2) |g|^2."""
    rng = torch.Generator().manual_seed(0)
    a, b, x = (torch.randn(*s, generator=rng, dtype=torch.float64) for s in ((6, 6), (6,), (6,)))
    a = a + a.T
    g = a @ x + b
    n = torch.randn(200_000, 6, generator=rng, dtype=torch.float64)

    def verdict(x: Tensor) -> Tensor:
        return 0.5 * ((x @ a) * x).sum(-1) + x @ b

    for sigma in (1e-3, 1.0):
        found = penalties.finite_difference(verdict(x).expand(len(n)), verdict(x + sigma * n), sigma)
        mean = g.square().sum() + sigma**2 * (a.trace() ** 2 / 4 + a.square().sum() / 2)
        assert abs(float(found.mean() - mean)) < 5 * float(found.std()) / math.sqrt(len(n))
    assert float(mean / g.square().sum()) > 1.05  # the bias of the last one is no rounding
    small = penalties.finite_difference(verdict(x).expand(len(n)), verdict(x + 1e-4 * n), 1e-4)
    assert float(small.std() / g.square().sum()) == pytest.approx(math.sqrt(2), rel=0.02)


def test_finite_differences_of_patches_are_of_their_mean_and_float32() -> None:
    logits = torch.zeros(2, 1, 2, dtype=torch.bfloat16)
    moved = torch.tensor([[[1.0, 2.0]], [[0.0, 1.0]]], dtype=torch.bfloat16)
    found = penalties.finite_difference(logits, moved, 0.5)
    assert found.dtype == torch.float32 and found.tolist() == [9.0, 1.0]

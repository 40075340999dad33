"""Likelihoods, held against closed forms and against torch.distributions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from trainer.losses.reconstruction import (
    Bernoulli,
    Charbonnier,
    Gaussian,
    Laplace,
    Likelihood,
    LogisticMixture,
    bits_per_dim,
    check_targets,
    dequantize,
)

ALL = [
    Bernoulli(),
    Gaussian(scale=0.3),
    Laplace(scale=0.3),
    Charbonnier(scale=0.3, softness=0.1),
    LogisticMixture(components=4),
]
LEVELS = torch.arange(256).double() / 127.5 - 1.0


def images(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    levels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))
    return levels.double() / 127.5 - 1.0


def parameters(likelihood, channels: int, shape: tuple[int, int, int], seed: int = 1) -> torch.Tensor:
    batch, height, width = shape
    size = (batch, likelihood.parameters(channels), height, width)
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- bits a dimension (F3-6)
def test_nats_of_an_image_are_divided_by_its_dimensions_and_ln_2() -> None:
    assert bits_per_dim(2000.0, dims=3 * 32 * 32, discrete=True) == pytest.approx(0.93925, abs=5e-6)


def test_a_density_on_minus_one_to_one_adds_the_change_of_scale_to_levels() -> None:
    centre = Gaussian(scale=1.0).nll(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)).item()
    assert bits_per_dim(centre, dims=1, discrete=True) == pytest.approx(1.32575, abs=5e-6)
    assert bits_per_dim(centre, dims=1, discrete=Gaussian.discrete) == pytest.approx(8.3201, abs=5e-5)


def test_a_uniform_model_of_256_levels_has_8_bits() -> None:
    assert bits_per_dim(3 * 64 * math.log(256), dims=3 * 64, discrete=True) == pytest.approx(8.0, abs=1e-12)


def test_density_with_its_offset_and_the_mass_of_the_central_bin_agree_for_a_wide_gaussian() -> None:
    scale, half = 0.1, 1 / 255
    mass = math.erf(half / scale / math.sqrt(2))
    assert bits_per_dim(-math.log(mass), dims=1, discrete=True) == pytest.approx(4.9985, abs=5e-5)
    nats = Gaussian(scale=scale).nll(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)).item()
    assert bits_per_dim(nats, dims=1, discrete=False) == pytest.approx(4.9982, abs=5e-5)


def test_bits_per_dim_takes_tensors() -> None:
    found = bits_per_dim(torch.tensor([0.0, math.log(2.0) * 4]), dims=4, discrete=True)
    assert found.tolist() == pytest.approx([0.0, 1.0], abs=1e-6)


def test_dequantised_levels_spread_over_their_own_bin_and_no_other() -> None:
    uniform = torch.rand(256, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    image = LEVELS.view(-1, 1, 1, 1).expand(256, 1, 8, 8)
    moved = (dequantize(image, uniform) - image) * 127.5
    assert moved.min() >= -0.5 and moved.max() < 0.5
    assert moved.min() < -0.49 and moved.max() > 0.49


# ---------------------------------------------------------------- what all have in common
@pytest.mark.parametrize("likelihood", ALL, ids=lambda one: one.kind)
@pytest.mark.parametrize("channels", [1, 3])
def test_nll_is_one_float32_sum_a_sample_that_no_other_sample_changes(likelihood, channels: int) -> None:
    given, x = parameters(likelihood, channels, (4, 6, 5)).float(), images((4, channels, 6, 5)).float()
    whole = likelihood.nll(given, x)
    assert whole.shape == (4,) and whole.dtype == torch.float32
    apart = torch.cat([likelihood.nll(a, b) for a, b in zip(given.split(1), x.split(1), strict=True)])
    torch.testing.assert_close(whole, apart, rtol=1e-6, atol=0)
    tiled = likelihood.nll(given.repeat(1, 1, 2, 1), x.repeat(1, 1, 2, 1))
    torch.testing.assert_close(tiled, 2 * whole, rtol=1e-5, atol=0)  # a sum over the image, no mean


@pytest.mark.parametrize("likelihood", ALL, ids=lambda one: one.kind)
@pytest.mark.parametrize("channels", [1, 3])
def test_gradients_are_those_of_finite_differences(likelihood, channels: int) -> None:
    given, x = parameters(likelihood, channels, (2, 3, 2)), images((2, channels, 3, 2))
    assert torch.autograd.gradcheck(lambda p: likelihood.nll(p, x), (given.requires_grad_(),))


@pytest.mark.parametrize("likelihood", ALL, ids=lambda one: one.kind)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_give_float32_nats(likelihood, dtype: torch.dtype) -> None:
    given = parameters(likelihood, 1, (2, 4, 4)).to(dtype)
    found = likelihood.nll(given, images((2, 1, 4, 4)).float())
    assert found.dtype == torch.float32 and found.isfinite().all()
    assert likelihood.mean(given).dtype == torch.float32


@pytest.mark.parametrize("likelihood", ALL, ids=lambda one: one.kind)
@pytest.mark.parametrize("channels", [1, 3])
def test_channels_last_memory_changes_no_value(likelihood, channels: int) -> None:
    given, x = parameters(likelihood, channels, (2, 6, 4)), images((2, channels, 6, 4))
    moved = [t.contiguous(memory_format=torch.channels_last) for t in (given, x)]
    torch.testing.assert_close(likelihood.nll(*moved), likelihood.nll(given, x))
    torch.testing.assert_close(likelihood.mean(moved[0]), likelihood.mean(given))


def test_a_likelihood_is_chosen_by_its_kind_and_a_wrong_one_is_refused() -> None:
    adapter = TypeAdapter(Likelihood)
    for config in ALL:
        assert type(adapter.validate_python({"kind": config.kind})) is type(config)
    with pytest.raises(ValidationError, match="bernoulli"):
        adapter.validate_python({"kind": "bernouli"})
    assert sorted({one.name for one in ALL}) == sorted(one.name for one in ALL)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("config", [Gaussian, Laplace, Charbonnier])
def test_a_scale_that_is_none_is_refused_by_name(config, scale: float) -> None:
    with pytest.raises(ValueError, match=r"^scale: "):
        config(scale=scale)


@pytest.mark.parametrize("softness", [0.0, -1.0, 1e-7, 11.0, math.nan, math.inf])
def test_a_softness_that_float32_cannot_have_is_refused_by_name(softness: float) -> None:
    with pytest.raises(ValueError, match=r"^softness: .*laplace"):
        Charbonnier(softness=softness)


def test_a_mixture_of_nothing_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^components: 0"):
        LogisticMixture(components=0)


def test_bernoulli_on_colour_gives_a_hint_and_no_error() -> None:
    assert Bernoulli().hint(1) is None
    assert "colour" in str(Bernoulli().hint(3))
    assert [one.hint(3) for one in ALL[1:]] == [None] * 4


# ---------------------------------------------------------------- Bernoulli (F3-3)
@pytest.mark.parametrize(("target", "logit"), [(-2.0, -20.0), (2.0, 50.0), (-1.001, 0.0), (math.nan, 0.0)])
def test_bernoulli_refuses_targets_outside_its_range(target: float, logit: float) -> None:
    with pytest.raises(ValueError, match=r"\[-1, 1\]"):
        Bernoulli().nll(torch.full((1, 1, 2, 2), logit), torch.full((1, 1, 2, 2), target))
    with pytest.raises(ValueError, match="likelihood: bernoulli"):
        check_targets(torch.full((1, 1, 2, 2), target))


def test_bernoulli_maps_minus_one_to_black() -> None:
    # F3-3's target -1 with logit -20: a confident and right black, not -20 nats
    found = Bernoulli().nll(torch.full((1, 1, 1, 1), -20.0), torch.full((1, 1, 1, 1), -1.0)).item()
    assert found == pytest.approx(math.log1p(math.exp(-20)), abs=2e-6)  # of 20, what float32 can tell
    wrong = Bernoulli().nll(torch.full((1, 1, 1, 1), 20.0), torch.full((1, 1, 1, 1), -1.0)).item()
    assert wrong == pytest.approx(20.0, abs=4e-6)


@settings(deadline=None)
@given(
    st.floats(-1.0, 1.0, width=32),
    st.floats(-1e4, 1e4, width=32),
)
def test_bernoulli_is_never_negative(target: float, logit: float) -> None:
    found = Bernoulli().nll(torch.full((1, 1, 1, 1), logit), torch.full((1, 1, 1, 1), target)).item()
    assert 0.0 <= found < math.inf


def test_bernoulli_is_the_cross_entropy_of_the_mapped_target() -> None:
    x, logits = images((2, 1, 3, 3)), parameters(Bernoulli(), 1, (2, 3, 3))
    p, t = logits.sigmoid(), (x + 1) / 2
    expected = -(t * p.log() + (1 - t) * (1 - p).log()).sum((1, 2, 3))
    torch.testing.assert_close(Bernoulli().nll(logits, x), expected)
    torch.testing.assert_close(Bernoulli().mean(logits), (logits / 2).tanh())


def test_the_gradient_of_bernoulli_is_probability_minus_target() -> None:
    x, logits = images((2, 1, 3, 3)), parameters(Bernoulli(), 1, (2, 3, 3)).requires_grad_()
    (found,) = torch.autograd.grad(Bernoulli().nll(logits, x).sum(), logits)
    torch.testing.assert_close(found, logits.sigmoid() - (x + 1) / 2)


# ---------------------------------------------------------------- densities
@pytest.mark.parametrize(
    ("likelihood", "density"),
    [
        (Gaussian(scale=0.2), torch.distributions.Normal),
        (Laplace(scale=0.2), torch.distributions.Laplace),
    ],
)
def test_a_density_is_that_of_torch_distributions(likelihood, density) -> None:
    mean, x = parameters(likelihood, 3, (2, 4, 4)), images((2, 3, 4, 4))
    torch.testing.assert_close(likelihood.nll(mean, x), -density(mean, 0.2).log_prob(x).sum((1, 2, 3)))


@pytest.mark.parametrize("config", [Gaussian, Laplace, Charbonnier])
def test_a_learned_scale_starts_at_the_configured_one_and_feels_the_errors(config) -> None:
    mean, x = parameters(config(), 1, (2, 4, 4)), images((2, 1, 4, 4))
    fixed, learned = config(scale=0.5), config(scale=0.5, learn_scale=True)
    log = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(learned.nll(mean, x, log), fixed.nll(mean, x))
    assert torch.autograd.gradcheck(lambda s: learned.nll(mean, x, s), (log,))
    shift = math.log(3.0)
    torch.testing.assert_close(
        learned.nll(mean, x, torch.full((2,), shift, dtype=torch.float64)), config(scale=1.5).nll(mean, x)
    )


def test_charbonnier_is_laplace_but_for_errors_below_its_softness() -> None:
    x = torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    error = torch.tensor([[[[1e-5, 0.5]]]], dtype=torch.float64, requires_grad=True)
    (soft,) = torch.autograd.grad(Charbonnier(scale=0.1).nll(error, x).sum(), error)
    assert soft.flatten().tolist() == pytest.approx([10 * 0.1 / math.hypot(0.1, 1.0), 10.0], rel=1e-6)
    gap = Charbonnier(scale=0.1).nll(error, x) - Laplace(scale=0.1).nll(error, x)
    assert abs(gap.item()) < 2e-3  # less than two softnesses


def test_the_best_scale_is_the_error_that_is_there() -> None:
    error = torch.full((1, 1, 4, 4), 0.2)
    for config in (Gaussian, Laplace, Charbonnier):
        at = {s: config(scale=s).nll(torch.zeros(1, 1, 4, 4), error).item() for s in (0.18, 0.2, 0.22)}
        assert min(at, key=at.__getitem__) == 0.2


def test_a_learned_scale_that_the_network_does_not_give_is_a_bug() -> None:
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(AssertionError, match="comes from the network"):
        Gaussian(learn_scale=True).nll(x, x)
    with pytest.raises(AssertionError, match="comes from the network"):
        Laplace().nll(x, x, torch.zeros(1))

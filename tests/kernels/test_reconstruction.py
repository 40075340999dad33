"""Likelihoods, by every implementation, held against the plain formula in float64 and against what they must sum to."""

import importlib.util
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kernels.tolerances import DEVICE, DTYPES, GRADIENT, IMPLS, TWICE, VALUE, error, layouts
from trainer.kernels import logistic_mixture, program, reconstruction
from trainer.kernels.choose import preferred
from trainer.kernels.logistic_mixture import logistic_mixture_nll
from trainer.kernels.reconstruction import bernoulli_nll, charbonnier_nll, gaussian_nll, laplace_nll, log_normaliser

triton = pytest.mark.skipif(program.LACKING is not None, reason=str(program.LACKING))
Nll = Callable[..., Tensor]


def charbonnier(*given: Tensor | None, **named) -> Tensor:
    return charbonnier_nll(*given, softness=0.3, **named)


def mixture(*given: Tensor | None, **named) -> Tensor:
    assert given[2:] in ((), (None,))
    return logistic_mixture_nll(*given[:2], components=2, **named)


LOCATED = {"laplace": laplace_nll, "gaussian": gaussian_nll, "charbonnier": charbonnier}
ELEMENTS = LOCATED | {"bernoulli": bernoulli_nll}
EVERY = ELEMENTS | {"mixture": mixture}
SIZES = [(3, 3, 7, 5), (1, 1, 1, 1), (2, 3, 30, 31), (2, 16, 16, 16)]  # elements of a tile: 2048


def images(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """On the 256 levels, with 0 and 255 among them."""
    levels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))
    levels.view(-1)[::5], levels.view(-1)[1::7] = 0, 255
    return (levels / 127.5 - 1.0).to(DEVICE)


def predictions(kind: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    """What a decoder might give for images of `shape`; of 2 components where it is a mixture."""
    if kind == "mixture":
        shape = (shape[0], 2 * (1 + 2 * shape[1]), *shape[2:])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if kind == "mixture":
        x[:, (shape[1] + 2) // 2 :] -= 2.0  # log-scales
    return x.to(DEVICE, dtype)


def weights(batch: int) -> Tensor:
    """Gradients of samples, of either sign."""
    return torch.linspace(-1.5, 2.0, batch, device=DEVICE) + 0.1


def truth(nll: Nll, x: Tensor, image: Tensor, log_scale: Tensor | None = None, **named) -> tuple[Tensor, list[Tensor]]:
    """Nats and gradients of the plain formula in float64."""
    inputs = [t.detach().double().requires_grad_() for t in (x, log_scale) if t is not None]
    nats = nll(inputs[0], image.double(), *inputs[1:], impl="eager", **named)
    return nats.detach(), list(torch.autograd.grad(nats, inputs, weights(len(x)).double()))


def mask_of_forms(impl: str):
    return pytest.param(impl, marks=triton) if impl == "triton" else impl


QUIET = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # numpy, in triton's interpreter
FORMS = pytest.mark.parametrize("impl", [mask_of_forms(impl) for impl in IMPLS])


# ---------------------------------------------------------------- right
@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ELEMENTS)
def test_nats_and_gradients_are_those_of_float64(kind: str, dtype: torch.dtype, impl: str) -> None:
    """Nats are float32 sums of values taken as they are, so they are as near whatever the prediction's dtype."""
    nll, named = ELEMENTS[kind], ({} if kind == "bernoulli" else {"scale": 0.3})
    for shape in SIZES:
        x, image = predictions(kind, shape, dtype), images(shape).to(dtype)
        nats, (gradient,) = truth(nll, x, image, **named)
        for (name, leaf), (other, target) in zip(layouts(x), reversed(list(layouts(image))), strict=True):
            if name != "channels_last" and shape != SIZES[0]:
                continue
            found = nll(leaf, target.detach(), impl=impl, **named)
            assert found.dtype == torch.float32 and found.shape == shape[:1]
            assert error(found, nats) < VALUE[torch.float32], f"{shape}, {name} and {other}"
            (at,) = torch.autograd.grad(found, leaf, weights(shape[0]))
            assert at.dtype == dtype
            assert error(at, gradient) < GRADIENT[dtype], f"{shape}, {name} and {other}"
            if name in ("contiguous", "channels_last") and impl == "triton":
                assert at.stride() == leaf.stride() or shape == (1, 1, 1, 1)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", LOCATED)
def test_a_learned_scale_has_its_gradient(kind: str, dtype: torch.dtype, impl: str) -> None:
    for shape in SIZES:
        x, image = predictions(kind, shape, dtype).requires_grad_(), images(shape)
        log = torch.linspace(-1.0, 0.7, shape[0], device=DEVICE).requires_grad_()
        nats, (gradient, of_scale) = truth(LOCATED[kind], x, image, log, scale=0.3)
        found = LOCATED[kind](x, image, log, scale=0.3, impl=impl)
        assert error(found, nats) < VALUE[torch.float32]
        at, at_scale = torch.autograd.grad(found, (x, log), weights(shape[0]), retain_graph=True)
        assert error(at, gradient) < GRADIENT[dtype] and error(at_scale, of_scale) < GRADIENT[torch.float32]
        (alone,) = torch.autograd.grad(found, log, weights(shape[0]))
        assert torch.equal(alone, at_scale)


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mixture_has_the_nats_and_gradients_of_float64(dtype: torch.dtype, impl: str) -> None:
    """Five times the tolerance for its gradient: where every component is far from an element, their shares are
    exponentials of differences between log-masses of tens of nats, of which float32 has the sixth digit."""
    for shape in [(2, 3, 3, 5), (1, 1, 1, 1), (1, 1, 11, 13)]:  # pixels of a tile: 128
        for name, leaf in layouts(predictions("mixture", shape, dtype)):
            if name != "channels_last" and (shape[0] == 1 or dtype != torch.float32):
                continue
            image = images(shape).contiguous(memory_format=torch.channels_last)
            nats, (gradient,) = truth(mixture, leaf, image)
            found = mixture(leaf, image, impl=impl)
            assert error(found, nats) < VALUE[torch.float32], name
            (at,) = torch.autograd.grad(found, leaf, weights(shape[0]))
            assert at.dtype == dtype
            assert error(at, gradient) < (5 if dtype == torch.float32 else 1) * GRADIENT[dtype], name


@FORMS
def test_ten_components_in_colour_are_as_good(impl: str) -> None:
    x = torch.randn((1, 70, 6, 6), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    x[:, 40:] -= 2.0
    image = images((1, 3, 6, 6))
    nats, (gradient,) = truth(logistic_mixture_nll, x, image, components=10)
    found = logistic_mixture_nll(x.requires_grad_(), image, components=10, impl=impl)
    assert error(found, nats) < VALUE[torch.float32]
    (at,) = torch.autograd.grad(found, x, weights(1))
    assert error(at, gradient) < 5 * GRADIENT[torch.float32]


@pytest.mark.parametrize("kind", EVERY)
def test_the_plain_formula_is_differentiable_twice(kind: str) -> None:
    x, image = (
        predictions(kind, (2, 1, 2, 2), torch.float64).cpu().requires_grad_(),
        images((2, 1, 2, 2)).cpu().double(),
    )
    log = torch.tensor([0.2, -0.3], dtype=torch.float64, requires_grad=True)
    inputs = (x, log) if kind in LOCATED else (x,)
    check = lambda x, *log: EVERY[kind](x, image, *log, impl="eager")  # noqa: E731
    assert torch.autograd.gradcheck(check, inputs)
    assert torch.autograd.gradgradcheck(check, inputs)


@triton
@pytest.mark.parametrize("kind", EVERY)
def test_the_second_derivative_of_a_kernel_is_that_of_the_plain_formula(kind: str) -> None:
    image, log = images((2, 3, 4, 5)), torch.tensor([0.2, -0.3], device=DEVICE)
    found = []
    for impl, dtype in (("eager", torch.float64), ("triton", torch.float32)):
        x = predictions(kind, image.shape).to(dtype).requires_grad_()
        inputs = [x, *([log.to(dtype).requires_grad_()] if kind in LOCATED else [])]
        upstream = weights(2).to(dtype).requires_grad_()
        nats = EVERY[kind](x, image.to(dtype), *inputs[1:], impl=impl)
        first = torch.autograd.grad(nats, inputs, upstream, create_graph=True)
        norm = sum(g.square().sum() for g in first)
        found.append([*first, *torch.autograd.grad(norm, [*inputs, upstream])])
    assert max(error(one, true.detach()) for true, one in zip(*found, strict=True)) < TWICE


# ---------------------------------------------------------------- what a kernel promises
@triton
@pytest.mark.parametrize("kind", EVERY)
def test_a_kernel_runs_again_with_the_same_bits_and_takes_expanded_gradients(kind: str) -> None:
    x, image = predictions(kind, (3, 3, 7, 5)).requires_grad_(), images((3, 3, 7, 5))
    named = {"log_scale": torch.zeros(3, device=DEVICE, requires_grad=True)} if kind in LOCATED else {}
    nats = EVERY[kind](x, image, *named.values(), impl="triton")
    inputs = [x, *named.values()]
    ones = torch.ones(3, device=DEVICE)
    kept = torch.autograd.grad(nats, inputs, ones, retain_graph=True)
    expanded = torch.autograd.grad(nats.sum(), inputs, retain_graph=True)
    again = torch.autograd.grad(EVERY[kind](x, image, *named.values(), impl="triton"), inputs, ones)
    assert torch.equal(nats, EVERY[kind](x, image, *named.values(), impl="triton"))
    for one, two, three in zip(kept, expanded, again, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
    (strided,) = torch.autograd.grad(nats, x, torch.stack((ones, 2 * ones), 1)[:, 0])
    assert torch.equal(strided, kept[0])


@triton
def test_a_sample_has_the_same_bits_in_any_batch_and_an_empty_batch_is_none() -> None:
    for kind, nll in EVERY.items():
        x, image = predictions(kind, (3, 3, 7, 5)).requires_grad_(), images((3, 3, 7, 5))
        assert torch.equal(nll(x, image, impl="triton")[1:2], nll(x[1:2], image[1:2], impl="triton"))
        for impl in IMPLS:
            none = nll(x[:0], image[:0], impl=impl)
            assert none.shape == (0,) and none.dtype == torch.float32
            assert torch.autograd.grad(none.sum(), x)[0].abs().sum() == 0


@triton
def test_operators_pass_torchs_own_checks() -> None:
    image, log = images((2, 3, 5, 3)), torch.zeros(2, device=DEVICE, requires_grad=True)
    turned = dict(layouts(predictions("laplace", image.shape)))["turned"]
    torch.library.opcheck(reconstruction._forward, (turned, image, log, "laplace", 0.5, 0.0))
    parameters = predictions("mixture", image.shape).requires_grad_()
    torch.library.opcheck(logistic_mixture._forward, (parameters, image, 2))


@triton
@pytest.mark.parametrize("kind", ["charbonnier", "mixture"])
def test_a_kernel_is_a_node_of_a_compiled_graph(kind: str) -> None:
    x, image = predictions(kind, (2, 3, 5, 3)).requires_grad_(), images((2, 3, 5, 3))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(x: Tensor, image: Tensor) -> Tensor:
        return EVERY[kind](x * 0.5, image, impl="triton").mean()

    (found,) = torch.autograd.grad(loss(x, image), x)
    (expected,) = torch.autograd.grad(EVERY[kind](x * 0.5, image, impl="triton").mean(), x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k == "gaussian" else pytest.mark.slow) for k in EVERY])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, within inductor
def test_compiled_it_is_the_same(kind: str) -> None:
    torch._dynamo.reset()  # kinds and sizes share the number of graphs that a formula may have
    x, image = predictions(kind, (2, 3, 7, 5)).requires_grad_(), images((2, 3, 7, 5))
    nats, (gradient,) = truth(EVERY[kind], x, image)
    found = EVERY[kind](x, image, impl="compiled")
    assert error(found, nats) < VALUE[torch.float32]
    (at,) = torch.autograd.grad(found, x, weights(2))
    assert error(at, gradient) < 5 * GRADIENT[torch.float32]


@triton
@pytest.mark.parametrize("kind", EVERY)
def test_a_kernel_without_its_casts_to_float32_is_found_out(kind: str, tmp_path: Path) -> None:
    module = logistic_mixture if kind == "mixture" else reconstruction
    source = Path(str(module.__file__)).read_text()
    mutant = source.replace("other=0.0).to(tl.float32)", "other=0.0)").replace('"tandem::', f'"mutant_{kind}::')
    assert mutant.count("other=0.0).to(") == 0 and mutant != source
    path = tmp_path / "mutant.py"
    path.write_text(mutant)
    spec = importlib.util.spec_from_file_location(f"mutant_{kind}", path)
    assert spec is not None and spec.loader is not None
    changed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(changed)
    name = {"mixture": "logistic_mixture_nll"}.get(kind, f"{kind}_nll")
    named = {"mixture": {"components": 2}, "charbonnier": {"softness": 0.3}}.get(kind, {})
    x, image = predictions(kind, (2, 3, 7, 5), torch.bfloat16), images((2, 3, 7, 5)).bfloat16()
    nats, _ = truth(getattr(module, name), x, image, **named)
    try:
        found = getattr(changed, name)(x, image, impl="triton", **named)
    except Exception as refused:  # roots and exponentials of bfloat16 do not even compile
        if "bf16" not in str(refused):
            raise
    else:
        assert not error(found, nats) < VALUE[torch.float32]


# ---------------------------------------------------------------- extremes
@FORMS
@QUIET
@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_in_its_sample_alone(kind: str, bad: float, impl: str) -> None:
    x, image = predictions(kind, (3, 1, 3, 3)), images((3, 1, 3, 3))
    for given in (x, image):
        broken = given.clone()
        broken[1, 0, 1, 1] = bad
        nats = EVERY[kind](*(broken if t is given else t for t in (x, image)), impl=impl)
        finite = nats.isfinite().tolist()
        assert finite[0] and finite[2]
        # a logit of -inf is a component that is never chosen
        assert not finite[1] or (kind in ("bernoulli", "mixture") and math.isinf(bad))


@FORMS
@QUIET
def test_nan_shows_in_the_gradient_of_its_element(impl: str) -> None:
    for kind in EVERY:
        x, image = predictions(kind, (2, 1, 3, 3)), images((2, 1, 3, 3))
        x[1, 0, 1, 1] = math.nan
        (found,) = torch.autograd.grad(EVERY[kind](x.requires_grad_(), image, impl=impl).sum(), x)
        assert found[0].isfinite().all()
        assert found[1, 0, 1, 1].isnan() or (kind == "laplace" and impl == "eager")  # torch's sign of NaN is 0


@FORMS
def test_logits_and_errors_of_ten_thousand_are_exact(impl: str) -> None:
    x = torch.tensor([1e4, -1e4, 1e4, -1e4, 0.0, 40.0], device=DEVICE).view(6, 1, 1, 1).requires_grad_()
    image = torch.tensor([1.0, -1.0, -1.0, 1.0, 0.0, 1.0], device=DEVICE).view(6, 1, 1, 1)
    nats = bernoulli_nll(x, image, impl=impl)
    expected = [0.0, 0.0, 1e4, 1e4, math.log(2.0), math.log1p(math.exp(-40.0))]
    assert nats.tolist() == pytest.approx(expected, rel=2e-6)  # 4e-18 at a logit of 40: nothing is lost in 1 + e^-40
    assert torch.autograd.grad(nats.sum(), x)[0].flatten().tolist() == pytest.approx([0, 0, 1, -1, 0, 0], abs=1e-7)
    for kind, nll in LOCATED.items():
        nats, (gradient,) = truth(nll, x, image, scale=1e-2)
        found = nll(x, image, scale=1e-2, impl=impl)
        assert error(found, nats) < VALUE[torch.float32], kind
        (at,) = torch.autograd.grad(found, x, weights(6))
        assert error(at, gradient) < GRADIENT[torch.float32], kind


@FORMS
@pytest.mark.parametrize("scale", [-1e3, -7.0, 0.0, 1e3])
def test_a_mixture_is_finite_far_out_and_at_its_edges(scale: float, impl: str) -> None:
    image = (torch.tensor([0.0, 1.0, 128.0, 254.0, 255.0], device=DEVICE) / 127.5 - 1.0).view(1, 1, 1, 5)
    means = torch.tensor([-1e4, -1.0, 0.0, 1.0, 1e4], device=DEVICE)
    x = torch.tensor([0.0, -1e4, 0.0, 0.3, scale, -2.0], device=DEVICE).view(1, 6, 1, 1).repeat(5, 1, 1, 5)
    x[:, 2] = means.view(5, 1, 1)
    image = image.repeat(5, 1, 1, 1)
    nats, (gradient,) = truth(mixture, x, image)
    found = mixture(x.requires_grad_(), image, impl=impl)
    (at,) = torch.autograd.grad(found, x, weights(5))
    assert found.isfinite().all() and (found >= 0.0).all() and at.isfinite().all()
    # 1e-3 of a gradient whose components' log-masses are 10,000 nats apart from 0: exp has their float32 rounding
    torch.testing.assert_close(found.double(), nats, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(at.double(), gradient, rtol=2e-3, atol=1e-5 * max(1.0, float(gradient.abs().max())))


@FORMS
def test_masses_of_256_levels_sum_to_one(impl: str) -> None:
    x = predictions("mixture", (1, 1, 1, 1)).expand(1, -1, 16, 16)
    every = (torch.arange(256, device=DEVICE) / 127.5 - 1.0).view(1, 1, 16, 16)
    image = every.permute(2, 3, 0, 1).reshape(256, 1, 1, 1)
    nats = mixture(x.permute(2, 3, 1, 0).reshape(256, -1, 1, 1)[::1], image, impl="eager")
    assert float((-nats).exp().sum()) == pytest.approx(1.0, abs=1e-5)
    together = mixture(x.contiguous(), every, impl=impl)
    assert float(together) == pytest.approx(float(nats.sum()), rel=1e-5)


@FORMS
def test_a_value_between_two_levels_counts_as_the_nearer_and_ties_go_to_the_even_one(impl: str) -> None:
    x = predictions("mixture", (1, 1, 1, 1))
    at = {level: float(mixture(x, torch.full((1, 1, 1, 1), level / 127.5 - 1.0, device=DEVICE), impl=impl))
          for level in (126.0, 127.0, 127.4, 127.6, 128.0)}  # fmt: skip
    assert at[127.4] == at[127.0] and at[127.6] == at[128.0]
    between = float(mixture(x, torch.zeros((1, 1, 1, 1), device=DEVICE), impl=impl))  # level 127.5
    assert between == at[128.0] != at[127.0]


# ---------------------------------------------------------------- Charbonnier
@pytest.mark.parametrize("softness", [1e-6, 1e-3, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("scale", [0.05, 1.0])
def test_charbonnier_is_a_density(softness: float, scale: float) -> None:
    integrate = pytest.importorskip("scipy.integrate")

    def density(u: float) -> float:
        at = torch.full((1, 1, 1, 1), 0.25 + scale * u, dtype=torch.float64)
        centre = torch.full_like(at, 0.25)
        return scale * math.exp(-float(charbonnier_nll(centre, at, softness=softness, scale=scale)))

    edges = [0.0, softness, 1.0 + softness, 100.0]
    half = sum(integrate.quad(density, a, b, epsabs=1e-12, epsrel=1e-10)[0] for a, b in itertools.pairwise(edges))
    assert 2 * half == pytest.approx(1.0, abs=1e-8)


def test_charbonnier_is_laplace_where_softness_vanishes_and_gaussian_where_it_is_large() -> None:
    x, image = predictions("charbonnier", (2, 3, 4, 4)).double(), images((2, 3, 4, 4)).double()
    soft, hard = charbonnier_nll(x, image, softness=1e-6, scale=0.3), laplace_nll(x, image, scale=0.3)
    torch.testing.assert_close(soft, hard, rtol=1e-6, atol=0.0)
    wide = charbonnier_nll(x, image, softness=1e4, scale=0.5 / 1e2)  # its variance is scale^2 softness
    torch.testing.assert_close(wide, gaussian_nll(x, image, scale=0.5), rtol=1e-3, atol=0.0)
    assert log_normaliser(1e-9) == pytest.approx(math.log(2.0), abs=2e-9)


@FORMS
def test_the_gradient_of_charbonnier_is_zero_without_error_and_bounded_by_one_scale(impl: str) -> None:
    x = torch.tensor([0.0, 1e-9, 1e3], device=DEVICE).view(3, 1, 1, 1).requires_grad_()
    nats = charbonnier_nll(x, torch.zeros_like(x), softness=1e-6, scale=0.5, impl=impl)
    (found,) = torch.autograd.grad(nats.sum(), x)
    assert found.flatten().tolist() == pytest.approx([0.0, 2 * 2e-9 / 1e-6, 2.0], rel=1e-4)


# ---------------------------------------------------------------- what kernels leave to the plain formula
@triton
def test_what_a_kernel_cannot_take_is_refused_by_name_or_left_to_eager() -> None:
    x, image = predictions("laplace", (2, 1, 3, 3)), images((2, 1, 3, 3))
    wanting = image.clone().requires_grad_()
    huge = torch.empty((1, 3, 2**13, 2**13), device="meta" if DEVICE == "cpu" else DEVICE, dtype=torch.bfloat16)
    for given, reason in (
        ((x, wanting), "the image wants a gradient"),
        ((x, image.double()), "float64"),
        ((x.double(), image), "float64"),
        ((huge, huge), "elements a sample"),
    ):
        with pytest.raises(ValueError, match=f"triton cannot run .*{reason}"):
            laplace_nll(*given, impl="triton")
    with pytest.raises(ValueError, match="the image wants a gradient"):
        mixture(predictions("mixture", (2, 1, 3, 3)), wanting, impl="triton")
    with preferred("auto"):
        for kind in EVERY:
            of_target = EVERY[kind](predictions(kind, (2, 1, 3, 3)), wanting).sum()
            assert of_target.requires_grad


@pytest.mark.parametrize("kind", LOCATED)
def test_the_gradient_of_a_target_is_minus_that_of_the_prediction(kind: str) -> None:
    x, image = predictions(kind, (2, 1, 3, 3)).requires_grad_(), images((2, 1, 3, 3)).requires_grad_()
    one, other = torch.autograd.grad(LOCATED[kind](x, image).sum(), (x, image))
    torch.testing.assert_close(one, -other)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs 18 GB on a GPU")
def test_offsets_of_samples_have_64_bits() -> None:
    count = 2**31 // (3 * 256 * 256) + 2
    x = torch.zeros((count, 3, 256, 256), dtype=torch.bfloat16, device=DEVICE)
    x[-1] = 1.0
    nats = laplace_nll(x.requires_grad_(), torch.zeros_like(x), impl="triton")
    assert nats[-1] - nats[0] == pytest.approx(x[0].numel(), rel=1e-5)
    (gradient,) = torch.autograd.grad(nats.sum(), x)
    assert (gradient[-1] == 1.0).all() and (gradient[:-1] == 0.0).all()

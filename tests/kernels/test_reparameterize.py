"""The posterior's sample and its KL: values and gradients against float64, what must change nothing, extreme values."""

import importlib.util
import inspect
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.tolerances import DEVICE, DTYPES, GRADIENT, IMPLS, TWICE, VALUE, error, layouts
from trainer.kernels import noise, reparameterize
from trainer.kernels.choose import Impl, preferred
from trainer.kernels.reparameterize import posterior, reparameterize_kl

SHAPES = (
    (2, 8, 4, 6),
    (1, 6, 3, 5),
    (3, 2, 1, 1),
    (2, 34, 2, 4),
    (2, 20),
    (1, 2),
    (2, 2058),
    (2, 6, 2, 2, 3),
    (2, 4, 3),
)


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def address(count: int, first: int = 2**33 - 1) -> Tensor:
    return noise.address(5, "posterior", torch.arange(first, first + count, device=DEVICE))


def laid(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    if x.dim() == 4:
        yield from layouts(x)
        return
    yield "contiguous", x.clone().requires_grad_()
    yield "turned", x.transpose(0, -1).contiguous().transpose(0, -1).detach().requires_grad_()
    yield "strided", torch.stack([x, -x], -1)[..., 0].detach().requires_grad_()


def true(moments: Tensor, at: Tensor, impl: Impl = "eager") -> tuple[Tensor, Tensor]:
    """By torch's own distributions, in float64; the noise is what `impl` draws."""
    mean, logvar = moments.double().chunk(2, 1)
    logvar = logvar.clamp(-30, 20)
    eps = noise.normal_at(at, tuple(mean.shape[1:]), impl=impl).double()
    kl = 0.5 * (mean**2 + torch.expm1(logvar) - logvar)
    return mean + (logvar / 2).exp() * eps, kl.flatten(1).sum(1)


def gradient(outputs: tuple[Tensor, Tensor], moments: Tensor, **options: Any) -> Tensor:
    z, kl = outputs
    of_z, of_kl = drawn(*z.shape, seed=1).to(z.dtype), drawn(*kl.shape, seed=2).to(kl.dtype)
    (found,) = torch.autograd.grad(outputs, moments, (of_z, of_kl), **options)
    return found


# ---------------------------------------------------------------- right
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_float64_in_every_layout(
    shape: tuple[int, ...], dtype: torch.dtype, impl: Impl
) -> None:
    given = drawn(*shape, scale=1.5).to(dtype)
    reference = given.double().requires_grad_()
    at = address(len(given))
    outputs = true(reference, at, impl)
    slope, (z, kl) = gradient(outputs, reference), (x.detach() for x in outputs)
    first = None
    for name, moments in laid(given):
        found = reparameterize_kl(moments, at, impl=impl)
        assert [x.dtype for x in found] == [torch.float32] * 2 and found[1].shape == (len(given),)
        assert error(found[0], z) < VALUE[torch.float32], name
        assert error(found[1], kl) < VALUE[torch.float32], name
        back = gradient(found, moments)
        assert back.dtype == dtype and error(back, slope) < GRADIENT[dtype], name
        if name == "channels_last" and impl == "triton":
            assert all(x.is_contiguous(memory_format=torch.channels_last) for x in (found[0], back))
        first = found[0] if first is None else first
        if impl == "triton":  # z has the same bits wherever it lies
            assert torch.equal(found[0], first), name


def test_the_formulas_are_torchs_distributions() -> None:
    from torch.distributions import Normal, kl_divergence

    moments, at = drawn(3, 8, 2, 2), address(3)
    mean, logvar = posterior(moments)
    q = Normal(mean, (0.5 * logvar).exp())
    z, kl = reparameterize_kl(moments, at)
    assert z.dtype == kl.dtype == torch.float64  # the definition takes it
    wanted = kl_divergence(q, Normal(torch.zeros_like(mean), torch.ones_like(mean)))
    assert error(kl, wanted.flatten(1).sum(1)) < 1e-13
    assert error(z, q.mean + q.stddev * noise.normal_at(at, (4, 2, 2)).double()) < 1e-15


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scale", [1e-1, 1e-2, 1e-3])
def test_the_kl_near_the_prior_does_not_cancel(scale: float, impl: Impl) -> None:
    """exp(v) - 1 - v is 2e-3 off at 1e-3 in float32. expm1(v) is right, but rounded at v's size: v / 1.2e7 of v^2 / 2,
    1e-4 at 1e-3, of either sign, so of a sum over n elements that / sqrt(n). The kernel's series rounds at v^2's."""
    moments = drawn(2, 256, 4, 4, scale=scale).float()
    _, kl = true(moments, address(2))
    _, found = reparameterize_kl(moments, address(2), impl=impl)
    assert error(found, kl) < (VALUE[torch.float32] if impl == "triton" else 1e-6 + 1.2e-7 / scale / math.sqrt(2048))
    naive = 0.5 * (moments.chunk(2, 1)[0] ** 2 + moments.chunk(2, 1)[1].exp() - 1 - moments.chunk(2, 1)[1])
    if scale == 1e-3:
        assert error(naive.flatten(1).sum(1), kl) > 1e-5


@pytest.mark.parametrize("logvar", [-0.9999999, -0.3, -1e-4, 0.0, 0.5, 0.9999999, 1.0, 1.0000001, 3.0, -29.9, 19.9])
def test_one_element_is_exact_on_both_sides_of_the_series(logvar: float) -> None:
    moments = torch.tensor([[0.0, logvar]], device=DEVICE).requires_grad_()
    reference = moments.detach().double().requires_grad_()
    _, kl = reparameterize_kl(moments, address(1), impl="triton")
    assert error(kl, true(reference, address(1))[1].detach()) < 1e-6
    found = torch.autograd.grad(kl.sum(), moments)[0][0, 1].double()
    wanted = 0.5 * torch.expm1(reference.detach()[0, 1])
    assert float((found - wanted).abs()) <= 2e-7 * float(wanted.abs()) + 1e-7 * abs(logvar)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # numpy's, in the interpreter
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_runaway_logvar_keeps_sample_kl_and_gradient_finite(dtype: torch.dtype, impl: Impl) -> None:
    logvar = torch.tensor([-1000.0, -100.0, -30.0, 0.0, 11.0, 20.0, 100.0, 1000.0], dtype=dtype, device=DEVICE).view(
        -1, 1
    )
    moments = torch.cat([torch.ones_like(logvar), logvar], dim=1).requires_grad_()
    z, kl = reparameterize_kl(moments, address(8), impl=impl)
    assert z.isfinite().all() and kl.isfinite().all()
    assert kl[3].item() == 0.5
    wanted = [0.5 * (1 + math.expm1(v) - v) for v in (-30.0, -30.0, -30.0, 0.0, 11.0, 20.0, 20.0, 20.0)]
    # an exponential of 20 is that of 20 / ln 2 = 28.9, rounded: 7e-7
    assert kl.tolist() == pytest.approx(wanted, rel=2e-6)
    (found,) = torch.autograd.grad((z.sum() + kl.sum()), moments)
    edge = found[:, 1]
    assert edge[[0, 1, 6, 7]].tolist() == [0.0] * 4, "no gradient beyond the clamp"
    assert edge[2] < 0 < edge[5], "a gradient at the clamp itself, as torch.clamp has it"
    if dtype == torch.float16:  # e^20 / 2 does not fit: whoever scales losses must see that
        assert edge[5].isinf()
        found = torch.cat([found[:5], found[6:]])
    assert found.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_hidden(bad: float, impl: Impl) -> None:
    for place in (0, 3):  # a mean, a logvar
        moments = torch.zeros(3, 4, 2, 2, device=DEVICE)
        moments[1, place, 0, 1] = bad
        moments.requires_grad_()
        z, kl = reparameterize_kl(moments, address(3), impl=impl)
        clamped = place == 3 and math.isinf(bad)  # within the range then
        assert bool(kl[1].isfinite()) == bool(z[1].isfinite().all()) == clamped
        assert bool(kl[[0, 2]].isfinite().all()) and bool(z[[0, 2]].isfinite().all())
        assert bool(posterior(moments)[1].isnan().any()) == (place == 3 and math.isnan(bad))
    moments = torch.zeros(2, 4, 2, 2, device=DEVICE).requires_grad_()
    z, kl = reparameterize_kl(moments, address(2), impl=impl)
    of_z = torch.zeros_like(z)
    of_z[0, 0, 0, 0] = bad
    (found,) = torch.autograd.grad((z, kl), moments, (of_z, torch.zeros_like(kl)))
    assert not found[0, 0, 0, 0].isfinite() and not found[0, 2, 0, 0].isfinite() and found[1].isfinite().all()


def test_a_sample_has_the_posteriors_mean_and_deviation() -> None:
    moments = torch.tensor([[3.0] * 200 + [2.0] * 200]).expand(1000, 400)
    z, _ = reparameterize_kl(moments, noise.address(0, "posterior", torch.arange(1000)), impl="eager")
    # deviation e; standard errors e / sqrt(n) = 0.006 and 0.004, five of each
    assert z.mean().item() == pytest.approx(3.0, abs=0.03)
    assert z.std().item() == pytest.approx(2.71828, abs=0.022)


# ---------------------------------------------------------------- what must change nothing
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(4, 8, 2, 6), (4, 6, 3, 3), (4, 10)], ids=str)
def test_half_a_batch_by_its_addresses_has_the_same_bits(shape: tuple[int, ...], impl: Impl) -> None:
    moments, at = drawn(*shape).float().requires_grad_(), address(4)
    whole = reparameterize_kl(moments, at, impl=impl)
    half = reparameterize_kl(moments[2:], at[2:], impl=impl)
    assert all(torch.equal(a, b[2:]) for a, b in zip(half, whole, strict=True))
    order = torch.tensor([3, 1, 0, 2], device=DEVICE)
    mixed = reparameterize_kl(moments[order], at[order], impl=impl)
    assert all(torch.equal(a, b[order]) for a, b in zip(mixed, whole, strict=True))
    again = reparameterize_kl(moments, at, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True))
    assert torch.equal(gradient(again, moments), gradient(whole, moments))


@pytest.mark.parametrize("shape", [(2, 8, 4, 4), (2, 6, 2, 4), (2, 6, 3, 3), (2, 50)], ids=str)
def test_tiles_change_no_bit_of_the_sample_and_only_the_order_of_the_sum(shape: tuple[int, ...]) -> None:
    at = address(2)
    for _, moments in list(laid(drawn(*shape).float()))[:2]:
        z, kl = reparameterize._fused(moments, at)
        back = gradient((z, kl), moments)
        for tile in (16, 64):
            other, sums = reparameterize._fused(moments, at, tile)
            assert torch.equal(other, z) and torch.equal(gradient((other, sums), moments), back)
            assert torch.allclose(sums, kl, rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_normals_themselves_give_what_their_address_gives(impl: Impl) -> None:
    moments, at = drawn(2, 8, 2, 2).float(), address(2)
    z, kl = reparameterize_kl(moments, at, impl=impl)
    drawn_z, drawn_kl = reparameterize_kl(moments, noise.normal_at(at, (4, 2, 2), impl=impl))
    assert error(drawn_z, z.double()) < VALUE[torch.float32] and error(drawn_kl, kl.double()) < VALUE[torch.float32]


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_changes_nothing(impl: Impl) -> None:
    at = address(2)
    for dtype in (torch.float32, torch.bfloat16):
        moments = drawn(2, 8, 2, 2).to(dtype)
        plain = reparameterize_kl(moments, at, impl=impl)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            inside = reparameterize_kl(moments, at, impl=impl)
        assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(plain, inside, strict=True))


# ---------------------------------------------------------------- backward
@pytest.mark.parametrize("impl", IMPLS)
def test_a_backward_may_come_twice_and_takes_expanded_gradients(impl: Impl) -> None:
    for shape in ((2, 8, 2, 6), (2, 10)):
        for name, moments in laid(drawn(*shape).float()):
            z, kl = reparameterize_kl(moments, address(2), impl=impl)
            total = z.sum() + 0.5 * kl.sum()  # both gradients come with strides of 0
            (first,) = torch.autograd.grad(total, moments, retain_graph=True)
            before = moments.detach().clone()
            (second,) = torch.autograd.grad(total, moments, retain_graph=True)
            assert torch.equal(first, second) and torch.equal(moments, before), name
            reference = moments.detach().double().requires_grad_()
            true_z, true_kl = true(reference, address(2), impl)
            (wanted,) = torch.autograd.grad(true_z.sum() + 0.5 * true_kl.sum(), reference)
            assert error(first, wanted) < GRADIENT[torch.float32], name
            (of_kl,) = torch.autograd.grad(kl.sum(), moments)
            (wanted,) = torch.autograd.grad(true(reference, address(2))[1].sum(), reference)
            assert error(of_kl, wanted) < GRADIENT[torch.float32], name


def test_the_definition_has_two_derivatives() -> None:
    moments, eps = drawn(2, 4, 1, 2).requires_grad_(), drawn(2, 2, 1, 2, seed=3)
    assert torch.autograd.gradcheck(lambda x: reparameterize_kl(x, eps), moments)
    assert torch.autograd.gradgradcheck(lambda x: reparameterize_kl(x, eps), moments)


@pytest.mark.parametrize("shape", [(2, 8, 2, 4), (2, 6, 3, 3), (2, 10)], ids=str)
def test_the_kernel_is_differentiated_twice_as_the_definition_is(shape: tuple[int, ...]) -> None:
    at = address(2)
    for name, moments in laid(drawn(*shape).float()):
        wanted = []
        for x, impl in ((moments, "triton"), (moments.detach().double().requires_grad_(), "eager")):
            z, kl = reparameterize_kl(x, at, impl=impl)  # type: ignore[arg-type]
            of_z, of_kl = (
                drawn(*z.shape, seed=1).to(x).requires_grad_(),
                drawn(*kl.shape, seed=2).to(x).requires_grad_(),
            )
            (slope,) = torch.autograd.grad((z, kl), x, (of_z, of_kl), create_graph=True)
            assert slope.requires_grad
            wanted.append(torch.autograd.grad(slope.square().sum(), (x, of_z, of_kl)))
        for found, reference in zip(*wanted, strict=True):
            assert error(found, reference) < TWICE, name


@pytest.mark.parametrize("shape", [(2, 8, 2, 4), (2, 6, 3, 3), (2, 10)], ids=str)
def test_torch_knows_the_operation(shape: tuple[int, ...]) -> None:
    moments = drawn(*shape).float()
    if moments.dim() == 4:
        moments = moments.contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(reparameterize._fused, (moments.requires_grad_(), address(2)))


def test_a_graph_holds_it_whole() -> None:
    """As in a compiled network; on a GPU by inductor, with the kernel inside."""
    for impl in IMPLS:
        with preferred(impl):
            moments, at = drawn(2, 8, 2, 4).float().requires_grad_(), address(2)
            function = torch.compile(reparameterize_kl, fullgraph=True, backend="aot_eager")
            found, plain = (gradient(f(moments, at), moments) for f in (function, reparameterize_kl))
            assert error(found, plain.double()) < GRADIENT[torch.float32]


def test_nothing_that_backward_keeps_is_as_large_as_noise() -> None:
    kept: list[Tensor] = []
    moments, at = drawn(2, 8, 2, 4).float().requires_grad_(), address(2)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        reparameterize_kl(moments, at, impl="triton")
    assert sorted(x.numel() for x in kept) == sorted([moments.numel(), at.numel()])


# ---------------------------------------------------------------- sizes and refusals
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 8, 2, 2), (0, 6), (2, 8, 0, 2)], ids=str)
def test_nothing_is_something_too(shape: tuple[int, ...], impl: Impl) -> None:
    moments = torch.zeros(shape, device=DEVICE, requires_grad=True)
    z, kl = reparameterize_kl(moments, address(shape[0]), impl=impl)
    assert z.shape == (shape[0], shape[1] // 2, *shape[2:]) and kl.tolist() == [0.0] * shape[0]
    (found,) = torch.autograd.grad(z.sum() + kl.sum(), moments)
    assert found.shape == shape


def test_what_cannot_run_says_why() -> None:
    moments = torch.zeros(2, 4, device=DEVICE)
    with pytest.raises(ValueError, match="impl: triton cannot run reparameterize_kl: the noise is drawn already"):
        reparameterize_kl(moments, torch.zeros(2, 2, device=DEVICE), impl="triton")
    with pytest.raises(ValueError, match="reparameterize_kl: float64 is for references"):
        reparameterize_kl(moments.double(), address(2), impl="triton")
    huge = torch.empty((1, 2, 2**15, 2**15), device="meta", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="2\\^31"):
        reparameterize_kl(huge, torch.empty((1, 3), dtype=torch.int64, device="meta"), impl="triton")


# ---------------------------------------------------------------- mutations
MUTATIONS = {
    "no cast as values are loaded": (".to(tl.float32)", ""),
    "a sum of halves": ("_excess(logvar)), 0.0)", "_excess(logvar)).to(tl.float16).to(tl.float32), 0.0)"),
    "no series near 0": ("tl.abs(v) < 1.0", "tl.abs(v) < 0.0"),
    "a gradient beyond the clamp": ("(raw >= LO) & (raw <= HI)", "raw >= LO"),
    "none at the clamp": ("(raw >= LO) & (raw <= HI)", "(raw > LO) & (raw < HI)"),
    "nothing": ("", ""),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_kernel_is_found(name: str, tmp_path: Path) -> None:
    """Which also says that the tolerances above are tight enough."""
    source, (text, other) = inspect.getsource(reparameterize), MUTATIONS[name]
    assert text in source
    path = tmp_path / "mutated.py"
    path.write_text(source.replace(text, other).replace("tandem::", f"tandem_without_{list(MUTATIONS).index(name)}::"))
    spec = importlib.util.spec_from_file_location("mutated", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    edge = torch.cat(
        [torch.zeros(2, 4, 2, 4), torch.tensor([-30.0, 20.0, 21.0, -31.0]).view(1, 4, 1, 1).expand(2, 4, 2, 4)], 1
    )
    worst = 0.0
    for given in (drawn(2, 8, 2, 4).bfloat16(), drawn(2, 8, 2, 4, scale=1e-3).float(), edge.to(DEVICE)):
        moments, reference, at = given.clone().requires_grad_(), given.double().requires_grad_(), address(2)
        wanted = true(reference, at, "triton")
        try:
            found = module._fused(moments, at)
            off = error(found[1], wanted[1].detach()) / 2e-6
            off = max(off, error(gradient(found, moments), gradient(wanted, reference)) / GRADIENT[given.dtype])
        except Exception:  # noqa: BLE001  the compiler's, for an exponential of bfloat16
            off = math.inf
        worst = max(worst, math.inf if math.isnan(off) else off)
    assert (worst < 1) == (name == "nothing"), worst

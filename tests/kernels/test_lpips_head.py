"""The head of LPIPS: the definition against float64, and the kernel against the definition."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests.kernels.tolerances import DEVICE, DTYPES, GRADIENT, IMPLS, TWICE, VALUE, error, layouts
from trainer.kernels import choose
from trainer.kernels import lpips_head as module
from trainer.kernels.lpips_head import lpips_head

triton = pytest.importorskip("triton")
REFUSED = (triton.CompilationError, triton.runtime.errors.InterpreterError)

# channels of EfficientNet-Lite0 and odd ones, several tiles of pixels and fewer than one
SIZES = ((2, 16, 12, 11), (2, 40, 4, 3), (2, 112, 2, 2), (2, 7, 1, 1), (2, 2, 2, 3))
DEEP = ((1, 512, 3, 3), (1, 1024, 1, 3))


def maps(
    sizes: Sequence[tuple[int, ...]] = SIZES, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=draw).to(DEVICE, dtype) for size in sizes]


def heads(sizes: Sequence[tuple[int, ...]] = SIZES) -> list[Tensor]:
    draw = torch.Generator().manual_seed(9)
    return [torch.rand((1, size[1], 1, 1), generator=draw).to(DEVICE) for size in sizes]


def doubles(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in tensors]


def gradients(distance: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Of a sum that weighs samples apart."""
    rate = torch.arange(1.0, len(distance) + 1, device=DEVICE, dtype=distance.dtype)
    return torch.autograd.grad((distance * rate).sum(), inputs, retain_graph=True)


def reference(a: Sequence[Tensor], b: Sequence[Tensor], w: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
    """The distance and its gradients, written out in float64."""
    a, b = doubles(a), doubles(b)
    distance = torch.zeros(len(a[0]), dtype=torch.float64, device=DEVICE)
    for layer, (x, y) in enumerate(zip(a, b, strict=True)):
        u, v = (z / (z.norm(dim=1, keepdim=True) + 1e-10) for z in (x, y))
        weight = 1 if w is None else w[layer].double()
        distance = distance + ((u - v).square() * weight).sum(1).mean((1, 2))
    return distance.detach(), *gradients(distance, [*a, *b])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_distance_and_gradients_are_those_of_float64_in_any_layout(impl: choose.Impl, dtype: torch.dtype) -> None:
    a, b, w = maps(dtype=dtype), maps(seed=1, dtype=dtype), heads()
    true, *slopes = reference(a, b, w)
    for one, other in zip(zip(*map(layouts, a), strict=True), zip(*map(layouts, b), strict=True), strict=True):
        x, y = [leaf for _, leaf in one], [leaf for _, leaf in other]
        distance = lpips_head(x, y, w, impl=impl)
        assert distance.dtype == torch.float32
        assert error(distance, true) < VALUE[torch.float32]  # of maps of any dtype: they are exact in float32
        for leaf, found, slope in zip([*x, *y], gradients(distance, [*x, *y]), slopes, strict=True):
            assert found.dtype == dtype and error(found, slope) < GRADIENT[dtype], one[0][0]
            if one[0][0] in ("contiguous", "channels_last"):
                assert found.stride() == leaf.stride()


@pytest.mark.parametrize("impl", IMPLS)
def test_layouts_may_differ_weights_may_be_none_and_channels_many(impl: choose.Impl) -> None:
    a, b = maps(DEEP), maps(DEEP, seed=1, dtype=torch.bfloat16)
    a = [x.contiguous(memory_format=torch.channels_last) for x in a]
    true, *slopes = reference(a, b, None)
    leaves = [x.requires_grad_() for x in (*a, *b)]
    distance = lpips_head(a, b, None, impl=impl)
    assert error(distance, true) < VALUE[torch.float32]
    for leaf, found, slope in zip(leaves, gradients(distance, leaves), slopes, strict=True):
        assert found.dtype == leaf.dtype and error(found, slope) < GRADIENT[leaf.dtype]


@pytest.mark.parametrize("impl", IMPLS)
def test_a_pixel_without_features_counts_and_has_gradient_zero(impl: choose.Impl) -> None:
    sizes = ((2, 24, 4, 3),)
    (a,), (b,), w = maps(sizes), maps(sizes, seed=1), heads(sizes)
    a[:, :, 0, 0] = b[:, :, 1, 1] = 0
    a[:, :, 2, 2] = b[:, :, 2, 2] = 0
    x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
    distance = lpips_head([x], [y], w, impl=impl)
    # away from them as ever; 1 channel's worth of the other's weight where one is empty
    true, *slopes = reference([a], [b], w)
    assert error(distance, true) < VALUE[torch.float32]
    for found, slope, full in zip(gradients(distance, [x, y]), slopes, (a, b), strict=True):
        empty = (full == 0).all(1, keepdim=True).expand_as(full)
        assert not found[empty].count_nonzero()
        assert error(found[~empty], slope[~empty]) < GRADIENT[torch.float32]
    first = torch.autograd.grad(distance.sum(), [x, y], create_graph=True)
    second = torch.autograd.grad(sum((g * g).sum() for g in first), [x, y], create_graph=True)
    third = torch.autograd.grad(sum((g * g).sum() for g in second), [x, y])
    for found, full in zip((*first, *second, *third), (a, b) * 3, strict=True):
        assert found.isfinite().all() and not found[(full == 0).all(1, keepdim=True).expand_as(full)].count_nonzero()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_equal_maps_are_at_distance_zero_exactly(impl: choose.Impl, dtype: torch.dtype) -> None:
    a = [x.requires_grad_() for x in maps(SIZES[:3], dtype=dtype)]
    b = [x.detach().contiguous(memory_format=torch.channels_last) for x in a]
    distance = lpips_head(a, b, heads(SIZES[:3]), impl=impl)
    assert distance.tolist() == [0.0] * 2
    assert not any(g.count_nonzero() for g in gradients(distance, a))


def test_the_definition_has_the_derivatives_that_it_claims() -> None:
    sizes = ((2, 3, 2, 1), (2, 4, 1, 1))
    inputs = doubles([*maps(sizes), *maps(sizes, seed=1), *heads(sizes)])

    def distance(*x: Tensor) -> Tensor:
        return lpips_head(x[:2], x[2:4], x[4:] or None, impl="eager")

    for given in (inputs, inputs[:4]):
        assert torch.autograd.gradcheck(distance, given)
        assert torch.autograd.gradgradcheck(distance, given)


def test_the_kernel_is_differentiated_twice_through_the_definition() -> None:
    sizes = ((2, 24, 3, 2), (2, 40, 2, 2))
    a, b, w = maps(sizes), maps(sizes, seed=1), heads(sizes)

    def twice(impl: choose.Impl, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        distance = lpips_head(inputs[:2], inputs[2:], [h.to(inputs[0].dtype) for h in w], impl=impl)
        first = torch.autograd.grad(distance.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    true = twice("eager", doubles([*a, *b]))
    found = twice("triton", [x.detach().requires_grad_() for x in (*a, *b)])
    assert all(error(g, t) < TWICE for g, t in zip(found, true, strict=True))
    # a map that stands on both sides is two inputs
    x, y = maps(sizes[:1])[0].requires_grad_(), maps(sizes[:1], seed=1)[0].requires_grad_()
    distance = lpips_head([x, y], [y, x], None, impl="triton")
    plain = torch.autograd.grad(distance.sum(), [x, y], retain_graph=True)
    with_graph = torch.autograd.grad(distance.sum(), [x, y], create_graph=True)
    for g, h in zip(plain, with_graph, strict=True):
        torch.testing.assert_close(g, h, rtol=1e-5, atol=1e-7)


def test_only_needed_gradients_are_made_and_nothing_that_is_saved_changes() -> None:
    a, b, w = maps(), maps(seed=1), heads()
    x = [t.clone().requires_grad_(number != 1) for number, t in enumerate(a)]
    y = [t.clone().requires_grad_(number == 2) for number, t in enumerate(b)]
    distance = lpips_head(x, y, w, impl="triton")
    upstream = torch.ones((), device=DEVICE).expand(2)  # as sum() hands it on: strides of 0
    once, again = ([g.clone() for g in _backward(distance, upstream, [*x, *y])] for _ in range(2))
    dense = _backward(lpips_head(x, y, w, impl="triton"), torch.ones(2, device=DEVICE), [*x, *y])
    assert all(torch.equal(g, h) and torch.equal(g, i) for g, h, i in zip(once, again, dense, strict=True))
    assert all(torch.equal(t, u) for t, u in zip([*a, *b], [*x, *y], strict=True))
    assert torch.equal(lpips_head(x, y, w, impl="triton"), distance)
    slopes = reference(a, b, w)[1:]
    kept = [number for number, t in enumerate([*x, *y]) if t.requires_grad]
    found = _backward(distance, torch.arange(1.0, 3.0, device=DEVICE), [*x, *y])
    assert all(error(g, slopes[i]) < GRADIENT[torch.float32] for g, i in zip(found, kept, strict=True))


def _backward(distance: Tensor, upstream: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(distance, [x for x in inputs if x.requires_grad], upstream, retain_graph=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, which interprets
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_not_finite_is_not_hidden(impl: choose.Impl, value: float) -> None:
    sizes = ((2, 24, 3, 2), (2, 16, 2, 2))
    a, b = maps(sizes), maps(sizes, seed=1)
    a[1][1, 3, 0, 1] = value
    x = a[1].requires_grad_()
    distance = lpips_head(a, b, heads(sizes), impl=impl)
    assert distance.isfinite().tolist() == [True, False]
    (gradient,) = gradients(distance, [x])
    assert gradient[0].isfinite().all() and not gradient[1, :, 0, 1].isfinite().any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("impl", IMPLS)
def test_features_of_any_size_have_a_finite_distance_and_gradient(impl: choose.Impl) -> None:
    sizes = ((2, 24, 3, 2),)
    for dtype, scale in (
        *((torch.float32, scale) for scale in (1e-30, 1e-18, 1e18, 1e30)),
        (torch.float16, 2e4),
        (torch.bfloat16, 1e38),
    ):
        (a,), (b,) = maps(sizes), maps(sizes, seed=1)
        x, y = ((t.clamp(-3, 3) * scale).to(dtype).requires_grad_() for t in (a, b))
        distance = lpips_head([x], [y], None, impl=impl)
        assert distance.isfinite().all()
        found = gradients(distance, [x, y])
        assert all(g.isfinite().all() for g in found)
        if scale == 1e-18:  # where the root of eps^2 that stood here before was off by far
            true, *slopes = reference([x], [y], None)
            assert error(distance, true) < 1e-5 and all(error(*p) < 1e-5 for p in zip(found, slopes, strict=True))


def test_autocast_changes_nothing() -> None:
    sizes = SIZES[:2]
    a, b, w = maps(sizes), maps(sizes, seed=1), heads(sizes)
    for impl in IMPLS:
        leaves = [x.clone().requires_grad_() for x in a]
        plain = lpips_head(leaves, b, w, impl=impl)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            cast = lpips_head(leaves, b, w, impl=impl)
            second = torch.autograd.grad(cast.sum(), leaves, create_graph=True)
        assert torch.equal(cast, plain)
        for g, h in zip(torch.autograd.grad(plain.sum(), leaves, create_graph=True), second, strict=True):
            assert torch.equal(g, h) and h.dtype == torch.float32


def mutant(path: Path, name: str, found: str, put: str) -> ModuleType:
    """The operation's file with `put` for `found`."""
    source = Path(module.__file__).read_text()
    assert found in source
    file = path / f"{name}.py"
    file.write_text(source.replace(found, put).replace("tandem::", f"{name}::"))
    specification = importlib.util.spec_from_file_location(name, file)
    assert specification is not None and specification.loader is not None
    made = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(made)
    return made


def test_tolerances_notice_arithmetic_that_is_not_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (maps(SIZES[:3], seed=seed, dtype=torch.bfloat16) for seed in (0, 1))
    w = [head.bfloat16() for head in heads(SIZES[:3])]
    true, *slopes = reference(a, b, w)
    leaves = [x.requires_grad_() for x in (*a, *b)]
    uncast = mutant(tmp_path, "uncast", "other=0.0).to(tl.float32)", "other=0.0)")
    with pytest.raises(REFUSED):  # triton knows no root of bfloat16
        uncast.lpips_head(a, b, w, impl="triton")
    halves = mutant(tmp_path, "halves", "return x * inverse,", "return (x * inverse).to(tl.float16).to(tl.float32),")
    monkeypatch.setattr(module, "_exact", lambda x: x)  # the definition in bfloat16
    for impl, function in (("triton", halves.lpips_head), ("eager", lpips_head)):
        distance = function(a, b, w, impl=impl)
        assert error(distance, true) > 3 * VALUE[torch.float32], impl
    found = gradients(distance, leaves)
    assert max(error(g, s) for g, s in zip(found, slopes, strict=True)) > GRADIENT[torch.bfloat16]


def test_the_operators_keep_torchs_contract_and_compile_as_part_of_a_graph() -> None:
    sizes = ((2, 24, 3, 2), (2, 7, 2, 2))
    a, b, w = maps(sizes, dtype=torch.bfloat16), maps(sizes, seed=1), heads(sizes)
    a[0] = a[0].contiguous(memory_format=torch.channels_last)
    leaves = [x.requires_grad_() for x in (*a, *b)]
    torch.library.opcheck(torch.ops.tandem.lpips_head.default, (a, b, w))
    torch.library.opcheck(torch.ops.tandem.lpips_head.default, (a, b, []))
    plain = [x.detach() for x in leaves]
    upstream = torch.ones((), device=DEVICE).expand(2)
    needed = [True, True, False, True]
    torch.library.opcheck(torch.ops.tandem.lpips_head_backward.default, (upstream, plain[:2], plain[2:], w, needed))

    def loss(*x: Tensor) -> Tensor:
        return lpips_head(x[:2], x[2:], w, impl="triton").sum()

    whole = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, true = torch.autograd.grad(whole(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves)
    assert all(torch.equal(g, t) and g.stride() == t.stride() for g, t in zip(found, true, strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, within inductor
def test_compiled_is_the_definition() -> None:
    sizes = ((2, 24, 5, 4),)
    (a,), (b,), w = maps(sizes), maps(sizes, seed=1), heads(sizes)
    x = a.clone().requires_grad_()
    distance = lpips_head([x], [b], w, impl="compiled")
    true, slope, _ = reference([a], [b], w)
    assert error(distance, true) < VALUE[torch.float32]
    assert error(*gradients(distance, [x]), slope) < GRADIENT[torch.float32]
    with choose.differentiated_twice(), pytest.raises(ValueError, match="lpips_head: it is differentiated twice"):
        lpips_head([x], [b], w, impl="compiled")


def test_what_the_kernel_cannot_take_is_named() -> None:
    (a,) = maps(((2, 24, 3, 2),))
    wide = torch.zeros((1, 1025, 1, 1), device=DEVICE)
    none = torch.zeros((1, 4, 0, 3), device=DEVICE)
    learnt = [torch.ones((1, 24, 1, 1), device=DEVICE, requires_grad=True)]
    for x, w, reason in (
        (wide, None, "1025 channels"),
        (none, None, "0x3"),
        (a.double(), None, "float64"),
        (a, learnt, "gradient of the weights"),
    ):
        with pytest.raises(ValueError, match=f"lpips_head: .*{reason}"):
            lpips_head([x], [x], w, impl="triton")
    (slope,) = torch.autograd.grad(lpips_head([a], [-a], learnt, impl="eager").sum(), learnt)
    assert slope.shape == (1, 24, 1, 1) and (slope > 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_an_empty_batch_has_no_distances(impl: choose.Impl) -> None:
    x = torch.zeros((0, 24, 3, 2), device=DEVICE, requires_grad=True)
    distance = lpips_head([x], [x.detach()], None, impl=impl)
    assert distance.shape == (0,) and distance.dtype == torch.float32
    assert torch.autograd.grad(distance.sum(), x)[0].shape == x.shape

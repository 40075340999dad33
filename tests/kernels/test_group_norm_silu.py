"""Normalisation and activation in one: plain and fused against float64, in every layout and dtype."""

import re
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.kernels.tolerances import DEVICE, DTYPES, GRADIENT, IMPLS, TWICE, VALUE, error, layouts
from trainer.kernels import group_norm_silu as module
from trainer.kernels.choose import preferred
from trainer.kernels.group_norm_silu import group_norm_silu

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, where the interpreter meets inf and nan

EPS = 1e-6
SHAPES = {  # (B, C, H, W), groups
    "of an f8": ((2, 128, 5, 8), 32),
    "one pixel": ((1, 16, 1, 1), 4),
    "fewer pixels than a tile, odd": ((3, 64, 3, 5), 8),
    "one group": ((2, 32, 7, 5), 1),
    "a group a channel": ((1, 32, 12, 15), 32),
    "the most channels": ((1, 1024, 3, 3), 32),
    "several tiles": ((1, 256, 7, 5), 32),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x with a mean of two deviations, weight, bias, and the gradient that arrives."""
    x, weight, bias = normal(*shape) + 2, 1 + 0.3 * normal(shape[1], seed=1), normal(shape[1], seed=2)
    return x.to(dtype), weight.requires_grad_(), bias.requires_grad_(), normal(*shape, seed=3).to(dtype)


def defined(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    """Wu and He 2018, eq. 1 to 3, and SiLU, written out."""
    parts = x.reshape(len(x), groups, -1)
    apart = parts - parts.mean(2, keepdim=True)
    y = (apart / (apart.square().mean(2, keepdim=True) + EPS).sqrt()).view_as(x)
    y = y * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)
    return y * torch.sigmoid(y)


def true(x: Tensor, groups: int, weight: Tensor, bias: Tensor, dy: Tensor) -> list[Tensor]:
    """In float64: y, dx, dweight, dbias."""
    leaves = [t.detach().double().contiguous().requires_grad_() for t in (x, weight, bias)]
    y = defined(leaves[0], groups, *leaves[1:])
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.double())]


def all_of(x: Tensor, groups: int, weight: Tensor, bias: Tensor, dy: Tensor, impl: Any) -> list[Tensor]:
    y = group_norm_silu(x, groups, weight, bias, EPS, impl=impl)
    return [y.detach(), *torch.autograd.grad(y, (x, weight, bias), dy)]


def fitting(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The layouts that the kernel takes."""
    return ((name, one) for name, one in layouts(x) if name in ("contiguous", "channels_last"))


def check(found: list[Tensor], wanted: list[Tensor], dtype: torch.dtype, *, plain: bool = False) -> None:
    assert [t.dtype for t in found] == [dtype, dtype, torch.float32, torch.float32]
    bounds = VALUE[dtype], GRADIENT[dtype], GRADIENT[torch.float32], GRADIENT[torch.float32]
    if plain and dtype == torch.float32:  # torch's own takes the variance from mean squares in channels last on a CPU
        bounds = (5e-6,) * 4
    for name, mine, its, bound in zip(("y", "dx", "dweight", "dbias"), found, wanted, bounds, strict=True):
        assert error(mine, its) <= bound, name


# ---------------------------------------------------------------- right
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_float64_in_dtype_and_memory_format_of_x(
    shape: str, dtype: torch.dtype
) -> None:
    size, groups = SHAPES[shape]
    x, weight, bias, dy = inputs(size, dtype)
    wanted = true(x, groups, weight, bias, dy)
    for impl, (name, one) in [*product(IMPLS, fitting(x)), *(("eager", more) for more in layouts(x))]:
        found = all_of(one, groups, weight, bias, dy, impl)
        check(found, wanted, dtype, plain=impl == "eager")
        if name != "sliced" and name != "turned":
            assert found[0].stride() == one.stride()
        if impl == "triton":
            assert found[1].stride() == one.stride()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_network_held_in_16_bits_gets_its_gradients_in_16_bits(impl: str) -> None:
    x, weight, bias, dy = inputs((2, 64, 5, 5), torch.bfloat16)
    weight, bias = (t.detach().bfloat16().requires_grad_() for t in (weight, bias))
    found = all_of(x.requires_grad_(), 8, weight, bias, dy, impl)
    wanted = true(x, 8, weight, bias, dy)
    assert all(t.dtype == torch.bfloat16 for t in found)
    assert all(error(mine, its) <= VALUE[torch.bfloat16] for mine, its in zip(found, wanted, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_changes_nothing(impl: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, bias, dy = inputs((2, 32, 5, 5), dtype)
        x.requires_grad_()
        outside = all_of(x, 8, weight, bias, dy, impl)
        with torch.autocast(DEVICE, torch.bfloat16):
            inside = all_of(x, 8, weight, bias, dy, impl)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(inside, outside, strict=True))


def test_statistics_of_a_mean_a_thousand_deviations_away_keep_their_digits() -> None:
    """float32 holds such an x to 3e-5 deviations, and a difference of mean squares would leave nothing of it."""
    x = (1000 + normal(1, 128, 8, 8)).requires_grad_()
    _, weight, bias, dy = inputs((1, 128, 8, 8))
    wanted = true(x, 32, weight, bias, dy)
    for one in (x, x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()):
        assert error(all_of(one, 32, weight, bias, dy, "triton")[0], wanted[0]) <= 1e-4


def test_extreme_values_stay_finite() -> None:
    """Flat groups, a single spike, and inputs of SiLU of thousands either way."""
    x = torch.zeros(3, 32, 6, 6, device=DEVICE)
    x[1, :, 2, 3] = 1e4
    x[2] = 1e18 * normal(32, 6, 6)
    for scale in (1.0, -5000.0):
        weight, bias = (torch.full((32,), value, device=DEVICE, requires_grad=True) for value in (scale, 0.5))
        dy = normal(3, 32, 6, 6, seed=3)
        wanted = true(x, 8, weight, bias, dy)
        for impl in IMPLS:
            found = all_of(x.clone().requires_grad_(), 8, weight, bias, dy, impl)
            assert all(t.isfinite().all() for t in found)
            for sample in (0, 1, 2):
                for mine, its in zip(found[:2], wanted[:2], strict=True):
                    assert error(mine[sample], its[sample]) <= 2e-5  # x of 1e18 is that far from flat in float32


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_a_number_spoils_its_group_and_no_other(value: float) -> None:
    x, weight, bias, dy = inputs((2, 32, 9, 16))
    x[1, 5, 3, 3] = value
    for impl, (_, one) in product(IMPLS, fitting(x)):
        y, dx, dweight, dbias = all_of(one, 8, weight, bias, dy, impl)
        assert y[1, 4:8].isnan().all() and dx[1, 4:8].isnan().all()
        assert dweight[4:8].isnan().all() and dbias[4:8].isnan().all()
        assert y[0].isfinite().all() and dx[0].isfinite().all() and dweight[8:].isfinite().all()
        assert y[1, 8:].isfinite().all() and dx[1, :4].isfinite().all()


def test_an_empty_batch_and_an_empty_map_are_no_trouble() -> None:
    for shape in ((0, 32, 4, 4), (2, 32, 0, 4)):
        x, weight, bias, dy = inputs(shape)
        y, dx, dweight, dbias = all_of(x.requires_grad_(), 8, weight, bias, dy, "triton")
        assert y.shape == dx.shape == shape
        assert not dweight.any() and not dbias.any()


def test_large_samples_are_split_among_a_bounded_number_of_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles a program, the last ones beyond the end: as in samples that an interpreter has no time for."""
    monkeypatch.setattr(module, "FORWARD", 2)
    monkeypatch.setattr(module, "BACKWARD", 3)
    x, weight, bias, dy = inputs((1, 512, 13, 7))  # 12 tiles
    wanted = true(x, 32, weight, bias, dy)
    for _, one in fitting(x):
        check(all_of(one, 32, weight, bias, dy, "triton"), wanted, torch.float32)
    grids = [module._plan(one, 32, 256)[0][1] for one in (torch.empty(1, 128, n, n, device="meta") for n in (64, 2048))]
    assert grids == [128, 256]


def test_without_a_float32_cast_it_would_not_pass(tmp_path: Path) -> None:
    """The kernels with arithmetic in the dtype of x: on a GPU bfloat16's own, in the interpreter garbage."""
    text = Path(module.__file__).read_text()
    cut = re.sub(r"(other=0\.0\))\.to\(tl\.float32\)", r"\1", text)
    assert cut != text
    path = tmp_path / "careless.py"
    path.write_text(cut.replace("tandem::", "careless::"))
    careless: dict[str, Any] = {"__name__": "careless", "__file__": str(path)}
    exec(compile(path.read_text(), str(path), "exec"), careless)
    x, weight, bias, dy = inputs((2, 64, 8, 8), torch.bfloat16)
    wanted = true(x, 8, weight, bias, dy)
    y, _, _ = careless["_forward"](x, 8, weight, bias, EPS)
    assert not error(y, wanted[0]) <= VALUE[torch.bfloat16]


# ---------------------------------------------------------------- how it is used
def test_the_same_bits_every_time_whatever_batch_a_sample_is_in_and_however_often_backward_runs() -> None:
    x, weight, bias, dy = inputs((3, 64, 9, 8), torch.bfloat16)
    for _, one in fitting(x):
        first = all_of(one, 8, weight, bias, dy, "triton")
        y = group_norm_silu(one, 8, weight, bias, EPS, impl="triton")
        kept, arrived = one.detach().clone(), dy.clone()
        for _ in range(2):
            again = [y, *torch.autograd.grad(y, (one, weight, bias), dy, retain_graph=True)]
            assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
        assert torch.equal(one, kept) and torch.equal(dy, arrived)  # nothing is written over
        alone = all_of(one.detach()[1:2].requires_grad_(), 8, weight, bias, dy[1:2], "triton")
        assert torch.equal(alone[0], first[0][1:2]) and torch.equal(alone[1], first[1][1:2])


def test_gradients_may_come_expanded_and_only_those_asked_for_are_made() -> None:
    x, weight, bias, _ = inputs((2, 32, 9, 11))
    for _, one in fitting(x):
        results = []
        for impl in IMPLS:
            y = group_norm_silu(one, 8, weight, bias, EPS, impl=impl)
            results.append(torch.autograd.grad(y.sum(), (one, weight, bias)))
            if impl == "triton" or one.is_contiguous():  # else torch's own crashes: it takes x's gradient for granted
                alone = group_norm_silu(one.detach(), 8, weight, bias.detach(), EPS, impl=impl)
                assert error(torch.autograd.grad(alone.sum(), weight)[0], results[-1][1].double()) < 1e-6
            frozen = group_norm_silu(one, 8, weight.detach(), bias.detach(), EPS, impl=impl)
            assert error(torch.autograd.grad(frozen.sum(), one)[0], results[-1][0].double()) < 1e-6
        for mine, plain in zip(*results, strict=True):
            assert error(mine, plain.double()) < 5e-6


def twice(function: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    y = function(x, 8, weight, bias)
    first = torch.autograd.grad(y.square().sum(), (x, weight), create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight, bias))


def test_it_may_be_differentiated_twice_and_more() -> None:
    x, weight, bias, _ = inputs((2, 16, 3, 2))
    double = [t.detach().double().requires_grad_() for t in (x[:1, :, :2, :1], weight, bias)]

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return group_norm_silu(x, 8, weight, bias, EPS, impl="eager")

    assert torch.autograd.gradcheck(plain, double) and torch.autograd.gradgradcheck(plain, double)
    exact = twice(defined, *(t.detach().double().requires_grad_() for t in (x, weight, bias)))
    for impl, (_, one) in product(IMPLS, fitting(x)):
        found = twice(lambda x, g, w, b, i=impl: group_norm_silu(x, g, w, b, EPS, impl=i), one, weight, bias)
        assert all(error(mine, its) <= TWICE for mine, its in zip(found, exact, strict=True))


def test_torch_finds_nothing_wrong_with_the_operators() -> None:
    for batch, dtype in ((2, torch.bfloat16), (0, torch.float32)):
        x, weight, bias, dy = inputs((batch, 16, 3, 5), dtype)
        one = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        torch.library.opcheck(module._forward, (one, 8, weight, bias, EPS))
        one, weight, bias = one.detach(), weight.detach(), bias.detach()
        _, mean, rstd = module._forward(one, 8, weight, bias, EPS)
        torch.library.opcheck(module._backward, (dy, one, 8, weight, bias, mean, rstd, batch > 0))


def test_it_goes_into_a_compiled_graph_as_a_whole() -> None:
    x, weight, bias, dy = inputs((2, 16, 4, 4))
    x.requires_grad_()

    def network(x: Tensor) -> Tensor:
        return group_norm_silu(2 * x, 8, weight, bias, EPS, impl="triton") + 1

    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    found, wanted = ([y, *torch.autograd.grad(y, (x, weight), dy)] for y in (compiled(x), network(x)))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_what_the_kernel_does_not_take_is_refused_by_name_or_left_to_plain_torch() -> None:
    for shape, groups, reason in (
        ((2, 24, 4, 4), 8, "24 channels in 8 groups"),
        ((2, 8, 4, 4), 2, "8 channels in 2 groups"),
        ((2, 2048, 1, 1), 32, "2048 channels"),
        ((2, 32, 4), 8, "3 dimensions"),
    ):
        x, weight, bias, _ = inputs(shape)
        with pytest.raises(ValueError, match=f"triton cannot run group_norm_silu: {reason}"):
            group_norm_silu(x, groups, weight, bias, EPS, impl="triton")
        plain = functional.silu(functional.group_norm(x, groups, weight, bias, EPS))
        assert torch.equal(group_norm_silu(x, groups, weight, bias, EPS, impl="auto"), plain)
    x, weight, bias, _ = inputs((2, 32, 4, 4))
    with pytest.raises(ValueError, match="neither contiguous nor channels last"):
        group_norm_silu(x.transpose(2, 3), 8, weight, bias, EPS, impl="triton")


def test_only_the_input_is_kept_for_backward() -> None:
    """The kernel: x, and a few values a group. Plain torch in 16 bits: x and SiLU's input in float32."""
    x, weight, bias, _ = inputs((2, 128, 16, 16), torch.bfloat16)
    x.requires_grad_()
    kept: dict[str, float] = {}
    for impl in IMPLS:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            held = group_norm_silu(x, 32, weight, bias, EPS, impl=impl)
        kept[impl] = sum(size for at, size in sizes.items() if at != x.data_ptr()) / held.numel()
    assert kept["triton"] < 0.1 and 7.9 < kept["eager"] < 8.2  # bytes a value beside x


def test_networks_use_it_and_their_weights_keep_the_names_of_two_layers() -> None:
    from trainer.networks import AutoencoderConfig, ImageShape

    config = AutoencoderConfig(width=16, multipliers=(1, 2), blocks=1, latent_shape="map", latent=4)
    torch.manual_seed(0)
    network = config.build(image=ImageShape(3, 16, 16), parameters=3).to(DEVICE)
    plain = nn.Sequential(*(nn.SiLU() if type(m).__name__ == "Done" else m for m in network.encoder.body))
    assert plain.state_dict().keys() == network.encoder.body.state_dict().keys()
    x, seen = normal(2, 3, 16, 16), []
    with preferred("triton"), torch.no_grad():
        fused = network.encoder.body(x)
    seen.append(fused)
    with preferred("eager"), torch.no_grad():
        seen.append(network.encoder.body(x))
    assert error(seen[0], seen[1].double()) < 1e-5

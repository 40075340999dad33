"""Layers whose derivatives are closed: torch's at every order, in every layout, and taken only where asked."""

import contextlib

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.kernels.tolerances import DEVICE, GRADIENT, TWICE, VALUE, error, layouts
from trainer.kernels import convolution
from trainer.kernels.choose import differentiated_twice

# in, out, kernel, stride, padding, height, width
SIZES = [
    (1, 3, (4, 4), (2, 2), (1, 1), 8, 6),  # one channel: by columns on the CPU
    (1, 2, (3, 4), (2, 2), (1, 1), 7, 8),  # an odd height
    (1, 2, (3, 3), (2, 2), (0, 0), 6, 6),  # the last row and column touch no window
    (3, 2, (4, 4), (2, 2), (1, 1), 7, 9),
    (2, 1, (4, 4), (1, 1), (1, 1), 5, 4),
    (2, 4, (1, 1), (1, 1), (0, 0), 3, 3),
    (3, 2, (3, 3), (1, 1), (1, 1), 1, 1),
]


def tensors(size: tuple, *, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    into, out, kernel, _, _, height, width = size
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in
            ((batch, into, height, width), (out, into, *kernel), (out,))]  # fmt: skip
    return tuple(one.to(DEVICE) for one in made)


def orders(function, x: Tensor, weight: Tensor, bias: Tensor, u: Tensor, v: Tensor, w: Tensor) -> list[Tensor]:
    """Value, gradients, and the gradients of a penalty on them."""
    y = function(x, weight, bias)
    first = torch.autograd.grad(y, (x, weight, bias), u, create_graph=True)
    value = (first[0] * v).sum() + (first[0].square() * v).sum() + (first[1] * w).sum() + first[1].square().sum()
    return [y, *first, *torch.autograd.grad(value, (x, weight, u))]


@pytest.mark.parametrize("size", SIZES)
def test_every_derivative_is_that_of_float64(size: tuple) -> None:
    _, _, _, stride, padding, _, _ = size
    x, weight, bias = tensors(size)
    plain = lambda x, weight, bias: functional.conv2d(x, weight, bias, stride, padding)  # noqa: E731
    ours = lambda x, weight, bias: convolution.conv2d(x, weight, bias, stride, padding)  # noqa: E731
    u = torch.randn_like(plain(x, weight, bias))
    v, w = torch.randn_like(x), torch.randn_like(weight)
    bounds = [VALUE[torch.float32], *[GRADIENT[torch.float32]] * 3, *[TWICE] * 3]
    for at in (u, u.mean().expand_as(u)):  # dense, and as a sum hands it on
        true = orders(plain, *(one.detach().requires_grad_() for one in (x, weight, bias, at)), v, w)
        at32 = at.float() if at is u else at.mean().float().expand_as(u)
        with torch.backends.cudnn.flags(allow_tf32=False):
            for (name, image), (_, kernel) in zip(layouts(x.float()), layouts(weight.float()), strict=True):
                leaves = (image, kernel, *(one.detach().requires_grad_() for one in (bias.float(), at32)))
                found = orders(ours, *leaves, v.float(), w.float())
                for i, (one, exact, bound) in enumerate(zip(found, true, bounds, strict=True)):
                    assert error(one, exact.detach()) < bound, (name, at.stride(), i)


@pytest.mark.parametrize("size", SIZES)
def test_the_derivatives_close_at_any_order(size: tuple) -> None:
    _, _, _, stride, padding, _, _ = size
    leaves = [one.requires_grad_() for one in tensors(size, batch=1)]
    function = lambda *given: convolution.conv2d(*given, stride, padding)  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)
    assert torch.autograd.gradcheck(lambda x, w: convolution.conv2d(x, w, None, stride, padding), leaves[:2])

    def third(x: Tensor, weight: Tensor) -> Tensor:
        y = function(x, weight, leaves[2]).square().sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(3).sum(), weight, create_graph=True)
        return second

    assert torch.autograd.gradcheck(third, leaves[:2])


def test_leaky_relu_and_linear_are_those_of_torch() -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 3), (2,)))
    for ours, plain in (
        (lambda: convolution.leaky_relu(x, 0.2), lambda: functional.leaky_relu(x, 0.2)),
        (lambda: convolution.linear(x, weight, bias), lambda: functional.linear(x, weight, bias)),
    ):
        assert torch.equal(ours(), plain())
        leaves = [x] if "leaky" in str(ours().grad_fn.name()).lower() else [x, weight, bias]
        for one, two in zip(*(torch.autograd.grad(f().sin().sum(), leaves) for f in (ours, plain)), strict=True):
            torch.testing.assert_close(one, two)
    assert torch.autograd.gradgradcheck(lambda x: convolution.leaky_relu(x, 0.2), x)
    assert torch.autograd.gradgradcheck(convolution.linear, (x, weight, bias))


def test_a_bend_gives_its_input_no_second_derivative_rather_than_zeros() -> None:
    x = torch.randn(4, requires_grad=True)
    (gradient,) = torch.autograd.grad(convolution.leaky_relu(x * 2, 0.2).sum(), x, create_graph=True)
    assert not gradient.requires_grad  # nothing but x leads to it


def test_two_backwards_give_the_same_bits_and_leave_what_they_read() -> None:
    x, weight, bias = (one.float().requires_grad_() for one in tensors(SIZES[3]))
    y = convolution.conv2d(x, weight, bias, (2, 2), (1, 1))
    u = torch.randn_like(y)
    kept = [one.detach().clone() for one in (x, weight, u)]
    first, second = (torch.autograd.grad(y, (x, weight, bias), u, retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert all(torch.equal(one, two) for one, two in zip(kept, (x, weight, u), strict=True))


@pytest.mark.parametrize("size", SIZES[:1] + SIZES[3:4])
def test_channels_last_stays_so(size: tuple) -> None:
    _, _, _, stride, padding, _, _ = size
    x, weight, bias = (one.float() for one in tensors(size))
    x, weight = (one.to(memory_format=torch.channels_last).requires_grad_() for one in (x, weight))
    y = convolution.conv2d(x, weight, bias, stride, padding)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (twice,) = torch.autograd.grad(gradient.square().sum(), weight)
    for one in (y, gradient, twice):
        assert one.is_contiguous(memory_format=torch.channels_last)


def test_an_empty_batch_has_empty_and_zero_gradients() -> None:
    x, weight, bias = (one.float().requires_grad_() for one in tensors(SIZES[3], batch=0))
    y = convolution.conv2d(x, weight, bias, (2, 2), (1, 1))
    gradients = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert gradients[0].shape == x.shape and not gradients[1].any() and not gradients[2].any()


def test_gradients_at_inputs_alone_cost_none_at_weights() -> None:
    x, weight, bias = (one.requires_grad_() for one in tensors(SIZES[3]))
    y = convolution.conv2d(x, weight, bias, (2, 2), (1, 1))
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile, convolution.inputs_only():
        torch.autograd.grad(y.sum(), x, create_graph=True)
    names = [event.key for event in profile.key_averages()]
    assert "_InputGradient" in names and "_WeightGradient" not in names


@pytest.mark.parametrize("twice", [False, True])
def test_layers_are_torchs_own_but_where_they_are_differentiated_twice(twice: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(2, 3, 4, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(48, 1))
    ours = nn.Sequential(
        convolution.Conv2d(2, 3, 4, 2, 1), convolution.LeakyReLU(0.2), nn.Flatten(), convolution.Linear(48, 1)
    )
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, 2, 8, 8)
    with differentiated_twice() if twice else contextlib.nullcontext():
        found = ours(x)
        assert torch.equal(found, plain(x))
        names = {"_AddBiasBackward"} if twice else {"AddmmBackward0"}
        assert {found.grad_fn.name()} == names
        with torch.autocast(DEVICE, dtype=torch.bfloat16):  # half precision is for plain forwards
            assert ours(x).grad_fn.name() == "AddmmBackward0" or not twice


def test_a_compiled_network_is_torchs_own_and_compiled_once() -> None:
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    network = convolution.Conv2d(1, 2, 3)
    run = torch.compile(network, backend=backend, fullgraph=True)
    x = torch.randn(1, 1, 5, 5)
    with torch.no_grad():
        expected = network(x)
        for _ in range(2):
            assert torch.equal(run(x), expected)
            with differentiated_twice():
                assert torch.equal(run(x), expected)
    assert len(graphs) == 1

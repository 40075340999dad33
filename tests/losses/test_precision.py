"""Losses are float32 whatever autocast says (trainer/kernels/README.md): each public function is held to it."""

import contextlib
import inspect
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests.kernels.tolerances import DEVICE, IMPLS, error
from trainer.kernels import choose, group_norm_silu, logistic_mixture, lpips_head, noise, reconstruction, reparameterize
from trainer.losses import adversarial, augment, divergence, penalties

CASES: dict[Callable, Callable] = {}
"""By function: (cast) -> its float outputs, of inputs that `cast` brings to a dtype."""


def of(function: Callable) -> Callable:
    def enter(case: Callable) -> Callable:
        CASES[function] = case
        return case

    return enter


def drawn(*shape: int, stream: str = "x") -> Tensor:
    return noise.normal(0, stream, torch.arange(shape[0], device=DEVICE), shape[1:])


IMAGES = (3, 2, 9, 8)
for _name in ("laplace_nll", "gaussian_nll", "bernoulli_nll", "charbonnier_nll"):
    _function = getattr(reconstruction, _name)
    _more = {"softness": 0.5} if _name == "charbonnier_nll" else {}
    CASES[_function] = lambda cast, f=_function, more=_more: [
        f(cast(3 * drawn(*IMAGES)), cast(drawn(*IMAGES, stream="y").clamp(-1, 1)), **more)
    ]
for _loss in adversarial.LOSSES.values():
    CASES[_loss.discriminator] = lambda cast, f=_loss.discriminator: [f(cast(3 * drawn(6, 4, 4)), 2).loss]
    CASES[_loss.generator] = lambda cast, f=_loss.generator: [
        f(cast(3 * drawn(4, 4, 4)), cast(drawn(4, 4, 4, stream="y")))
    ]


@of(logistic_mixture.logistic_mixture_nll)
def _mixture(cast: Callable) -> list[Tensor]:
    image = (drawn(2, 3, 5, 4, stream="y").clamp(-1, 1) * 127.5).round() / 127.5
    return [logistic_mixture.logistic_mixture_nll(cast(drawn(2, 21, 5, 4)), cast(image), components=3)]


@of(reparameterize.reparameterize_kl)
def _posterior(cast: Callable) -> list[Tensor]:
    where = noise.address(0, "posterior", torch.arange(3, device=DEVICE))
    return list(reparameterize.reparameterize_kl(cast(drawn(3, 8, 6, 4) * 1e-2), where))


@of(lpips_head.lpips_head)
def _head(cast: Callable) -> list[Tensor]:
    a, b = [cast(drawn(2, 24, 6, 5))], [cast(drawn(2, 24, 6, 5, stream="y"))]
    return [lpips_head.lpips_head(a, b, None)]


@of(group_norm_silu.group_norm_silu)
def _norm(cast: Callable) -> list[Tensor]:
    # rounded once at the end, so what is compared is what a float32 input gives
    x, weight, bias = cast(drawn(2, 32, 6, 4) + 5), drawn(32, stream="w"), drawn(32, stream="b")
    return [group_norm_silu.group_norm_silu(x, 8, weight, bias, 1e-6)]


@of(divergence.kl)
def _kl(cast: Callable) -> list[Tensor]:
    return [divergence.kl(cast(drawn(3, 40) * 1e-2), cast(drawn(3, 40, stream="y") * 1e-2))]


@of(divergence.kl_per_dimension)
def _kl_each(cast: Callable) -> list[Tensor]:
    return [divergence.kl_per_dimension(cast(drawn(3, 40) * 1e-2), cast(drawn(3, 40, stream="y") * 1e-2))]


NO_LOSS = (
    reparameterize.posterior, reconstruction.full, reconstruction.total, reconstruction.log_normaliser,
    logistic_mixture.split, divergence.free_bits, divergence.clamped_share,
)  # fmt: skip


def public(module: ModuleType) -> list[Callable]:
    own = [f for _, f in inspect.getmembers(module, inspect.isfunction) if f.__module__ == module.__name__]
    return [f for f in own if not f.__name__.startswith("_") and f not in NO_LOSS]


def test_every_loss_has_a_case() -> None:
    modules = (adversarial, divergence, group_norm_silu, logistic_mixture, lpips_head, reconstruction, reparameterize)
    missing = [f"{m.__name__}.{f.__name__}" for m in modules for f in public(m) if f not in CASES]
    assert not missing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("function", CASES, ids=lambda f: f"{f.__module__.rpartition('.')[2]}.{f.__name__}")
def test_autocast_changes_no_bit_and_the_arithmetic_is_float32(
    function: Callable, impl: str, dtype: torch.dtype
) -> None:
    def run(cast: Callable, *, autocast: bool) -> list[Tensor]:
        inside = torch.autocast(DEVICE, dtype=dtype) if autocast else contextlib.nullcontext()
        with choose.preferred(impl), inside:
            return CASES[function](cast)

    half = run(lambda x: x.to(dtype), autocast=False)
    norm = function is group_norm_silu.group_norm_silu
    for value, within in zip(half, run(lambda x: x.to(dtype), autocast=True), strict=True):
        assert value.dtype == within.dtype == (dtype if norm else torch.float32)
        assert torch.equal(value, within)
    with choose.preferred("eager"):  # the same rounded inputs, in float64
        true = CASES[function](lambda x: x.to(dtype).double())
    for value, expected in zip(half, true, strict=True):
        assert error(value, expected) < ({torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype] if norm else 2e-6)
    if dtype == torch.bfloat16:  # and float32 inputs stay what they are inside
        for value, within in zip(run(lambda x: x, autocast=False), run(lambda x: x, autocast=True), strict=True):
            assert value.dtype == within.dtype == torch.float32
            assert torch.equal(value, within)


def test_a_penalty_is_float32_inside_autocast_or_refused() -> None:
    layer = torch.nn.Conv2d(1, 1, 3, padding=1).to(DEVICE)
    image = drawn(2, 1, 5, 5)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = penalties.wasserstein(lambda x: layer(x).flatten(1).sum(1), image, image + 1, torch.rand(2).to(DEVICE))
        logits = layer(image.requires_grad_()).flatten(1).sum(1)
        with pytest.raises(AssertionError, match="float32"):
            penalties.r1(logits, image)
    assert found.dtype == torch.float32


def test_an_augmented_image_keeps_its_dtype_inside_autocast() -> None:
    image = drawn(2, 3, 8, 8)
    draws = augment.draws(lambda stream, shape: noise.uniform(0, stream, torch.arange(2, device=DEVICE), shape),
                          ("color", "translation", "cutout"))  # fmt: skip
    plain = augment.apply(image, ("color", "translation", "cutout"), draws)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(augment.apply(image, ("color", "translation", "cutout"), draws), plain)

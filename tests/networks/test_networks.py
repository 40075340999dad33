"""Networks from outside: shapes over all sizes, parameter counts, gradients, what wrappers need of them."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from trainer.networks import (
    AnyDiscriminatorConfig,
    AutoencoderConfig,
    EncoderConfig,
    GeneratorConfig,
    GlobalDiscriminatorConfig,
    ImageShape,
    KLAutoencoderConfig,
    PatchDiscriminatorConfig,
)

FASHION = ImageShape(1, 28, 28)
KL = KLAutoencoderConfig(width=32, multipliers=(1, 2, 1), blocks=1, attention=(2,))
DISCRIMINATOR_CONFIGS: list[AnyDiscriminatorConfig] = [
    GlobalDiscriminatorConfig(),
    GlobalDiscriminatorConfig(norm="group", blocks=1),
    PatchDiscriminatorConfig(),
    PatchDiscriminatorConfig(width=8, layers=2, norm="none"),
]


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_defaults_are_the_networks_of_the_demo() -> None:
    assert count(AutoencoderConfig().build(image=FASHION, parameters=1)) == 204_369
    assert count(GeneratorConfig().build(image=FASHION, parameters=1)) == 126_945
    assert count(GlobalDiscriminatorConfig().build(image=FASHION)) == 109_281
    maps = GlobalDiscriminatorConfig().build(image=FASHION).features(noise(2, 1, 28, 28))
    assert [tuple(m.shape) for m in maps] == [(2, 32, 14, 14), (2, 64, 7, 7), (2, 128, 4, 4), (2,)]


def test_the_patch_discriminator_has_the_published_layers() -> None:
    network = PatchDiscriminatorConfig().build(image=ImageShape(3, 64, 96))
    maps = network.features(noise(2, 3, 64, 96))
    # 64 -> 32 -> 16 -> 8, then two layers of stride 1 that take a pixel each
    assert [tuple(m.shape[1:]) for m in maps] == [(64, 32, 48), (128, 16, 24), (256, 8, 12), (512, 7, 11), (6, 10)]
    assert {m.kernel_size for m in network.modules() if isinstance(m, nn.Conv2d)} == {(4, 4)}


@pytest.mark.parametrize(("layers", "field"), [(1, 16), (2, 34), (3, 70)])
def test_a_patch_is_as_large_as_documented(layers: int, field: int) -> None:
    config = PatchDiscriminatorConfig(width=4, layers=layers, norm="none")
    image = noise(1, 1, 128, 128).requires_grad_()
    logits = config.build(image=ImageShape(1, 128, 128))(image)
    (seen,) = torch.autograd.grad(logits[0, logits.shape[1] // 2, logits.shape[2] // 2], image)
    rows = seen[0, 0].abs().sum(1).nonzero().flatten()
    assert int(rows[-1] - rows[0]) + 1 == field


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_reconstructions_and_samples_have_the_images_shape(data: st.DataObject) -> None:
    levels = data.draw(st.integers(1, 4))
    config = AutoencoderConfig(
        width=data.draw(st.sampled_from([1, 6, 16])),
        multipliers=tuple(data.draw(st.lists(st.integers(1, 3), min_size=levels, max_size=levels))),
        latent=data.draw(st.integers(1, 5)),
        latent_shape=data.draw(st.sampled_from(["vector", "map"])),
        blocks=data.draw(st.integers(0, 1)),
        norm=data.draw(st.sampled_from(["group", "none"])),
    )
    side = st.integers(-(-28 // config.factor), 128 // config.factor).map(lambda n: n * config.factor)
    image = ImageShape(data.draw(st.sampled_from([1, 3])), data.draw(side), data.draw(side))
    parameters, learn, prior = data.draw(st.integers(1, 6)), data.draw(st.booleans()), data.draw(st.integers(0, 3))
    network = config.build(image=image, parameters=parameters, learn_scale=learn)
    if config.latent_shape == "map":
        assert network.latent_size == (config.latent, image.height // config.factor, image.width // config.factor)
    else:
        assert network.latent_size == (config.latent,)
    latent = network.latent_size
    out = network(
        noise(2, *image),
        noise(2, *latent),
        noise(prior, *latent) if prior else None,
        features=True,
        moments=True,
    )
    shapes = {name: tuple(value.shape) for name, value in out.items()}
    expected = {
        "reconstruction": (2, parameters, image.height, image.width),
        "kl": (2,),
        "moments": (2, 2 * latent[0], *latent[1:]),
        "features": (2, config.width * config.multipliers[0], image.height, image.width),
    }
    expected |= {"sample": (prior, parameters, image.height, image.width)} if prior else {}
    expected |= {"log_scale": (2,)} if learn else {}
    assert shapes == expected
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in out.values())


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_discriminators_take_every_size_from_28_to_128(data: st.DataObject) -> None:
    image = ImageShape(
        data.draw(st.sampled_from([1, 3])), data.draw(st.integers(28, 128)), data.draw(st.integers(28, 128))
    )
    batch = noise(2, *image)
    single = GlobalDiscriminatorConfig(width=4, multipliers=(1, 2, 2, 2)).build(image=image)
    assert single(batch).shape == (2,)
    patch = PatchDiscriminatorConfig(width=4).build(image=image)
    assert patch(batch).shape == (2, image.height // 8 - 2, image.width // 8 - 2)


@pytest.mark.parametrize("config", DISCRIMINATOR_CONFIGS)
@pytest.mark.parametrize("size", [(28, 28), (37, 50)])
def test_every_pixel_counts_and_the_penalty_trains_every_weight(
    config: AnyDiscriminatorConfig, size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    network = config.build(image=ImageShape(1, *size)).double()
    image = noise(2, 1, *size).double().requires_grad_()
    (slope,) = torch.autograd.grad(network(image).sum(), image, create_graph=True)
    assert bool((slope.detach() != 0).all())
    penalty = slope.square().sum()
    weights = [p for name, p in network.named_parameters() if p.dim() > 1]
    gradients = torch.autograd.grad(penalty, weights)
    for weight, gradient in zip(weights, gradients, strict=True):
        assert gradient.isfinite().all() and gradient.abs().sum() > 0, weight.shape
    # central difference of the penalty along its own gradient
    length = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()

    def moved(step: float) -> float:
        other = copy.deepcopy(network)
        with torch.no_grad():
            for p, g in zip([p for p in other.parameters() if p.dim() > 1], gradients, strict=True):
                p.add_(g, alpha=float(step / length))
        (s,) = torch.autograd.grad(other(image).sum(), image)
        return float(s.square().sum())

    assert (moved(1e-7) - moved(-1e-7)) / 2e-7 == pytest.approx(float(length), rel=1e-3)


def test_reconstruction_and_prior_share_one_decoder_pass_and_equal_two() -> None:
    torch.manual_seed(0)
    network = AutoencoderConfig().build(image=FASHION, parameters=1).double()
    image, eps, prior = noise(3, *FASHION).double(), noise(3, 16, seed=1).double(), noise(2, 16, seed=2).double()
    passes: list[int] = []
    network.decoder.head.register_forward_hook(lambda *_: passes.append(1))
    out = network(image, eps, prior)
    assert len(passes) == 1
    mean, logvar = network.encode(image)
    z = mean + (logvar / 2).exp() * eps
    torch.testing.assert_close(out["reconstruction"], network.decode(z), rtol=0, atol=1e-12)
    torch.testing.assert_close(out["sample"], network.decode(prior), rtol=0, atol=1e-12)


def test_the_last_convolution_maps_the_features_to_the_reconstruction() -> None:
    network = AutoencoderConfig().build(image=FASHION, parameters=2)
    out = network(noise(3, *FASHION), noise(3, 16), noise(4, 16), features=True)
    head = network.decoder.head
    again = nn.functional.conv2d(out["features"], network.last_layer, head.bias, padding=1)
    torch.testing.assert_close(again, out["reconstruction"])


def test_every_parameter_of_the_autoencoder_is_reached_and_the_scale_starts_at_one() -> None:
    network = AutoencoderConfig(blocks=1, latent_shape="map", latent=4).build(
        image=ImageShape(3, 32, 48), parameters=3, learn_scale=True
    )
    out = network(noise(2, 3, 32, 48), noise(2, *network.latent_size))
    assert out["log_scale"].tolist() == [0.0, 0.0]
    sum((value.square() + value).sum() for value in out.values()).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_encoder_and_generator_stand_alone() -> None:
    encoder, generator = (
        EncoderConfig().build(image=FASHION),
        GeneratorConfig(latent=16).build(image=FASHION, parameters=1),
    )
    out = encoder(noise(2, *FASHION))
    assert set(out) == {"moments"} and encoder.latent_size == generator.latent_size == (16,)
    assert generator(out["moments"][:, :16]).shape == (2, 1, 28, 28)
    whole = AutoencoderConfig().build(image=FASHION, parameters=1)
    whole.encoder.load_state_dict(encoder.state_dict())
    whole.decoder.load_state_dict(generator.state_dict())


ALL_BUILDS = {
    "autoencoder": lambda: AutoencoderConfig().build(image=FASHION, parameters=1, learn_scale=True),
    "kl": lambda: KL.build(image=FASHION, parameters=1, learn_scale=True),
    "encoder": lambda: EncoderConfig().build(image=FASHION),
    "generator": lambda: GeneratorConfig().build(image=FASHION, parameters=1),
    "global": lambda: GlobalDiscriminatorConfig().build(image=FASHION),
    "patch": lambda: PatchDiscriminatorConfig().build(image=FASHION),
}


def run(name: str, network: nn.Module, parameters: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    dtype = next(network.parameters()).dtype
    image = noise(2, *FASHION).to(dtype)
    inputs = {
        "autoencoder": (image, noise(2, 16).to(dtype), noise(2, 16).to(dtype)),
        "kl": (image, noise(2, 4, 7, 7).to(dtype), noise(2, 4, 7, 7).to(dtype)),
        "generator": (noise(2, 32).to(dtype),),
    }
    arguments = inputs.get(name, (image,))
    out = network(*arguments) if parameters is None else functional_call(network, parameters, arguments)
    return out if isinstance(out, dict) else {"out": out}


@pytest.mark.parametrize("name", ALL_BUILDS)
def test_the_seed_of_torch_decides_the_weights(name: str) -> None:
    def build(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return ALL_BUILDS[name]().state_dict()

    one, same, other = build(0), build(0), build(1)
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", ALL_BUILDS)
def test_networks_hold_no_buffers_that_ranks_would_have_to_agree_on(name: str) -> None:
    assert list(ALL_BUILDS[name]().buffers()) == []


@pytest.mark.parametrize("name", ALL_BUILDS)
def test_other_weights_can_be_run_through_a_network(name: str) -> None:
    network, other = ALL_BUILDS[name](), ALL_BUILDS[name]()
    with torch.no_grad():
        expected = run(name, other)
        got = run(name, network, dict(other.named_parameters()))
    assert all(torch.equal(got[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ALL_BUILDS)
def test_autocast_to_bfloat16_gives_float32_outputs_near_the_plain_ones(name: str) -> None:
    torch.manual_seed(0)
    network = ALL_BUILDS[name]()
    with torch.no_grad():
        plain = run(name, network)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = run(name, network)
    for key, value in cast.items():
        assert value.dtype == torch.float32
        # some ten layers of 2^-8 relative rounding each
        torch.testing.assert_close(value, plain[key], rtol=0, atol=0.05 * max(1.0, float(plain[key].abs().max())))


@pytest.mark.parametrize("name", ALL_BUILDS)
def test_float64_stays_float64(name: str) -> None:
    assert all(value.dtype == torch.float64 for value in run(name, ALL_BUILDS[name]().double()).values())


@pytest.mark.parametrize("name", ALL_BUILDS)
def test_channels_last_changes_the_memory_and_not_the_result(name: str) -> None:
    network = ALL_BUILDS[name]().double()
    plain = run(name, network)
    turned = run(name, network.to(memory_format=torch.channels_last))
    for key in plain:
        torch.testing.assert_close(turned[key], plain[key], rtol=0, atol=1e-12)

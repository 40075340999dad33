"""Which image sizes networks take, and what they say of the others."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.networks import (
    AutoencoderConfig,
    EncoderConfig,
    GeneratorConfig,
    GlobalDiscriminatorConfig,
    ImageShape,
    KLAutoencoderConfig,
    PatchDiscriminatorConfig,
)

FACTOR_8, FACTOR_16 = (1, 1, 1, 1), (1, 1, 1, 1, 1)


@pytest.mark.parametrize(
    ("height", "width", "multipliers", "factor", "nearest"),
    [
        (100, 100, FACTOR_8, 8, "96 x 96 or 104 x 104"),
        (100, 100, FACTOR_16, 16, "96 x 96 or 112 x 112"),
        (65, 65, FACTOR_8, 8, "64 x 64 or 72 x 72"),
        (200, 300, FACTOR_8, 8, "200 x 296 or 200 x 304"),
        (200, 300, FACTOR_16, 16, "192 x 288 or 208 x 304"),
        (28, 28, FACTOR_8, 8, "24 x 24 or 32 x 32"),
        (5, 5, FACTOR_8, 8, "that work: 8 x 8"),
    ],
)
@pytest.mark.parametrize("config", [AutoencoderConfig, EncoderConfig, GeneratorConfig, KLAutoencoderConfig])
def test_a_size_that_the_strides_do_not_divide_is_refused_with_the_nearest_that_work(
    config: type, height: int, width: int, multipliers: tuple[int, ...], factor: int, nearest: str
) -> None:
    with pytest.raises(ValueError) as refused:
        config(multipliers=multipliers).check(ImageShape(3, height, width))
    text = str(refused.value)
    assert (
        text.startswith(f"size: {height} x {width} ") and f"divisible by {factor}," in text and text.endswith(nearest)
    )


def test_a_network_cannot_be_built_for_a_size_that_its_config_refuses() -> None:
    shape = ImageShape(1, 30, 28)
    with pytest.raises(ValueError, match="30 x 28"):
        AutoencoderConfig().build(image=shape, parameters=1)
    with pytest.raises(ValueError, match="30 x 28"):
        GeneratorConfig().build(image=shape, parameters=1)
    with pytest.raises(ValueError, match="8 x 64"):
        GlobalDiscriminatorConfig().build(image=ImageShape(1, 8, 64))
    with pytest.raises(ValueError, match="23 x 64"):
        PatchDiscriminatorConfig().build(image=ImageShape(1, 23, 64))


@given(
    height=st.integers(28, 128),
    width=st.integers(28, 128),
    levels=st.integers(1, 6),
    channels=st.sampled_from([1, 3]),
)
@settings(deadline=None)
def test_a_size_is_taken_exactly_when_the_factor_divides_it_and_the_advice_is_taken_too(
    height: int, width: int, levels: int, channels: int
) -> None:
    config = AutoencoderConfig(multipliers=(1,) * levels)
    assert config.factor == 2 ** (levels - 1)
    try:
        config.check(ImageShape(channels, height, width))
    except ValueError as refused:
        assert height % config.factor or width % config.factor
        for advice in str(refused).rpartition("work: ")[2].split(" or "):
            better = [int(size) for size in advice.split(" x ")]
            config.check(ImageShape(channels, *better))
            assert all(abs(new - old) < config.factor for new, old in zip(better, (height, width), strict=True))
    else:
        assert height % config.factor == width % config.factor == 0


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (AutoencoderConfig, "width", 0),
        (AutoencoderConfig, "multipliers", ()),
        (AutoencoderConfig, "multipliers", (1, 0)),
        (AutoencoderConfig, "latent", 0),
        (GeneratorConfig, "blocks", -1),
        (GlobalDiscriminatorConfig, "multipliers", ()),
        (PatchDiscriminatorConfig, "width", 0),
        (PatchDiscriminatorConfig, "layers", 0),
        (KLAutoencoderConfig, "width", 48),
        (KLAutoencoderConfig, "multipliers", ()),
        (KLAutoencoderConfig, "blocks", 0),
        (KLAutoencoderConfig, "latent", 0),
        (KLAutoencoderConfig, "attention", (16,)),
        (KLAutoencoderConfig, "attention", (4, 3)),
        (KLAutoencoderConfig, "scaling_factor", 0.0),
    ],
)
def test_a_number_that_builds_no_network_is_refused_by_its_field(config: type, field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{field}: "):
        config(**{field: value})

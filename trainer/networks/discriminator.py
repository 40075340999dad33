"""Discriminators: one verdict an image, or one a patch. Input in [-1, 1], output logits, higher means more real."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from trainer.kernels.convolution import Conv2d, LeakyReLU, Linear
from trainer.networks.autoencoder import check_counts
from trainer.networks.blocks import Body, Norm, full, normalisation, rows, stage
from trainer.networks.shapes import ImageShape

SLOPE = 0.2  # of LeakyReLU, in every discriminator since DCGAN (Radford et al. 2016)


@dataclass(frozen=True)
class GlobalDiscriminatorConfig:
    """One logit an image."""

    kind: Literal["global"] = "global"
    """One logit an image."""
    width: int = 32
    """Channels after the first stage."""
    multipliers: tuple[int, ...] = (1, 2, 4)
    """Channels of each stage as multiples of `width`; each stage halves the size, rounded up."""
    blocks: int = 0
    """Residual blocks a stage; 0 suits 28 px, 1 or 2 suit 64 px and more."""
    norm: Norm = "none"
    """GroupNorm or none. Never batch statistics: they couple real and fake, and ranks."""
    recompute: bool = False
    """Activation checkpointing, as of the autoencoder; a gradient penalty keeps most of what it saves."""

    def __post_init__(self) -> None:
        check_counts(self.width, self.multipliers, self.blocks)

    def check(self, image: ImageShape) -> None:
        """Any size that the stages leave at least 2 x 2 of; ValueError with the smallest size otherwise."""
        smallest = 2 ** len(self.multipliers) + 1  # rounded up at each stage: one more than 2^n still ends at 2
        if min(image.height, image.width) < smallest:
            raise ValueError(
                f"size: {image.height} x {image.width} (height x width) is too small for a discriminator of"
                f" {len(self.multipliers)} multipliers; {smallest} x {smallest} or more, or fewer multipliers"
            )

    def build(self, *, image: ImageShape) -> "GlobalDiscriminator":
        return GlobalDiscriminator(self, image=image)


@dataclass(frozen=True)
class PatchDiscriminatorConfig:
    """PatchGAN (Isola et al. 2017) without batch statistics; layers 3 sees patches of 70 x 70."""

    kind: Literal["patch"] = "patch"
    """A map of logits, one a patch."""
    width: int = 64
    """Channels of the first layer; doubled by each further one, up to 8 times."""
    layers: int = 3
    """Layers of stride 2; patches of 16, 34, 70 pixels for 1, 2, 3."""
    norm: Norm = "group"
    """GroupNorm or none."""
    recompute: bool = False
    """Activation checkpointing, as of the autoencoder; a gradient penalty keeps most of what it saves."""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width: {self.width} channels build no network; 1 or more")
        if self.layers < 1:
            raise ValueError(f"layers: {self.layers} is not a number of stride-2 layers; 1 or more")

    def check(self, image: ImageShape) -> None:
        """ValueError with the smallest size where no patch would be left."""
        smallest = 3 * 2**self.layers  # two layers of stride 1 take one pixel each
        if min(image.height, image.width) < smallest:
            raise ValueError(
                f"size: {image.height} x {image.width} (height x width) leaves no patch after {self.layers} layers of"
                f" stride 2; {smallest} x {smallest} or more, or fewer layers"
            )

    def build(self, *, image: ImageShape) -> "PatchDiscriminator":
        return PatchDiscriminator(self, image=image)


class GlobalDiscriminator(nn.Module):
    """Image (B, C, H, W) in [-1, 1] -> logits (B,), float32."""

    def __init__(self, config: GlobalDiscriminatorConfig, *, image: ImageShape) -> None:
        super().__init__()
        config.check(image)
        channels, size = image.channels, (image.height, image.width)
        stages: list[nn.Module] = []
        for multiplier in config.multipliers:
            out = config.width * multiplier
            # 4 halves an even size exactly, 3 rounds an odd one up: no pixel is left out and none is seen more often
            conv = Conv2d(channels, out, (4 - size[0] % 2, 4 - size[1] % 2), stride=2, padding=1)
            layers = stage([conv], out, blocks=config.blocks, norm=config.norm, activation=LeakyReLU(SLOPE))
            stages.append(Body(layers, recompute=config.recompute))
            channels, size = out, (-(-size[0] // 2), -(-size[1] // 2))
        self.stages = nn.ModuleList(stages)
        self.head = Linear(channels * size[0] * size[1], 1)

    def features(self, image: Tensor) -> list[Tensor]:
        """The output of each stage, (B, C, h, w), then the logits (B,)."""
        maps, x = [], image
        for layer in self.stages:
            x = layer(x)
            maps.append(x)
        return [*maps, full(self.head(rows(x))).squeeze(1)]

    def forward(self, image: Tensor) -> Tensor:
        return self.features(image)[-1]


class PatchDiscriminator(nn.Module):
    """Image (B, C, H, W) in [-1, 1] -> logits (B, h, w), float32.

    Initialised as by Isola et al.: weights N(0, 0.02), norms N(1, 0.02), biases 0. A layer with a norm has no bias.
    """

    def __init__(self, config: PatchDiscriminatorConfig, *, image: ImageShape) -> None:
        super().__init__()
        config.check(image)
        channels = config.width
        first = Conv2d(image.channels, channels, 4, stride=2, padding=1)
        stages: list[nn.Module] = [Body([first, LeakyReLU(SLOPE)], recompute=config.recompute)]
        for level in range(1, config.layers + 1):
            out = config.width * min(2**level, 8)
            stride = 2 if level < config.layers else 1
            conv = Conv2d(channels, out, 4, stride=stride, padding=1, bias=config.norm == "none")
            layers = [conv, normalisation(config.norm, out), LeakyReLU(SLOPE)]
            stages.append(Body(layers, recompute=config.recompute))
            channels = out
        self.stages = nn.ModuleList(stages)
        self.head = Conv2d(channels, 1, 4, padding=1)
        self.apply(_initialise)

    def features(self, image: Tensor) -> list[Tensor]:
        """The output of each layer, (B, C, h, w), then the logits (B, h, w)."""
        maps, x = [], image
        for layer in self.stages:
            x = layer(x)
            maps.append(x)
        return [*maps, full(self.head(x)).squeeze(1)]

    def forward(self, image: Tensor) -> Tensor:
        return self.features(image)[-1]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.GroupNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)

"""Convolutional encoder, decoder and the autoencoder of both, for any image that the strides divide.

Resolutions run from the image's to the latent's, one multiplier each, a halving between two: `multipliers` (1, 2, 4)
take 28 x 28 to 7 x 7, as (1, 2, 4, 4) are the f8 of Rombach et al. 2022. The defaults are the networks of the
Fashion-MNIST demo.
"""

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from trainer.kernels.reparameterize import posterior, reparameterize_kl
from trainer.networks.blocks import Body, Norm, UpConv, full, rows, stage
from trainer.networks.shapes import ImageShape, check_divisible

if TYPE_CHECKING:
    from trainer.networks.kl_autoencoder import KLDecoder, KLEncoder


@dataclass(frozen=True)
class Pyramid:
    """What encoder, decoder and generator have in common."""

    kind: Literal["conv"] = "conv"
    """Convolutional network."""
    width: int = 16
    """Channels at the image's resolution."""
    multipliers: tuple[int, ...] = (1, 2, 4)
    """Channels at each resolution, from the image's to the latent's, as multiples of `width`; each but the first halves
    the size, so 1, 2, 4 divide it by 4."""
    latent: int = 16
    """Latent dimensions (vector) or latent channels (map)."""
    latent_shape: Literal["vector", "map"] = "vector"
    """vector: (latent,), by a linear layer. map: (latent, height / factor, width / factor) (Rombach et al. 2022)."""
    blocks: int = 0
    """Residual blocks at each resolution; 0 suits 28 px, 1 or 2 suit 64 px and more."""
    norm: Norm = "group"
    """GroupNorm (at most 8 groups) or none."""
    recompute: bool = False
    """Activation checkpointing (Chen et al. 2016): inside a stage or block, activations are computed again in the
    backward pass instead of kept. Same numbers, less memory, up to a third more time."""

    def __post_init__(self) -> None:
        check_counts(self.width, self.multipliers, self.blocks)
        if self.latent < 1:
            raise ValueError(f"latent: {self.latent} is not a number of dimensions; 1 or more")

    @property
    def factor(self) -> int:
        """Image size over latent map size."""
        return 1 << (len(self.multipliers) - 1)

    def check(self, image: ImageShape) -> None:
        """ValueError naming size, factor and the nearest sizes that work where the strides do not divide the image."""
        check_divisible(image, factor=self.factor)

    def latent_size(self, image: ImageShape) -> tuple[int, ...]:
        """(z,) or (z, h, w)."""
        if self.latent_shape == "vector":
            return (self.latent,)
        return (self.latent, image.height // self.factor, image.width // self.factor)


@dataclass(frozen=True)
class EncoderConfig(Pyramid):
    """Image to posterior, as a network of its own."""

    def build(self, *, image: ImageShape) -> "Encoder":
        return Encoder(self, image=image)


@dataclass(frozen=True)
class AutoencoderConfig(Pyramid):
    """Encoder and decoder as one network."""

    def build(self, *, image: ImageShape, parameters: int, learn_scale: bool = False) -> "Autoencoder":
        """`parameters`: channels that the likelihood needs; `learn_scale`: learns its log-scale too."""
        encoder, decoder = Encoder(self, image=image), Decoder(self, image=image, parameters=parameters)
        return Autoencoder(encoder, decoder, learn_scale=learn_scale)


class Encoder(nn.Module):
    """Image (B, C, H, W) in [-1, 1] -> the posterior's moments, mean and logvar: (B, 2z, ...), float32."""

    def __init__(self, config: Pyramid, *, image: ImageShape) -> None:
        super().__init__()
        config.check(image)
        self.latent_size = config.latent_size(image)
        widths = [config.width * m for m in config.multipliers]
        layers: list[nn.Module] = []
        channels = image.channels
        for level, out in enumerate(widths):
            last = level == len(widths) - 1
            conv = nn.Conv2d(channels, out, 3, padding=1) if last else nn.Conv2d(channels, out, 4, stride=2, padding=1)
            layers += stage([conv], out, blocks=config.blocks, norm=config.norm, activation=nn.SiLU())
            channels = out
        self.body = Body(layers, recompute=config.recompute)
        self.head: nn.Module
        if config.latent_shape == "map":
            self.head = nn.Conv2d(channels, 2 * config.latent, 3, padding=1)
        else:
            self.head = nn.Linear(channels * image.height * image.width // config.factor**2, 2 * config.latent)
        self.flat = config.latent_shape == "vector"

    def moments(self, image: Tensor) -> Tensor:
        """Mean and logvar before the clamp, (B, 2z, ...) in the network's dtype."""
        x = self.body(image)
        return self.head(rows(x) if self.flat else x)  # type: ignore[no-any-return]

    def posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logvar, the latter clamped to [-30, 20]."""
        return posterior(self.moments(image))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"moments": full(self.moments(image))}


class Decoder(nn.Module):
    """Latent (B, *latent_size) -> the likelihood's parameters (B, P, H, W), float32; a generator is the same."""

    def __init__(self, config: Pyramid, *, image: ImageShape, parameters: int) -> None:
        super().__init__()
        config.check(image)
        self.latent_size = config.latent_size(image)
        self.map = (image.height // config.factor, image.width // config.factor)
        widths = [config.width * m for m in reversed(config.multipliers)]
        self.channels = widths[0]
        self.flat = config.latent_shape == "vector"
        self.entry: nn.Module
        if self.flat:
            self.entry = nn.Linear(config.latent, self.channels * prod(self.map))
        else:
            self.entry = nn.Conv2d(config.latent, self.channels, 3, padding=1)
        layers: list[nn.Module] = []
        for level, out in enumerate(widths):
            up: list[nn.Module] = [UpConv(widths[level - 1], out)] if level else []
            layers += stage(up, out, blocks=config.blocks, norm=config.norm, activation=nn.SiLU())
        self.body = Body(layers, recompute=config.recompute)
        self.head = nn.Conv2d(widths[-1], parameters, 3, padding=1)

    @property
    def last_layer(self) -> Tensor:
        """Weight of the last convolution: where Esser et al. 2021 (eq. 7) balance two losses."""
        return self.head.weight

    def features(self, z: Tensor) -> Tensor:
        """Input of the last convolution, (B, width, H, W)."""
        x = self.entry(z)
        if self.flat:  # channels last by construction, without a copy
            x = x.view(len(x), *self.map, self.channels).permute(0, 3, 1, 2)
        return self.body(x)  # type: ignore[no-any-return]

    def forward(self, z: Tensor) -> Tensor:
        return full(self.head(self.features(z)))


class Autoencoder(nn.Module):
    """Encoder, posterior sample and decoder in one pass, so that a data-parallel wrapper sees one forward a step."""

    def __init__(self, encoder: "Encoder | KLEncoder", decoder: "Decoder | KLDecoder", *, learn_scale: bool) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.latent_size = self.decoder.latent_size
        self.log_scale = nn.Parameter(torch.zeros(1)) if learn_scale else None

    @property
    def last_layer(self) -> Tensor:
        """The decoder's."""
        return self.decoder.last_layer

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logvar of the posterior, each (B, *latent_size), float32."""
        return self.encoder.posterior(image)

    def decode(self, z: Tensor) -> Tensor:
        """Parameters of the likelihood, (B, P, H, W), float32."""
        return self.decoder(z)  # type: ignore[no-any-return]

    def forward(
        self,
        image: Tensor,
        noise: Tensor,
        prior: Tensor | None = None,
        features: bool = False,
        moments: bool = False,
    ) -> dict[str, Tensor]:
        """Image (B, C, H, W) and the posterior's noise, as `reparameterize_kl` takes it: its address (B, 3), or normals
        (B, *latent_size) -> the outputs that losses are taken on.

        reconstruction (B, P, H, W), kl (B,) in nats; with `prior` (K, *latent_size) also sample (K, P, H, W), decoded
        in the same pass; with `features` also the input of the last convolution (B, width, H, W), the reconstruction's
        rows only; with `moments` also these, (B, 2z, ...); with a learned scale also log_scale (B,), natural logarithm.
        """
        found = self.encoder.moments(image)
        z, kl = reparameterize_kl(found, noise)
        hidden = self.decoder.features(z if prior is None else torch.cat([z, prior]))
        parameters = full(self.decoder.head(hidden))
        out = {"kl": kl}
        if prior is None:
            out["reconstruction"] = parameters
        else:
            out["reconstruction"], out["sample"] = torch.split(parameters, [len(z), len(prior)])
        if features:
            out["features"] = hidden[: len(z)]
        if moments:
            out["moments"] = full(found)
        if self.log_scale is not None:
            out["log_scale"] = self.log_scale.repeat(len(z))  # a view would escape no_grad
        return out


def check_counts(width: int, multipliers: tuple[int, ...], blocks: int) -> None:
    """ValueError naming the field whose number builds no network."""
    if width < 1:
        raise ValueError(f"width: {width} channels build no network; 1 or more")
    if not multipliers or min(multipliers) < 1:
        raise ValueError(f"multipliers: {list(multipliers)} build no network; one number of 1 or more a resolution")
    if blocks < 0:
        raise ValueError(f"blocks: {blocks} is not a number of residual blocks; 0 or more")

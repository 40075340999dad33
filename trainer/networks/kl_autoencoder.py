"""The KL autoencoder of latent diffusion (Rombach et al. 2022), layer by layer what diffusers calls AutoencoderKL.

Multipliers (1, 2, 4) are its f4, (1, 2, 4, 4) its f8, (1, 1, 2, 2, 4) with attention at (16,) its f16. Weights have
diffusers' names up to the few that trainer/interchange.py spells out.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.kernels.reparameterize import posterior
from trainer.networks.autoencoder import Autoencoder, check_counts
from trainer.networks.blocks import GroupNormSiLU, UpConv, full, recomputed
from trainer.networks.shapes import ImageShape, check_divisible

GROUPS, EPSILON = 32, 1e-6  # of every GroupNorm, in Rombach et al. 2022 and in diffusers


@dataclass(frozen=True)
class KLAutoencoderConfig:
    """The KL autoencoder of latent diffusion; the defaults are its f8, 83.7 M parameters."""

    kind: Literal["kl"] = "kl"
    """Rombach et al. 2022."""
    width: int = 128
    """Channels at the image's resolution, a multiple of 32: each normalisation has 32 groups."""
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    """Channels at each resolution, from the image's to the latent's, as multiples of `width`; each but the first halves
    the size: three are f4, four f8, five f16."""
    latent: int = 4
    """Channels of the latent: 3 for f4, 4 for f8, 16 for f16 in Rombach et al. 2022."""
    blocks: int = 2
    """Residual blocks at each resolution of the encoder; the decoder has one more."""
    attention: tuple[int, ...] = ()
    """Where each residual block is followed by attention too, as what the image is shrunk by; f16 has 16. In the
    middle, at the latent's resolution, there always is one."""
    scaling_factor: float = 0.18215
    """What a diffusion model multiplies latents by, 1 / their deviation over the set. Trains nothing; exported. 0.18215
    is that of Stable Diffusion's f8 and diffusers' default: `tandem export --measure` measures your own."""
    recompute: bool = False
    """Activation checkpointing (Chen et al. 2016): inside a block, activations are computed again in the backward pass
    instead of kept. Same numbers, less memory, up to a third more time."""

    def __post_init__(self) -> None:
        check_counts(self.width, self.multipliers, self.blocks)
        if self.width % GROUPS:
            below, above = self.width // GROUPS * GROUPS, -(-self.width // GROUPS) * GROUPS
            nearest = f"{below} or {above}" if below else str(above)
            raise ValueError(f"width: {self.width} channels do not divide into {GROUPS} groups; nearest: {nearest}")
        if self.blocks < 1:
            raise ValueError(f"blocks: {self.blocks} leave a resolution without a residual block; 1 or more")
        if self.latent < 1:
            raise ValueError(f"latent: {self.latent} is not a number of channels; 1 or more")
        factors = [1 << level for level in range(len(self.multipliers))]
        wrong = [factor for factor in self.attention if factor not in factors]
        if wrong:
            raise ValueError(
                f"attention: {wrong[0]} is no resolution of {len(factors)} multipliers; "
                f"those are {', '.join(map(str, factors))}"
            )
        if not self.scaling_factor > 0:
            raise ValueError(f"scaling_factor: {self.scaling_factor} scales no latents; give a number above 0")

    @property
    def factor(self) -> int:
        """Image size over latent map size."""
        return 1 << (len(self.multipliers) - 1)

    def check(self, image: ImageShape) -> None:
        """ValueError naming size, factor and the nearest sizes that work where the strides do not divide the image."""
        check_divisible(image, factor=self.factor)

    def latent_size(self, image: ImageShape) -> tuple[int, ...]:
        """(z, h, w)."""
        return (self.latent, image.height // self.factor, image.width // self.factor)

    def build(self, *, image: ImageShape, parameters: int, learn_scale: bool = False) -> Autoencoder:
        """`parameters`: channels that the likelihood needs; `learn_scale`: learns its log-scale too."""
        encoder, decoder = KLEncoder(self, image=image), KLDecoder(self, image=image, parameters=parameters)
        return Autoencoder(encoder, decoder, learn_scale=learn_scale)


class KLEncoder(nn.Module):
    """Image (B, C, H, W) in [-1, 1] -> the posterior's moments: mean and logvar, (B, 2z, H / f, W / f), float32."""

    def __init__(self, config: KLAutoencoderConfig, *, image: ImageShape) -> None:
        super().__init__()
        config.check(image)
        self.latent_size, self.recompute = config.latent_size(image), config.recompute
        widths = [config.width * m for m in config.multipliers]
        self.conv_in = nn.Conv2d(image.channels, widths[0], 3, padding=1)
        levels, channels = [], widths[0]
        for number, out in enumerate(widths):
            last = number == len(widths) - 1
            resample = None if last else Downsample(out)
            attention = 1 << number in config.attention
            levels.append(Level(channels, out, blocks=config.blocks, attention=attention, resample=resample))
            channels = out
        self.down_blocks = nn.ModuleList(levels)
        self.mid_block = Middle(channels)
        self.conv_norm_out = _normalised(channels)
        self.conv_out = nn.Conv2d(channels, 2 * config.latent, 3, padding=1)
        self.quant_conv = nn.Conv2d(2 * config.latent, 2 * config.latent, 1)

    def moments(self, image: Tensor) -> Tensor:
        """Mean and logvar before the clamp, (B, 2z, h, w) in the network's dtype: what diffusers' posterior is made
        of."""
        layers = [layer for level in self.down_blocks for layer in level.layers()]  # type: ignore[operator]
        x = _through([*layers, *self.mid_block.layers(), self.conv_norm_out], self.conv_in(image), self.recompute)
        moments: Tensor = self.quant_conv(self.conv_out(x))
        return moments

    def posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logvar, the latter clamped to [-30, 20]."""
        return posterior(self.moments(image))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"moments": full(self.moments(image))}


class KLDecoder(nn.Module):
    """Latent (B, z, H / f, W / f) -> the likelihood's parameters (B, P, H, W), float32."""

    def __init__(self, config: KLAutoencoderConfig, *, image: ImageShape, parameters: int) -> None:
        super().__init__()
        config.check(image)
        self.latent_size, self.recompute = config.latent_size(image), config.recompute
        widths = [config.width * m for m in reversed(config.multipliers)]
        channels = widths[0]
        self.post_quant_conv = nn.Conv2d(config.latent, config.latent, 1)
        self.conv_in = nn.Conv2d(config.latent, channels, 3, padding=1)
        self.mid_block = Middle(channels)
        levels = []
        for number, out in enumerate(widths):
            last = number == len(widths) - 1
            resample = None if last else UpConv(out, out)
            attention = config.factor >> number in config.attention
            levels.append(Level(channels, out, blocks=config.blocks + 1, attention=attention, resample=resample))
            channels = out
        self.up_blocks = nn.ModuleList(levels)
        self.conv_norm_out = _normalised(channels)
        self.head = nn.Conv2d(channels, parameters, 3, padding=1)

    @property
    def last_layer(self) -> Tensor:
        """Weight of the last convolution: where Esser et al. 2021 (eq. 7) balance two losses."""
        return self.head.weight

    def features(self, z: Tensor) -> Tensor:
        """Input of the last convolution, (B, width, H, W)."""
        layers = [layer for level in self.up_blocks for layer in level.layers()]  # type: ignore[operator]
        x = self.conv_in(self.post_quant_conv(z))
        return _through([*self.mid_block.layers(), *layers, self.conv_norm_out], x, self.recompute)

    def forward(self, z: Tensor) -> Tensor:
        return full(self.head(self.features(z)))


class Level(nn.Module):
    """One resolution: residual blocks, each followed by attention where that is asked for, and the way to the next."""

    def __init__(self, channels: int, out: int, *, blocks: int, attention: bool, resample: nn.Module | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(out if n else channels, out) for n in range(blocks))
        self.attentions = nn.ModuleList(Attention(out) for _ in range(blocks if attention else 0))
        self.resample = resample

    def layers(self) -> list[nn.Module]:
        """In the order in which they are run."""
        found: list[nn.Module] = []
        for number, block in enumerate(self.resnets):
            found += [block, *self.attentions[number : number + 1]]
        return found if self.resample is None else [*found, self.resample]


class Middle(nn.Module):
    """Residual block, attention, residual block, at the latent's resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels)])

    def layers(self) -> list[nn.Module]:
        """In the order in which they are run."""
        return [self.resnets[0], self.attentions[0], self.resnets[1]]


class ResnetBlock(nn.Module):
    """Norm, SiLU, 3x3, twice, beside the input or a 1x1 convolution of it. (B, in, h, w) -> (B, out, h, w)."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm1 = _normalised(channels)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.norm2 = _normalised(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv_shortcut(x) + self.conv2(self.norm2(self.conv1(self.norm1(x))))
        return out


class Attention(nn.Module):
    """x + attention over all its places, one head as wide as the channels. Shape kept."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(GROUPS, channels, eps=EPSILON)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        places = self.group_norm(x).permute(0, 2, 3, 1).flatten(1, 2)  # (B, h w, C): no copy of channels last
        query, key, value = (layer(places).unsqueeze(1) for layer in (self.to_q, self.to_k, self.to_v))
        seen = functional.scaled_dot_product_attention(query, key, value).squeeze(1)
        out: Tensor = x + self.to_out(seen).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        return out


class Downsample(nn.Conv2d):
    """A 3x3 convolution of stride 2, padded below and on the right only. (B, C, 2h, 2w) -> (B, C, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(functional.pad(x, (0, 1, 0, 1)))


def _normalised(channels: int) -> GroupNormSiLU:
    return GroupNormSiLU(GROUPS, channels, eps=EPSILON)


def _through(layers: list[nn.Module], x: Tensor, recompute: bool) -> Tensor:
    """With `recompute` only what leads from one layer to the next is kept for the backward pass."""
    again = recompute and torch.is_grad_enabled()
    for layer in layers:
        x = recomputed([layer], x) if again else layer(x)
    return x

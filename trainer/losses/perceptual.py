"""Perceptual distance: how far two images are apart in the features of a frozen network (Zhang et al. 2018).

Both kinds normalise the features to unit length over channels, take the squared difference, average it over the image
and sum over the layers. LPIPS weighs the channels by its linear heads; EfficientNet-Lite0 weighs them alike: it is no
LPIPS and its values do not compare. A mean over the image, where other losses of this folder are sums: of order 1.

Images are Tandem's, float in [-1, 1]; one channel is repeated to three. A smaller side under 64 px is brought to 64 or
more by the smallest whole factor, bilinear (28 becomes 84): on less, the deep layers would see little but padding.
Weights are frozen; everything runs in float32 whatever autocast says.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.kernels.lpips_head import lpips_head
from trainer.losses import efficientnet, vgg

SMALLEST = 64  # pixels that the smaller side has at least when the network sees it


@dataclass(frozen=True)
class NoPerceptualConfig:
    """No perceptual distance."""

    kind: Literal["none"] = "none"
    """No perceptual distance."""

    def build(self, device: torch.device | str) -> None:
        return None


@dataclass(frozen=True)
class EfficientNetLite0Config:
    """Features of EfficientNet-Lite0, ImageNet weights from the extra tandem[perceptual]."""

    kind: Literal["efficientnet_lite0"] = "efficientnet_lite0"
    """Features of EfficientNet-Lite0 after blocks 0, 2, 4 and 10."""

    def build(self, device: torch.device | str) -> "Perceptual":
        """ValueError naming the extra where the package is missing."""
        # the network's mean and deviation are for [0, 1]; here for [-1, 1]
        mean = [2 * m - 1 for m in efficientnet.MEAN]
        std = [2 * s for s in efficientnet.STD]
        return Perceptual(efficientnet.load(), mean=mean, std=std, heads=None).to(device)


@dataclass(frozen=True)
class LPIPSVGGConfig:
    """LPIPS (Zhang et al. 2018) on VGG16, weights from local files."""

    kind: Literal["lpips_vgg"] = "lpips_vgg"
    """LPIPS on VGG16."""
    path: Path = field(kw_only=True)
    """File with torchvision's VGG16 weights (features.N.weight, features.N.bias), .safetensors or .pth."""
    heads: Path | None = None
    """File with LPIPS' linear heads (lin0.model.1.weight ...), such as lpips' own vgg.pth; none: they lie in `path`."""

    def build(self, device: torch.device | str) -> "Perceptual":
        """ValueError naming file and key where one is missing."""
        network, heads = vgg.load(self.path, self.heads)
        return Perceptual(network, mean=list(vgg.MEAN), std=list(vgg.STD), heads=heads).to(device)


AnyPerceptualConfig = NoPerceptualConfig | EfficientNetLite0Config | LPIPSVGGConfig


class Perceptual(nn.Module):
    """A frozen feature network and the distance in it."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, *, mean: list[float], std: list[float], heads: list[Tensor] | None) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        self.heads = None if heads is None else nn.ParameterList(heads)
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y: (B, 1 or 3, H, W) float in [-1, 1] -> (B,) float32, differentiable in both, 0 for identical images.

        Values are not checked, since that would wait for the device: trainer.metrics does it.
        """
        if x.shape != y.shape:
            raise ValueError(f"images: {tuple(x.shape)} and {tuple(y.shape)} cannot be compared; give equal shapes")
        with torch.autocast(device_type=x.device.type, enabled=False):
            # apart, not as one batch: an image without a gradient builds no graph, and equal inputs take equal paths
            a, b = self.features(x), self.features(y)
            return lpips_head(a, b, None if self.heads is None else list(self.heads))

    def features(self, image: Tensor) -> list[Tensor]:
        """Each layer's features, (B, C, h, w), as the network gives them."""
        if not image.is_floating_point():
            raise ValueError(f"images: {image.dtype} is no image in [-1, 1]; convert it with trainer.data.pixels")
        x = image.to(self.mean.dtype)  # float32, unless the caller made the whole network float64
        smaller = min(x.shape[2:])
        if smaller < SMALLEST:
            x = functional.interpolate(x, scale_factor=float(-(-SMALLEST // smaller)), mode="bilinear")
        x = (x - self.mean) / self.std  # repeats one channel to three
        features: list[Tensor] = self.network(x.contiguous(memory_format=torch.channels_last))
        return features

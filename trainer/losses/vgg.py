"""VGG16 (Simonyan and Zisserman 2015) and the linear heads of LPIPS (Zhang et al. 2018), from the user's own files.

A training run fetches no weights, so they are given by path, as published: torchvision's VGG16 holds features.N.weight
and features.N.bias, lpips' vgg.pth holds lin0.model.1.weight to lin4.model.1.weight, (1, C, 1, 1). Both may also lie in
one file. Safetensors, or a .pth that loads with weights_only.
"""

from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

# convolutions by stage, as (number in torchvision's features, channels); a max-pool between stages
STAGES = (
    ((0, 64), (2, 64)),
    ((5, 128), (7, 128)),
    ((10, 256), (12, 256), (14, 256)),
    ((17, 512), (19, 512), (21, 512)),
    ((24, 512), (26, 512), (28, 512)),
)
# of lpips' scaling layer, for images in [-1, 1]
MEAN, STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class VGG16(nn.Module):
    """Image (B, 3, H, W), normalised by MEAN and STD -> relu1_2, relu2_2, relu3_3, relu4_3, relu5_3."""

    def __init__(self, state: dict[str, Tensor], *, path: Path) -> None:
        super().__init__()
        stages, channels = [], 3
        for convolutions in STAGES:
            layers = []
            for number, out in convolutions:
                layer = nn.Conv2d(channels, out, 3, padding=1)
                weight = tensor(state, f"features.{number}.weight", layer.weight.shape, path=path)
                bias = tensor(state, f"features.{number}.bias", layer.bias.shape, path=path)  # type: ignore[union-attr]
                layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
                layers.append(layer)
                channels = out
            stages.append(nn.ModuleList(layers))
        self.stages = nn.ModuleList(stages)

    def forward(self, image: Tensor) -> list[Tensor]:
        x, taps = image, []
        for number, stage in enumerate(self.stages):
            x = functional.max_pool2d(x, 2) if number else x
            assert isinstance(stage, nn.ModuleList)
            for layer in stage:
                x = functional.relu(layer(x))
            taps.append(x)
        return taps


def load(path: Path, heads: Path | None) -> tuple[VGG16, list[Tensor]]:
    """The network and its five heads, (1, C, 1, 1) each. ValueError naming file and key where one is missing."""
    state = read_weights(path)
    where = path if heads is None else heads
    lines = state if heads is None else read_weights(heads)
    shapes = [torch.Size((1, convolutions[-1][1], 1, 1)) for convolutions in STAGES]
    linear = [tensor(lines, f"lin{i}.model.1.weight", shape, path=where) for i, shape in enumerate(shapes)]
    return VGG16(state, path=path), linear


def tensor(state: dict[str, Tensor], key: str, shape: torch.Size, *, path: Path) -> Tensor:
    """state[key] as float32, after its presence and shape were checked."""
    value = state.get(key)
    if not isinstance(value, Tensor) or value.shape != shape:
        found = tuple(value.shape) if isinstance(value, Tensor) else "nothing"
        raise ValueError(f"{path}: holds {found} under {key}, where LPIPS-VGG needs {tuple(shape)}; see losses/vgg.py")
    return value.float()


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of any other by torch.load(weights_only)."""
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; perceptual.kind lpips_vgg needs VGG16 weights and LPIPS heads from a file"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:  # its text advises weights_only=False
        reason = "it holds more than tensors, or is no weights file"
    except (SafetensorError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0]
    else:
        if isinstance(state, dict):
            return state
        reason = f"a {type(state).__name__}, not a table of tensors"
    raise ValueError(f"{path}: cannot be read as weights ({reason}); give a .safetensors file or a .pth of tensors")

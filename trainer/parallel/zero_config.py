"""DeepSpeed's settings for one network: from the config, over the user's own JSON."""

import json
from pathlib import Path
from typing import Any

from trainer.parallel.config import DeepSpeedConfig

OURS = {
    "train_batch_size": "batch",
    "train_micro_batch_size_per_gpu": "micro_batch",
    "gradient_accumulation_steps": "micro_batch",
    "gradient_clipping": "optim.clip",
    "optimizer": "optim",
    "scheduler": "optim",
    "fp16.enabled": "parallel.weights",
    "bf16.enabled": "parallel.weights",
    "zero_optimization.stage": "parallel.stage",
    "zero_optimization.offload_optimizer.device": "parallel.offload",
}
"""What the run's config decides, by which key; a file says `auto` or nothing."""


def settings(config: DeepSpeedConfig, network: str, *, clip: float | None) -> dict[str, Any]:
    """DeepSpeed's configuration of a network. ValueError names the file and the key that it may not set."""
    found = {} if config.file is None else read(config.file)
    zero = found.get("zero_optimization", {})
    offload = zero.get("offload_optimizer", {}) | {"device": config.offload}
    return found | {
        # Tandem cuts micro-batches itself and hands over gradients of the whole batch's mean
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip or 0.0,
        "zero_optimization": zero
        | {"stage": config.stage_of(network)}
        | ({"offload_optimizer": offload} if config.offload != "none" else {}),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": found.get("bf16", {}) | {"enabled": config.weights == "bf16"},
        "fp16": found.get("fp16", {}) | {"enabled": config.weights == "fp16"},
    }


def read(path: Path) -> dict[str, Any]:
    """The user's own settings, without what the run's config decides."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"is no JSON ({error})"
        raise ValueError(f"parallel.file: {path}: {reason}") from None
    if not isinstance(found, dict):
        raise ValueError(f"parallel.file: {path}: is no JSON object")
    for key, ours in OURS.items():
        node, _, last = key.rpartition(".")
        holder = found
        for part in filter(None, node.split(".")):
            holder = holder.get(part, {})
            if not isinstance(holder, dict):
                raise ValueError(f"parallel.file: {path}: {part}: is no JSON object")
        if holder.pop(last, "auto") != "auto":
            raise ValueError(f'parallel.file: {path}: {key}: is set by {ours}; leave it out, or write "auto"')
    return found

"""DeepSpeed's settings for one network: from the config, over the user's own JSON."""

import difflib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from trainer.parallel.config import DeepSpeedConfig

BATCHES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
OPTIMISER = ("optimizer", "scheduler")
OURS = {
    **dict.fromkeys(BATCHES, "batch and micro_batch"),
    **dict.fromkeys(OPTIMISER, "optim"),
    "gradient_clipping": "optim.clip",
    "fp16.enabled": "parallel.weights",
    "bf16.enabled": "parallel.weights",
    "zero_optimization.stage": "parallel.stage",
    "zero_optimization.offload_optimizer.device": "parallel.offload",
    "zero_optimization.offload_param.device": "parallel.offload, which leaves weights where they are",
}
"""What the run's config decides, by which key; a file says the same, `auto` or nothing."""


KNOWN = frozenset({
    *(key.partition(".")[0] for key in OURS),
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "communication_data_type", "data_types",
    "prescale_gradients", "gradient_predivide_factor", "steps_per_print", "wall_clock_breakdown", "memory_breakdown",
    "dump_state", "comms_logger", "flops_profiler", "aio",
})  # fmt: skip
"""Keys of DeepSpeed's that mean something here."""
BUCKET = 500_000_000
"""DeepSpeed's default of reduce_bucket_size, in elements."""


def settings(
    config: DeepSpeedConfig, network: str, *, clip: float | None, elements: int | None = None
) -> dict[str, Any]:
    """DeepSpeed's configuration of a network of so many weights. ValueError names the file and the key that contradicts
    the config."""
    found = {} if config.file is None else read(config.file)
    decided = {
        "gradient_clipping": clip or 0.0,
        "fp16.enabled": config.weights == "fp16",
        "bf16.enabled": config.weights == "bf16",
        "zero_optimization.stage": config.stage,
        "zero_optimization.offload_optimizer.device": config.offload,
        "zero_optimization.offload_param.device": "none",
    }
    if network:  # the launcher's and the file's one clipping was compared with optim.clip when the backend was chosen
        _take(found, "gradient_clipping", config.file)
    for key, ours in OURS.items():
        held = _take(found, key, config.file)
        if held != "auto" and (key not in decided or held != decided[key]):
            words = f", {decided[key]!r} here" if key in decided else ""
            raise ValueError(
                f"parallel.file: {config.file}: {key}: {held!r}, but that is set by {ours}{words}; leave it out, or "
                'write "auto"'
            )
    zero = found.get("zero_optimization", {})
    offload = zero.pop("offload_optimizer", {}) | {"device": config.offload}
    zero.pop("offload_param", None)
    if elements is not None:  # DeepSpeed allocates the whole bucket, however small the network is
        zero["reduce_bucket_size"] = min(int(zero.get("reduce_bucket_size", BUCKET)), elements)
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
    """The JSON object in a file. ValueError names the file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"is no JSON ({error})"
        raise ValueError(f"parallel.file: {path}: {reason}") from None
    if not isinstance(found, dict):
        raise ValueError(f"parallel.file: {path}: is no JSON object")
    known(path, found, KNOWN)
    for key in OURS:
        _take(dict(found), key, path, take=False)
    return _without_auto(found)


def known(path: Path, found: Collection[str], keys: Collection[str | None], prefix: str = "") -> None:
    """ValueError for a key that is none of `keys`: DeepSpeed would pass over it without a word."""
    words = sorted(filter(None, keys))
    for key in found:
        if key not in words:
            nearest = difflib.get_close_matches(key, words, n=1, cutoff=0.5)
            hint = f"; did you mean {prefix}{nearest[0]}?" if nearest else ""
            raise ValueError(f"parallel.file: {path}: {prefix}{key}: no such key{hint}")


def _without_auto(found: dict[str, Any]) -> dict[str, Any]:
    """What is left to whoever reads the file takes DeepSpeed's default."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in found.items()
        if value != "auto"
    }


def _take(held: dict[str, Any], key: str, path: Path | None, *, take: bool = True) -> Any:
    """Takes a dotted key out; "auto" where it is not there. ValueError where a part of it is no object."""
    *parts, last = key.split(".")
    for part in parts:
        inner = held.get(part, {})
        if not isinstance(inner, dict):
            raise ValueError(f"parallel.file: {path}: {part}: is no JSON object")
        held = inner
    return held.pop(last, "auto") if take else held.get(last, "auto")

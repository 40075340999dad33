"""`parallel.kind: auto` becomes what the launcher asks for; what a launcher asks for in vain is refused.

What accelerate 1.15 was told, by its config file or its command line, reaches its processes as ACCELERATE_* variables.
A launcher that only starts processes (torchrun, srun, `accelerate launch` with MULTI_GPU) leaves the backend to the
config.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from trainer.parallel import accelerated, zero_config
from trainer.parallel.config import AutoConfig, DDPConfig, DeepSpeedConfig, ParallelConfig, Stage

SAID = "ACCELERATE_DEEPSPEED_"
OTHERS = {"FSDP": "FSDP", "MEGATRON_LM": "Megatron-LM", "PARALLELISM_CONFIG": "a parallelism_config"}


class Asked(NamedTuple):
    """DeepSpeed as the launcher asks for it; None where it says nothing."""

    stage: Stage | None
    offload: str | None
    weights: str | None
    file: Path | None


def resolve(
    config: ParallelConfig, *, precision: str, clip: float | None, compiled: bool
) -> tuple[DDPConfig | DeepSpeedConfig, list[str]]:
    """The backend that runs, and lines for the log.

    ValueError, naming both and what to write, where the launcher asks for something else than the config, or for
    something that has no effect. precision, clip, compiled: the config's `precision`, `optim.clip` and `compile`.
    """
    _refuse_the_ineffective(precision=precision, clip=clip, compiled=compiled)
    asked = _asked()
    if isinstance(config, DeepSpeedConfig):
        found = config if asked is None else _agreed(config, asked)
    elif asked is None or (isinstance(config, DDPConfig) and asked.stage == 0):
        return DDPConfig(processes=config.processes, timeout=config.timeout), []
    elif isinstance(config, AutoConfig):
        found = _taken(config, asked)
    else:
        raise ValueError(
            f"parallel.kind: ddp, but the launcher asks for DeepSpeed, ZeRO stage {_stage(asked)}; write "
            "parallel.kind=auto to take that, or launch with distributed_type: MULTI_GPU"
        )
    if found.stages == {0}:
        said = "ZeRO stage 0 shares nothing out among the ranks: it runs as parallel.kind: ddp"
        return DDPConfig(processes=found.processes, timeout=found.timeout), [said]
    accelerated.judge(found)
    zero_config.settings(found, "", clip=clip)  # what is wrong with the file is found before ranks meet
    return found, list(_notes())


def _asked() -> Asked | None:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return None
    name = os.environ.get(f"{SAID}CONFIG_FILE", "none")
    path = None if name == "none" else Path(name)
    held = {} if path is None else zero_config.read(path)
    stage = _one("zero_stage", os.environ.get(f"{SAID}ZERO_STAGE"), _at(held, "zero_optimization.stage"), path)
    offload = _one(
        "offload_optimizer_device",
        os.environ.get(f"{SAID}OFFLOAD_OPTIMIZER_DEVICE"),
        _at(held, "zero_optimization.offload_optimizer.device"),
        path,
    )
    if stage not in (None, "0", "1", "2", "3"):
        raise ValueError(f"zero_stage: the launcher asks for {stage}; 0, 1, 2 or 3")
    if offload not in (None, "none", "cpu"):
        raise ValueError(f"offload_optimizer_device: the launcher asks for {offload}; none or cpu (parallel.offload)")
    weights = next((kind for kind in ("bf16", "fp16") if _at(held, f"{kind}.enabled") is True), None)
    return Asked(None if stage is None else int(stage), offload, weights, path)  # type: ignore[arg-type]


def _at(held: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        held = held.get(part, {})
    return None if held in ({}, "auto") else held


def _one(key: str, said: str | None, held: Any, path: Path | None) -> str | None:
    """What the launcher's own setting and its file of DeepSpeed say, which must be one."""
    if said is not None and held is not None and said != str(held):
        raise ValueError(f"{key}: the launcher asks for {said}, its deepspeed_config_file {path} for {held}; keep one")
    return said if held is None else str(held)


def _stage(asked: Asked) -> Stage:
    return 2 if asked.stage is None else asked.stage  # accelerate's own default


def _taken(config: AutoConfig, asked: Asked) -> DeepSpeedConfig:
    return DeepSpeedConfig(
        stage=_stage(asked),
        offload="cpu" if asked.offload == "cpu" else "none",
        weights=asked.weights or "fp32",  # type: ignore[arg-type]
        file=asked.file,
        processes=config.processes,
        timeout=config.timeout,
    )


def _agreed(config: DeepSpeedConfig, asked: Asked) -> DeepSpeedConfig:
    pairs: list[tuple[str, Any, str, Any]] = [
        ("stage", config.stage, "zero_stage", asked.stage),
        ("offload", config.offload, "offload_optimizer_device", asked.offload),
        ("file", config.file, "deepspeed_config_file", asked.file),
    ]
    for ours, here, theirs, there in pairs:
        if here is not None and there is not None and here != there:
            raise ValueError(
                f"parallel.{ours}: {here}, but the launcher asks for {theirs}: {there}; write parallel.{ours}={there}, "
                f"or {theirs}: {here} for the launcher, or parallel.kind=auto to take all that it asks for"
            )
    return replace(config, file=config.file or asked.file)


def _refuse_the_ineffective(*, precision: str, clip: float | None, compiled: bool) -> None:
    for name, words in OTHERS.items():
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise ValueError(
                f"parallel.kind: the launcher asks for {words}, which is not here; launch with distributed_type: "
                "MULTI_GPU or DEEPSPEED"
            )
    mixed = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if mixed not in ("no", precision):  # no is what accelerate says when nobody said anything
        known = f"precision={mixed}, or " if mixed in ("bf16", "fp16") else ""
        raise ValueError(
            f"precision: {precision}, but the launcher asks for mixed_precision: {mixed}; write {known}"
            "mixed_precision: 'no' for the launcher, which leaves it to the config"
        )
    asked = os.environ.get("ACCELERATE_GRADIENT_CLIPPING", "auto")
    try:
        wanted = 0.0 if asked in ("auto", "none") else float(asked)
    except ValueError:
        raise ValueError(f"ACCELERATE_GRADIENT_CLIPPING: {asked!r} is no number") from None
    if asked not in ("auto", "none") and wanted != (clip or 0.0):
        raise ValueError(
            f"optim.clip: {'null' if clip is None else clip}, but the launcher asks for gradient_clipping: {asked}; "
            f"write optim.clip={asked if wanted else 'null'}, or leave gradient_clipping out"
        )
    asked = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto")
    if asked not in ("auto", "1"):
        raise ValueError(
            f"micro_batch: decides how often gradients are accumulated, but the launcher asks for "
            f"gradient_accumulation_steps: {asked}; leave that out, and let micro_batch be a rank's share / {asked}"
        )
    dynamo = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if dynamo != "no" and not (dynamo == "inductor" and compiled):
        raise ValueError(
            f"compile: {str(compiled).lower()}, but the launcher asks for dynamo_backend: {dynamo}; write "
            "compile=true for inductor, or leave dynamo_backend out"
        )
    device = os.environ.get(f"{SAID}OFFLOAD_PARAM_DEVICE", "none")
    if device != "none":
        raise ValueError(
            f"parallel.offload: moves master weights and the optimiser, but the launcher asks for "
            f"offload_param_device: {device}; leave that out"
        )


def _notes() -> Iterator[str]:
    if os.environ.get(f"{SAID}ZERO3_INIT") == "true":
        yield "the launcher's zero3_init_flag has no effect: a rank makes each network whole, then keeps its shard"
    if os.environ.get(f"{SAID}ZERO3_SAVE_16BIT_MODEL") == "true":
        yield "the launcher's zero3_save_16bit_model has no effect: checkpoints hold float32"

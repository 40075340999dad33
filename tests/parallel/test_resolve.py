"""`parallel.kind: auto` becomes what the launcher asks for; what it asks for in vain is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from trainer import build
from trainer import config as configuration
from trainer.config import Config
from trainer.parallel.config import AutoConfig, DDPConfig, DeepSpeedConfig

BASE = {"run": "unused", "images": 64, "batch": 16, "method": {"kind": "vae"}, "data": {"path": "unused", "size": 28}}
SAID = "ACCELERATE_DEEPSPEED_"
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_CONFIG_DS_FIELDS": ""}


@pytest.fixture(autouse=True)
def launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("ACCELERATE_"):
            monkeypatch.delenv(name)


def said(monkeypatch: pytest.MonkeyPatch, **more: str) -> None:
    """accelerate's variables of a launch with DeepSpeed."""
    for name, value in (ZERO | {key if "ACCELERATE" in key else f"{SAID}{key}": more[key] for key in more}).items():
        monkeypatch.setenv(name, value)


def config(**parallel: Any) -> Config:
    tree = BASE | ({"parallel": parallel} if parallel else {})
    return configuration.parse(json.loads(json.dumps(tree)), source="test")


def test_without_a_launcher_it_is_ddp() -> None:
    found, lines = build.resolve(config())
    assert (found.parallel, lines) == (DDPConfig(), [])
    again, _ = build.resolve(configuration.parse(configuration.to_tree(found), source="written"))
    assert again == found  # what stands in the run's config.yaml gives the same run


def test_multi_gpu_leaves_the_backend_to_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    assert build.resolve(config(processes=2, timeout=3.0))[0].parallel == DDPConfig(processes=2, timeout=3.0)
    explicit = DeepSpeedConfig(stage=3, offload="cpu")
    assert build.resolve(config(kind="deepspeed", stage=3, offload="cpu"))[0].parallel == explicit


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, DeepSpeedConfig(stage=2)),  # accelerate's own default
        ({"ZERO_STAGE": "1"}, DeepSpeedConfig(stage=1)),
        ({"ZERO_STAGE": "3", "OFFLOAD_OPTIMIZER_DEVICE": "none"}, DeepSpeedConfig(stage=3)),
        ({"ZERO_STAGE": "2", "OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, DeepSpeedConfig(stage=2, offload="cpu")),
    ],
)
def test_auto_takes_stage_and_offload_of_the_launcher(
    variables: dict[str, str], expected: DeepSpeedConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    said(monkeypatch, **variables)
    found, lines = build.resolve(config())
    assert (found.parallel, lines) == (expected, [])
    assert "kind: deepspeed" in configuration.to_text(found)
    assert isinstance(config().parallel, AutoConfig)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_auto_takes_stage_offload_and_file_from_the_launchers_json(
    stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}}}))
    said(monkeypatch, CONFIG_FILE=str(path))
    expected = DeepSpeedConfig(stage=stage, offload="cpu", file=path)  # type: ignore[arg-type]
    assert build.resolve(config())[0].parallel == expected
    # an explicit config keeps its word and takes the file
    explicit = config(kind="deepspeed", stage=stage, offload="cpu")
    assert build.resolve(explicit)[0].parallel == expected


def test_stage_0_runs_as_ddp_and_the_log_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    explicit = build.resolve(config(kind="deepspeed", stage=0, processes=2))
    said(monkeypatch, ZERO_STAGE="0")
    for found, lines in (build.resolve(config(processes=2)), explicit):
        assert found.parallel == DDPConfig(processes=2)
        assert lines == ["ZeRO stage 0 shares nothing out among the ranks: it runs as parallel.kind: ddp"]
    assert build.resolve(config(kind="ddp"))[0].parallel == DDPConfig()
    found, _ = build.resolve(config(kind="deepspeed", stage=0, discriminator=2))
    assert found.parallel == DeepSpeedConfig(stage=0, discriminator=2)


def test_what_has_no_effect_but_does_no_harm_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said(monkeypatch, ZERO_STAGE="3", ZERO3_INIT="true", ZERO3_SAVE_16BIT_MODEL="true")
    _, lines = build.resolve(config())
    assert len(lines) == 2 and "zero3_init_flag has no effect" in lines[0] and "float32" in lines[1]


@pytest.mark.parametrize(
    ("variables", "parallel", "words"),
    [
        ({"ZERO_STAGE": "2"}, {"kind": "ddp"}, ["parallel.kind: ddp", "ZeRO stage 2", "parallel.kind=auto"]),
        ({}, {"kind": "ddp"}, ["parallel.kind: ddp", "ZeRO stage 2"]),
        (
            {"ZERO_STAGE": "2"},
            {"kind": "deepspeed", "stage": 3},
            ["parallel.stage: 3", "zero_stage: 2", "parallel.stage=2"],
        ),
        (
            {"ZERO_STAGE": "2", "OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
            {"kind": "deepspeed", "stage": 2},
            ["parallel.offload: none", "offload_optimizer_device: cpu", "parallel.offload=cpu"],
        ),
        (
            {"CONFIG_FILE": "configs/deepspeed/zero2.json"},
            {"kind": "deepspeed", "stage": 2, "file": "configs/deepspeed/zero1.json"},
            ["parallel.file", "zero1.json", "zero2.json"],
        ),
        ({"CONFIG_FILE": "configs/deepspeed/zero2.json", "ZERO_STAGE": "1"}, {}, ["zero_stage", "1", "2", "keep one"]),
        ({"CONFIG_FILE": "nowhere.json"}, {}, ["parallel.file: nowhere.json: No such file"]),
        ({"ZERO_STAGE": "4"}, {}, ["zero_stage", "4"]),
        ({"OFFLOAD_OPTIMIZER_DEVICE": "nvme"}, {}, ["offload_optimizer_device", "nvme", "parallel.offload"]),
        ({"OFFLOAD_PARAM_DEVICE": "cpu"}, {}, ["parallel.offload", "offload_param_device: cpu"]),
        ({"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, {}, ["optim.clip: null", "1.0", "optim.clip=1.0"]),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {}, ["micro_batch", "gradient_accumulation_steps: 4"]),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {}, ["precision: fp32", "mixed_precision: bf16", "precision=bf16"]),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, {}, ["precision: fp32", "mixed_precision: fp8"]),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {}, ["compile: false", "inductor", "compile=true"]),
        ({"ACCELERATE_USE_FSDP": "true"}, {}, ["parallel.kind", "FSDP"]),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, ["parallel.kind", "Megatron-LM"]),
    ],
)
def test_what_the_launcher_asks_for_in_vain_is_refused_with_what_to_write(
    variables: dict[str, str], parallel: dict[str, Any], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said(monkeypatch, **variables)
    with pytest.raises(ValueError) as refused:
        build.resolve(config(**parallel))
    text = str(refused.value)
    assert "\n" not in text and all(word in text for word in words), text


def test_what_the_launcher_and_the_config_agree_on_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    said(monkeypatch, ZERO_STAGE="2", ACCELERATE_GRADIENT_CLIPPING="1.0", ACCELERATE_MIXED_PRECISION="bf16")
    tree = BASE | {"precision": "bf16", "optim": {"clip": 1.0}, "parallel": {"kind": "deepspeed", "stage": 2}}
    found, _ = build.resolve(configuration.parse(json.loads(json.dumps(tree)), source="test"))
    assert found.parallel == DeepSpeedConfig(stage=2)

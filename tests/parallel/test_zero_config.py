"""What DeepSpeed is told: the config's decisions over the user's own JSON."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.starts import ROOT
from trainer.parallel import zero_config
from trainer.parallel.config import DeepSpeedConfig
from trainer.parallel.resolve import resolve

SHIPPED = sorted((ROOT / "configs" / "deepspeed").glob("*.json"))


def written(folder: Path, **tree: Any) -> Path:
    path = folder / "own.json"
    path.write_text(json.dumps(tree))
    return path


def test_there_is_one_shipped_file_a_stage() -> None:
    assert [path.name for path in SHIPPED] == ["zero1.json", "zero2.json", "zero3.json"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_file_states_its_stage_and_is_what_deepspeed_knows(path: Path) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    stage = int(path.stem[-1])
    found = zero_config.settings(DeepSpeedConfig(stage=stage, file=path), "generator", clip=0.5)  # type: ignore[arg-type]
    zero = found["zero_optimization"]
    assert zero["stage"] == stage and zero["reduce_bucket_size"] == 50_000_000
    fields = DeepSpeedZeroConfig.model_fields
    assert not set(zero) - set(fields) - {field.alias for field in fields.values()}  # it takes any word without a word
    assert (found["gradient_clipping"], found["gradient_accumulation_steps"]) == (0.5, 1)
    with pytest.raises(ValueError, match=r"zero_optimization\.stage: \d, but that is set by parallel\.stage, \d here"):
        zero_config.settings(DeepSpeedConfig(stage=stage % 3 + 1, file=path), "generator", clip=None)  # type: ignore[arg-type]


def test_no_clipping_is_written_out(tmp_path: Path) -> None:
    """Accelerate would clip at 1.0 where it is told nothing."""
    assert zero_config.settings(DeepSpeedConfig(), "generator", clip=None)["gradient_clipping"] == 0.0


def test_a_network_has_its_own_stage_and_the_users_settings(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        zero_optimization={"stage": "auto", "overlap_comm": True, "offload_optimizer": {"pin_memory": True}},
        gradient_clipping="auto",
        train_batch_size="auto",
        bf16={"enabled": "auto"},
        wall_clock_breakdown=True,
    )
    config = DeepSpeedConfig(stage=3, discriminator=1, offload="cpu", weights="bf16", file=path)
    stages = {}
    for network in ("generator", "discriminator"):
        found = zero_config.settings(config, network, clip=None)
        assert found["zero_optimization"]["overlap_comm"] and found["wall_clock_breakdown"]
        assert found["zero_optimization"]["offload_optimizer"] == {"pin_memory": True, "device": "cpu"}
        assert "train_batch_size" not in found and found["bf16"]["enabled"] and not found["fp16"]["enabled"]
        stages[network] = found["zero_optimization"]["stage"]
    assert stages == {"generator": 3, "discriminator": 1}


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"zero_optimization": {"stage": 3}}, ["zero_optimization.stage: 3", "parallel.stage, 2 here"]),
        ({"gradient_clipping": 1.0}, ["gradient_clipping: 1.0", "optim.clip, 0.5 here"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled: True", "parallel.weights, False here"]),
        ({"train_batch_size": 64}, ["train_batch_size: 64", "batch and micro_batch"]),
        ({"gradient_accumulation_steps": 1}, ["gradient_accumulation_steps", "batch and micro_batch"]),
        ({"optimizer": {"type": "Adam"}}, ["optimizer", "optim"]),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, ["'cpu'", "parallel.offload, 'none' here"]),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, ["offload_param.device", "leaves weights"]),
        ({"zero_optimization": 2}, ["zero_optimization: is no JSON object"]),
        ({"fp16": True}, ["fp16: is no JSON object"]),
    ],
)
def test_what_contradicts_the_config_is_refused_by_file_and_key(
    tree: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    path = written(tmp_path, **tree)
    with pytest.raises(ValueError) as refused:
        zero_config.settings(DeepSpeedConfig(stage=2, file=path), "", clip=0.5)
    assert all(word in str(refused.value) for word in [f"parallel.file: {path}: ", *words]), refused.value


@pytest.mark.parametrize(("text", "said"), [("[1]", "is no JSON object"), ("{", "is no JSON ("), (None, "No such")])
def test_a_file_that_is_no_json_is_refused_by_name(text: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=f"parallel.file: {path}: .*") as refused:
        zero_config.read(path)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ({"no_such_key": 1}, "no_such_key: no such key"),
        ({"zero_optimisation": {}}, "did you mean zero_optimization?"),
        ({"zero_optimization": {"reduce_bucket": 1}}, "did you mean zero_optimization.reduce_bucket_size?"),
        ({"zero_optimization": {"reduce_bucket_size": "many"}}, "zero_optimization.reduce_bucket_size: "),
        ({"zero_optimization": {"stage3_max_live_parameters": -1}}, "zero_optimization.stage3_max_live_parameters: "),
    ],
)
def test_what_deepspeed_does_not_take_is_named_before_ranks_meet(
    held: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = written(tmp_path, **held)
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        resolve(DeepSpeedConfig(file=path), precision="fp32", clip=None, compiled=False)
    assert str(error.value).startswith(f"parallel.file: {path}: ") and "\n" not in str(error.value)


def test_what_is_left_to_the_reader_is_deepspeeds_default(tmp_path: Path) -> None:
    path = written(tmp_path, zero_optimization={"reduce_bucket_size": "auto", "overlap_comm": "auto"})
    config = DeepSpeedConfig(file=path)
    resolve(config, precision="fp32", clip=None, compiled=False)
    found = zero_config.settings(config, "generator", clip=None, elements=10**9)["zero_optimization"]
    assert found == {"stage": 2, "reduce_bucket_size": zero_config.BUCKET}


def test_one_clipping_of_the_file_goes_with_two_of_the_config(tmp_path: Path) -> None:
    """It is compared with optim.clip; the discriminator may have its own."""
    config = DeepSpeedConfig(file=written(tmp_path, gradient_clipping=1.0))
    resolve(config, precision="fp32", clip=1.0, compiled=False)
    assert zero_config.settings(config, "discriminator", clip=0.5)["gradient_clipping"] == 0.5
    with pytest.raises(ValueError, match=r"gradient_clipping: 1\.0, but that is set by optim\.clip, 0\.0 here"):
        resolve(config, precision="fp32", clip=None, compiled=False)

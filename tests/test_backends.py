"""Whole runs under DeepSpeed: the same curves as one process, and handed on from one backend to the next."""

import shutil
from pathlib import Path

import pytest
import torch

from tests import starts
from tests.runs import IMAGES, losses, tensors, write_config
from tests.test_resume import copy_at
from trainer import checkpoint, generate

pytest.importorskip("deepspeed")
ZERO = ("parallel.kind=deepspeed", "checkpoint.every=192")


def worst(found: Path, wanted: Path) -> float:
    """The largest difference of a loss, as a share of the largest value of its curve."""
    mine, theirs = losses(found), losses(wanted)
    assert {tag: list(values) for tag, values in mine.items()} == {tag: list(v) for tag, v in theirs.items()}
    return max(
        abs(mine[tag][images] - value) / max(map(abs, values.values()))
        for tag, values in theirs.items()
        for images, value in values.items()
    )


def test_a_run_under_zero_is_the_run_of_one_process_and_goes_on_under_any_backend(few: Path, tmp_path: Path) -> None:
    config, logs = write_config(tmp_path / "one.yaml", "vaegan", data=few), tmp_path / "logs"
    starts.train(logs, str(config), "checkpoint.every=192").wait().ok()
    zero = tmp_path / "zero"
    ended = starts.train(logs, str(config), *ZERO, "parallel.stage=3", f"run={zero}", world=2).wait().ok()
    assert ended.err == ""  # DeepSpeed and Accelerate say a lot
    last = checkpoint.load(zero / f"checkpoints/{IMAGES:012d}")
    assert last.state["world"] == 2
    found, wanted = tensors(zero), tensors(tmp_path / "one")
    assert found.keys() == wanted.keys()
    assert 0 < worst(zero, tmp_path / "one") < 1e-5

    # saved at stage 3 on two ranks; on under DDP on one, then from there under stage 1 on two
    words = copy_at(zero, 192, tmp_path / "ddp")
    ended = starts.train(logs, *words, "parallel={kind: ddp}").wait().ok()
    assert "changed since then: 2 -> 1 processes; the batch stays" in ended.out
    assert "parallel.kind: deepspeed -> ddp" in ended.out
    assert worst(tmp_path / "ddp", tmp_path / "one") < 1e-5
    words = copy_at(tmp_path / "ddp", 192, tmp_path / "again")
    starts.train(logs, *words, *ZERO, "parallel.stage=1", "parallel.discriminator=2", world=2).wait().ok()
    assert worst(tmp_path / "again", tmp_path / "one") < 1e-5

    # what it left is a checkpoint like any other
    samples = [torch.cat(list(generate.load(run).sample(4))) for run in (zero, tmp_path / "one")]
    assert int((samples[0].int() - samples[1].int()).abs().max()) <= 1  # of 255, where a rounding goes the other way
    shutil.rmtree(zero)

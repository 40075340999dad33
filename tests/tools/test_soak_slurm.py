"""The soak of jobs: what it draws, what it would find; and two events on a real SLURM."""

import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import write_config
from tests.starts import ROOT, train
from tools.soak import slurm as soak


def test_each_kind_of_event_is_drawn_before_any_comes_again() -> None:
    names = soak.drawn(20, random.Random(0))
    assert len(names) == 20 and set(names[: len(soak.EVENTS)]) == set(soak.EVENTS)
    assert names == soak.drawn(20, random.Random(0)) != soak.drawn(20, random.Random(1))
    assert len(soak.drawn(2, random.Random(0))) == 2


def test_a_world_that_the_batch_cannot_have_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--ranks", "3"], ["--events", "-1"]):
        with pytest.raises(SystemExit):
            soak.parse(words)
    assert "2 x --ranks divide 64" in capsys.readouterr().err


def test_one_bit_of_a_weight_or_a_loss_is_found(few: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "golden.yaml", "vae", data=few)
    train(tmp_path / "logs", str(config)).wait().ok()
    shutil.copytree(tmp_path / "golden", tmp_path / "same")
    assert soak.compare(tmp_path / "golden", tmp_path / "same") == []
    train(tmp_path / "logs", str(config), f"run={tmp_path}/other", "optim.lr=2.000001e-3").wait().ok()
    found = soak.compare(tmp_path / "golden", tmp_path / "other")
    assert any(line.startswith("autoencoder.safetensors differs") for line in found), found
    assert any(re.match(r"loss/\S+ differs at \d+ of 24 points, first at \d+ images", line) for line in found), found
    shutil.rmtree(max((tmp_path / "other" / "checkpoints").glob("0*")))
    assert "the run is at" in soak.compare(tmp_path / "golden", tmp_path / "other")[0]


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_run_that_two_events_interrupt_comes_to_the_same_weights() -> None:
    if shutil.which("slurmctld") is None or os.getuid() != 0:
        pytest.skip("needs root and SLURM: `python -m tools.slurm install`")
    command = [sys.executable, "-m", "tools.soak.slurm", "--events", "2", "--seed", "2"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=850)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "2 of 2 events" in ran.stdout and "those of the uninterrupted run, bit for bit" in ran.stdout

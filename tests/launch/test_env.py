"""`tandem env`, on the machine that runs the test."""

import json
import platform
import subprocess
from pathlib import Path

import pytest
import torch

from launch import env


def test_it_tells_versions_devices_and_the_commit(capsys: pytest.CaptureFixture[str]) -> None:
    assert env.main(["--json"]) == 0
    state = json.loads(capsys.readouterr().out)
    assert state["python"]["version"] == platform.python_version()
    assert state["packages"]["torch"] == state["torch"]["version"] == torch.__version__
    assert "gloo" in state["torch"]["backends"]
    assert len(state["torch"]["devices"]) == max(1, torch.cuda.device_count())
    assert state["slurm"]["version"]


def test_the_block_for_people_names_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert env.main([]) == 0
    shown = capsys.readouterr().out
    for section in ("checkout", "python", "packages", "torch", "machine", "slurm", "environment"):
        assert f"\n{section}\n" in f"\n{shown}"


def test_a_checkout_counts_its_changed_files(tmp_path: Path) -> None:
    for command in (["init", "-q", "-b", "main"], ["commit", "-q", "--allow-empty", "-m", "Begin"]):
        settings = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *settings, *command], check=True)
    (tmp_path / "new.txt").write_text("new")
    state = env.checkout(tmp_path)
    assert (state["branch"], state["changed files"], len(state["commit"])) == ("main", 1, 40)


def test_a_folder_that_is_no_checkout_is_said_to_be_none(tmp_path: Path) -> None:
    assert env.checkout(tmp_path)["git"] == "no checkout"


def test_variables_that_may_hold_secrets_are_not_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_TOKEN", "hush-hush")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    env.main([])
    shown = capsys.readouterr().out
    assert "hush-hush" not in shown
    assert "NCCL_DEBUG" in shown


def test_a_program_that_hangs_or_is_missing_gives_none() -> None:
    assert env.printed("sleep", "30", seconds=0.1) is None
    assert env.printed("no-such-program") is None

"""Real launches of the trainer, and what they left."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests import starts
from tests.runs import curves, write_config

ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]


def gan(folder: Path, data: Path) -> Path:
    """The config of a GAN's four updates with a checkpoint after each."""
    log = {"pictures_every": 0, "evaluate_every": 0}
    return write_config(folder / "gan.yaml", "gan", data=data, images=64, log=log, checkpoint={"every": 16})


def losses(config: Path) -> dict[str, dict[int, float]]:
    """Tag -> {images: loss} of its run."""
    return {tag: values for tag, values in curves(config.with_suffix("")).items() if tag.startswith("loss/")}


def of_one_process(folder: Path, data: Path) -> dict[str, dict[int, float]]:
    path = gan(folder, data)
    starts.train(folder / "logs", str(path)).wait().ok()
    return losses(path)


def same_losses(config: Path, alone: dict[str, dict[int, float]], *, world: int) -> None:
    """The run of `config` had `world` processes and the losses of one."""
    newest = max((config.with_suffix("") / "checkpoints").iterdir())
    assert json.loads((newest / "state.json").read_text())["world"] == world
    found = losses(config)
    assert found.keys() == alone.keys() and len(alone) >= 2
    for tag, values in alone.items():
        assert found[tag] == pytest.approx(values, rel=1e-4, abs=1e-5), tag


def launched(commands: Sequence[Sequence[str]], home: Path, *, seconds: float = 200) -> list[tuple[int, str]]:
    """(exit code, what it printed) of commands that run together."""
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    alone |= {"HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            command, cwd=starts.ROOT, env=alone, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for command in commands
    ]
    try:
        said = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.terminate()  # a launcher ends its ranks
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]

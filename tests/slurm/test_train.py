"""The trainer itself as jobs of a real SLURM: the losses of one process on two nodes, and under DeepSpeed."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from launch import cli
from tests import starts
from tests.runs import losses
from tests.slurm.jobs import Submitted
from tools.slurm.cluster import Cluster
from trainer import config as configuration

TINY = ("images=1280", "log.every=64", "log.evaluate_images=64", "log.evaluate_every=0", "log.pictures_every=0")
CPU = ("--cluster", "configs/cluster/cpu.yaml")


def submitted(capsys: pytest.CaptureFixture[str], run: Path, *words: str) -> Submitted:
    assert cli.dispatch(["submit", "configs/vaegan_fashion.yaml", f"run={run}", *TINY, *words, *CPU]) == 0
    said = capsys.readouterr().out
    number = re.fullmatch(r"job (\d+): .*\n", said)
    assert number is not None, said
    return Submitted(run, number[1])


def same_losses(run: Path, alone: Path, *, world: int, rel: float) -> None:
    newest = max((run / "checkpoints").iterdir())
    assert json.loads((newest / "state.json").read_text())["world"] == world
    found, wanted = losses(run), losses(alone)
    assert found.keys() == wanted.keys() and len(wanted) >= 3
    for tag, values in wanted.items():
        assert found[tag] == pytest.approx(values, rel=rel, abs=1e-5), tag


@pytest.fixture
def place(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a user has it, in which relative paths of the config begin."""
    (tmp_path / "configs").symlink_to(starts.ROOT / "configs")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "fashion-mnist").symlink_to(few)
    (tmp_path / "trainer.py").write_text("raise SystemExit('this is not the trainer')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "0")  # what a shell inside another launcher has
    return tmp_path


def test_jobs_train_to_the_losses_of_one_process(
    cluster: Cluster, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes of two ranks, told to start again; two ranks under DeepSpeed, one of them killed; one process."""
    four = submitted(capsys, place / "four", "batch=64")
    zero = ("parallel.kind=deepspeed", "parallel.stage=2", "parallel.file=configs/deepspeed/zero2.json")
    two = submitted(capsys, place / "two", *zero, "checkpoint.every=128", "cluster.nodes=1")
    four.wait_for("64 of 1,280 images")
    subprocess.run(["scancel", "--signal=USR2", four.number], check=True)
    two.wait_for("64 of 1,280 images")
    os.kill(json.loads((two.run / "heartbeats" / "rank00001.json").read_text())["pid"], signal.SIGKILL)
    monkeypatch.delenv("RANK")
    words = [
        f"{starts.ROOT}/configs/vaegan_fashion.yaml",
        f"run={place}/one",
        f"data.path={place}/data/fashion-mnist",
        *TINY,
    ]
    starts.train(place / "logs", *words).wait().ok()
    for job, world, rel in ((four, 4, 1e-4), (two, 2, 1e-3)):
        assert job.wait().state() == "COMPLETED", job.said()
        same_losses(job.run, place / "one", world=world, rel=rel)
        assert "everything is in" in job.log(0)
    assert (four.ends(), two.ends()) == ([(75, "asked"), (0, None)], [(137, "failure"), (0, None)])
    assert re.search(r"rank 1 on \w+: a rank was killed; .*; starts again", two.log())
    assert "goes on from" in four.log(0)
    resolved = configuration.load(two.run / "submit" / "config.yaml", [])
    assert resolved.parallel.file == two.run / "submit" / "deepspeed.json"  # type: ignore[union-attr]

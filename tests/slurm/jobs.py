"""Jobs of the tests: submitted, watched, read."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from launch import cluster as clusters
from launch import submit
from tests.starts import ROOT
from tools.slurm.job import Submitted as Submitted
from tools.slurm.job import scontrol as scontrol
from trainer import config as configuration

STUB = Path(__file__).with_name("stub.py")


def checkout(folder: Path) -> Path:
    """A git checkout of the launcher, with the stub as its trainer."""
    shutil.copytree(ROOT / "launch", folder / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "trainer").mkdir()
    for name in ("errors.py", "signals.py"):
        shutil.copy(ROOT / "trainer" / name, folder / "trainer")
    shutil.copy(STUB, folder / "trainer" / "__main__.py")
    (folder / "trainer" / "__init__.py").touch()
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        subprocess.run(["git", "-C", folder, *words], check=True)
    return folder


def stub(root: Path, run: Path, plan: dict[str, Any], **asked: Any) -> Submitted:
    """Submits a run of the stub in the checkout `root`."""
    run.mkdir(parents=True)
    (run / "plan.json").write_text(json.dumps(plan))
    path = run.parent / f"{run.name}.yaml"
    path.write_text(yaml.safe_dump({"time": 10, "ranks_per_node": 2, **asked}))
    config = configuration.load(ROOT / "configs" / "vae_fashion.yaml", [f"run={run}"])
    config = replace(config, images=plan["images"])
    job = submit.plan(config, clusters.load(path), folder=run.parent)
    return Submitted(run, submit.submit(job, config, command=["tandem", "submit"], root=root))

"""The batch scripts of launch/README.md, on a real SLURM."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import saved
from tests.starts import ROOT, SHORT
from tools.slurm.cluster import Cluster

SCRIPTS = re.findall(
    r"^    #!/bin/bash\n(?:    .*\n)+", (ROOT / "launch" / "README.md").read_text(encoding="utf-8"), re.MULTILINE
)
CONFIG = "configs/vaegan_fashion.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=["srun", "torchrun"])
def test_a_script_of_the_page_trains_on_two_nodes(script: str, cluster: Cluster, few: Path, tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "fashion-mnist").symlink_to(few)
    path = tmp_path / "job.sh"
    assert script.count(CONFIG) == 1
    path.write_text(re.sub("^    ", "", script, flags=re.MULTILINE).replace(CONFIG, " ".join((CONFIG, *SHORT))))
    bin_, before = Path(sys.executable).parent, os.environ["PATH"]
    environment = {**os.environ, "PATH": f"{bin_}:{before}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(["sbatch", "-W", "-o", "job.log", path], cwd=tmp_path, env=environment, timeout=200)
    said = (tmp_path / "job.log").read_text()
    assert ran.returncode == 0, said
    run = tmp_path / "runs" / "vaegan_fashion"
    assert saved(run)[-1] == 640 and '"world": 4' in (run / "attempts.jsonl").read_text(), said

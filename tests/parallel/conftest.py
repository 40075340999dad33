"""One start of two processes and one of one process, for all tests of this folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TWO = (
    "import sys; from launch.local import launch; sys.exit(launch('tests.parallel.worker', sys.argv[1:], processes=2))"
)


@pytest.fixture(scope="session")
def starts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which tests/parallel/worker.py wrote, from one process and from two."""
    out = tmp_path_factory.mktemp("starts")
    # a start of our own, even where the tests themselves were started by a launcher
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    for command in (["-c", TWO], ["-m", "tests.parallel.worker"]):
        ended = subprocess.run(
            [sys.executable, *command, str(out)], cwd=ROOT, env=alone, capture_output=True, text=True, timeout=240
        )
        assert ended.returncode == 0, ended.stderr
    return out

"""One start of two processes and one of one process, for all tests of this folder; and one of two under DeepSpeed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TWO = "import sys; from launch.local import launch; sys.exit(launch(sys.argv[1], sys.argv[2:], processes=2))"


def start(module: str, out: Path, *, processes: int) -> None:
    """`python -m module OUT` on so many processes, to its end."""
    # a start of our own, even where the tests themselves were started by a launcher
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = ["-m", module] if processes == 1 else ["-c", TWO, module]
    ended = subprocess.run(
        [sys.executable, *command, str(out)], cwd=ROOT, env=alone, capture_output=True, text=True, timeout=600
    )
    assert ended.returncode == 0, ended.stderr


@pytest.fixture(scope="session")
def starts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which tests/parallel/worker.py wrote, from one process and from two."""
    out = tmp_path_factory.mktemp("starts")
    for processes in (2, 1):
        start("tests.parallel.worker", out, processes=processes)
    return out


@pytest.fixture(scope="session")
def zero(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which tests/parallel/zero.py wrote, from two processes."""
    pytest.importorskip("deepspeed")
    out = tmp_path_factory.mktemp("zero")
    start("tests.parallel.zero", out, processes=2)
    return out

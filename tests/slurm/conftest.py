"""A real SLURM for the tests of this folder; they are skipped where it is not installed or we are not root."""

import os
import shutil
from collections.abc import Iterator

import pytest

from tools.slurm.cluster import Cluster, temporary


@pytest.fixture(scope="package")
def cluster() -> Iterator[Cluster]:
    """Four nodes of 8 CPUs and 2 GPUs that are not there."""
    missing = [name for name in ("srun", "slurmctld", "slurmd", "munged") if shutil.which(name) is None]
    if missing or os.getuid() != 0:
        pytest.skip(f"needs root and {', '.join(missing) or 'nothing more'}: `python -m tools.slurm install`")
    before = dict(os.environ)
    try:
        with temporary(nodes=4, cpus=8, gpus=2) as found:
            os.environ.update(found.exports())
            yield found
    finally:
        os.environ.clear()
        os.environ.update(before)

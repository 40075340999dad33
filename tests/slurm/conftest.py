"""A real SLURM for the tests of this folder; they are skipped where it is not installed or we are not root."""

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.slurm.cluster import Cluster


def _free_ports(count: int) -> int:
    """The first of `count` ports in a row that nobody listens on."""
    for base in range(16_817 + os.getpid() % 1_000, 19_900, count):
        taken = []
        for port in range(base, base + count):
            with socket.socket() as one:
                taken.append(one.connect_ex(("127.0.0.1", port)) == 0)
        if not any(taken):
            return base
    raise RuntimeError("no free ports")


@pytest.fixture(scope="package")
def cluster() -> Iterator[Cluster]:
    """Four nodes of 8 CPUs and 2 GPUs that are not there."""
    missing = [name for name in ("srun", "slurmctld", "slurmd", "munged") if shutil.which(name) is None]
    if missing or os.getuid() != 0:
        pytest.skip(f"needs root and {', '.join(missing) or 'nothing more'}: `python -m tools.slurm install`")
    folder = Path(tempfile.mkdtemp(prefix="tandem-slurm-", dir="/tmp"))  # the path of a socket must be short
    folder.chmod(0o755)
    found, before = Cluster(folder), dict(os.environ)
    try:
        found.start(nodes=4, cpus=8, gpus=2, port=_free_ports(5))
        os.environ.update(found.exports())
        yield found
    finally:
        os.environ.clear()
        os.environ.update(before)
        found.stop()
        shutil.rmtree(folder, ignore_errors=True)

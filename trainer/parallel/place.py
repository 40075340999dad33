"""Where a process runs, as its environment says: for what a run writes about itself."""

import os
import socket


def host() -> str:
    """SLURM's name of the machine, else its own."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def job() -> str | None:
    return os.environ.get("SLURM_JOB_ID")


def restart() -> int:
    """How often SLURM has started this job again."""
    text = os.environ.get("SLURM_RESTART_COUNT", "0")
    return int(text) if text.isdecimal() else 0


def leads() -> bool:
    """Whether this is the one process of a run that speaks, before the ranks have met."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"

"""Where a process runs, as its environment says: for what a run writes about itself."""

import ctypes
import os
import signal
import socket
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h


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


def end_with_launcher() -> None:
    """Under `accelerate launch` and torchrun, whose one-process start and agent die of a signal and leave the ranks to
    themselves: asks Linux for a SIGTERM when that happens."""
    path = Path(f"/proc/{os.getppid()}/cmdline")
    words = path.read_bytes().decode(errors="replace").split("\0") if path.exists() else []
    accelerate = any(Path(word).name.startswith("accelerate") for word in words)
    if sys.platform == "linux" and (accelerate or "TORCHELASTIC_RUN_ID" in os.environ):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

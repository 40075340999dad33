"""Which process of this machine is meant, so that another that got its number later is not taken for it."""

import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

BOOT = Path("/proc/sys/kernel/random/boot_id")


def identity(pid: int) -> dict[str, Any]:
    """Of a process that runs: its number, when it started, since which boot, where. For `alive`, as JSON."""
    return {"pid": pid, "started": _started(pid), "boot": _boot(), "host": socket.gethostname()}


def elsewhere(told: dict[str, Any]) -> bool:
    """Whether it is another machine's."""
    return told.get("host") != socket.gethostname()


def alive(told: dict[str, Any]) -> bool:
    """Whether the process that `identity` told of still runs on this machine."""
    pid, started = told.get("pid"), told.get("started")
    if not isinstance(pid, int) or started is None or elsewhere(told) or told.get("boot") != _boot():
        return False
    return bool(_started(pid) == started)


def began_before(pid: int, moment: float) -> bool:
    """Whether the process of this number runs and began before `moment`, in seconds of the clock. Linux only."""
    ticks = _started(pid)
    if ticks is None:
        return False
    booted = time.time() - float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
    return booted + int(ticks) / os.sysconf("SC_CLK_TCK") <= moment


def _started(pid: int) -> str | None:
    """When a process started, in the system's own measure; None: it is no more."""
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if fields[0] in "ZX" else fields[19]  # proc(5): state, and starttime in ticks since the boot
    ran = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return ran.stdout.strip() or None


def _boot() -> str:
    return BOOT.read_text(encoding="utf-8").strip() if BOOT.exists() else ""

"""`tandem env`: what a bug report needs to say about the machine, the packages and the checkout."""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = (
    "tandem",
    "torch",
    "accelerate",
    "deepspeed",
    "webdataset",
    "tensorboard",
    "submitit",
    "safetensors",
    "numpy",
    "pillow",
    "opencv-python-headless",
    "simplejpeg",
    "pydantic",
    "tyro",
    "triton",
)
# Variables that change how a run behaves. No other is printed: an environment holds secrets too.
PREFIXES = ("OMP_", "GOMP_", "MKL_", "CUDA_", "NCCL_", "GLOO_", "TORCH_", "ACCELERATE_", "DS_", "WDS_", "PYTORCH_")
SLURM_VARIABLES = ("SLURM_JOB_ID", "SLURM_JOB_PARTITION", "SLURM_JOB_NUM_NODES", "SLURM_NTASKS", "SLURM_CLUSTER_NAME")
GIB = 1024**3


def printed(*command: str, seconds: float = 10) -> str | None:
    """What a program prints; None when it is missing, fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    return ran.stdout.strip() if ran.returncode == 0 else None


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def checkout(root: Path) -> dict[str, Any]:
    """Git's view of the folder that this code runs from."""
    if not (root / ".git").exists() or (commit := printed("git", "-C", str(root), "rev-parse", "HEAD")) is None:
        return {"folder": str(root), "git": "no checkout"}
    changed = (printed("git", "-C", str(root), "status", "--porcelain") or "").splitlines()
    branch = printed("git", "-C", str(root), "rev-parse", "--abbrev-ref", "HEAD")
    return {"folder": str(root), "commit": commit, "branch": branch, "changed files": len(changed)}


def torch_state() -> dict[str, Any]:
    try:
        import torch
    except (ImportError, OSError) as error:  # a broken installation is what the report is for
        return {"import": f"fails: {error}"}
    state: dict[str, Any] = {
        "version": torch.__version__,
        "built for CUDA": torch.version.cuda or "no",
        "backends": [name for name in ("gloo", "nccl", "mpi") if backend_available(name)],
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        state["cuDNN"] = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        state["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        state["devices"] = [
            f"{device.name}, {device.total_memory / GIB:.0f} GiB, compute {device.major}.{device.minor}"
            for device in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ]
    else:
        state["devices"] = ["cpu"]
    return state


def backend_available(name: str) -> bool:
    import torch.distributed

    return bool(torch.distributed.is_available() and torch.distributed.is_backend_available(name))


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def free(folder: str) -> str:
    usage = shutil.disk_usage(folder)
    return f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free"


def machine() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    state: dict[str, Any] = {
        "system": platform.platform(),
        "cpu": f"{cpu_model()}, {cores} of {os.cpu_count()} cores for this process",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / GIB:.1f} GiB",
        "this folder": free("."),
    }
    if Path("/dev/shm").exists():  # noqa: S108  NCCL and loader workers need room there
        state["/dev/shm"] = free("/dev/shm")  # noqa: S108
    driver = printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    state["NVIDIA driver"] = driver.splitlines()[0] if driver else "none"
    return state


def slurm() -> dict[str, Any]:
    partitions = printed("sinfo", "--noheader", "--format=%P %D nodes %T %G")
    return {
        "version": printed("sinfo", "--version") or "not found",
        **({"partitions": partitions.splitlines()} if partitions else {}),
        **{name: os.environ[name] for name in SLURM_VARIABLES if name in os.environ},
    }


def describe() -> dict[str, dict[str, Any]]:
    return {
        "checkout": checkout(Path(__file__).resolve().parents[1]),
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "packages": {package: version(package) for package in PACKAGES},
        "torch": torch_state(),
        "machine": machine(),
        "slurm": slurm(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(PREFIXES)},
    }


def block(state: dict[str, dict[str, Any]]) -> str:
    lines = []
    for section, entries in state.items():
        lines.append(section)
        for name, value in entries.items() or {"": "nothing set"}.items():
            values = value if isinstance(value, list) else [value]
            lines.append(f"  {name:<24} {', '.join(map(str, values))}".rstrip())
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="tandem env",
        description="Print versions, devices, NCCL, SLURM and git state for a bug report.",
        epilog="example:\n  tandem env --json > env.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    options = parser.parse_args(argv)
    state = describe()
    print(json.dumps(state, indent=2) if options.json else block(state))
    return 0

"""Folders of runs as the trainer and the launcher leave them, made by hand; and a squeue that says what it is told."""

import json
import os
import time
from pathlib import Path
from typing import Any

from launch import folders, process

NOW = time.time


def heartbeat(run: Path, rank: int = 0, *, age: float = 1.0, **more: Any) -> None:
    told = {
        "rank": rank, "host": "node1", "pid": 1, "job": "12", "restart": 0, "time": NOW() - age, "started": NOW() - 600,
        "start": 1.0, "images": 12_800, "total": 64_000, "at": "step", "since": NOW() - age, "passed": [100, 0],
        "images_per_second": 512.0, "save_seconds": 1.5,
    }  # fmt: skip
    folder = run / "heartbeats"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"rank{rank:05d}.json").write_text(json.dumps(told | more))


def submitted(run: Path, job: str = "12", **more: Any) -> Path:
    (run / "submit").mkdir(parents=True, exist_ok=True)
    about = {"kind": "slurm", "job": job, "folder": str(run.parent), "time": NOW() - 900}
    (run / "submit" / "job.json").write_text(json.dumps(about | more))
    (run / "submit" / "config.yaml").write_text("run: x\nimages: 64000\n")
    return run


def here(run: Path, *, alive: bool = True, **more: Any) -> Path:
    """Submitted to this machine; the process that watches is this one, or one that is gone."""
    told = process.identity(os.getpid()) | ({} if alive else {"started": "1"})
    return submitted(run, "local-1", kind="local", process=told, **more)


def ended(run: Path, code: int, reason: str, again: str | None = None, **more: Any) -> None:
    line = {"time": NOW() - 1, "job": "12", "restart": 0, "code": code, "reason": reason, "again": again}
    with (run / "submit" / "ends.jsonl").open("a") as file:
        file.write(json.dumps(line | more) + "\n")


def saved(run: Path, images: int, *, age: float = 90.0) -> None:
    path = run / "checkpoints" / f"{images:012d}"
    path.mkdir(parents=True)
    os.utime(path, (NOW() - age, NOW() - age))


def sweep(folder: Path) -> Path:
    """A sweep of 2 values x 2 seeds, of which one run is not done."""
    elements = []
    for number, (lr, seed) in enumerate((lr, seed) for lr in ("1e-3", "2e-3") for seed in "01"):
        name = f"optim.lr={lr},seed={seed}"
        (folder / name / "submit").mkdir(parents=True)
        elements.append({"folder": name, "values": {"optim.lr": lr, "seed": seed}})
        if number < 3:
            figures = {"figures": {"psnr": 20 + number, "loss/a": float("nan"), "images": 10}, "images": 64}
            (folder / name / "finished").write_text(json.dumps(figures))
    folders.write_json(folder / folders.SWEEP, {"elements": elements})
    return folder


def squeue(folder: Path, *lines: str, code: int = 0, error: str = "", calls: Path | None = None) -> None:
    """Puts one into `folder`, which must come first on the PATH."""
    folder.mkdir(exist_ok=True)
    (folder / "said").write_text("".join(f"{line}\n" for line in lines))
    note = f'echo "$@" >> {calls}\n' if calls else ""
    (folder / "squeue").write_text(f"#!/bin/sh\n{note}cat {folder}/said\necho '{error}' >&2\nexit {code}\n")
    (folder / "squeue").chmod(0o755)


def at(seconds_ago: float) -> str:
    """As squeue writes a time."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(NOW() - seconds_ago))

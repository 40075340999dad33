"""`tandem submit`: a run as a job of a cluster, with its code, config and environment copied into its folder."""

import argparse
import contextlib
import dataclasses
import fcntl
import getpass
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch import cluster as clusters
from launch import snapshot
from launch.cluster import SlurmConfig
from launch.env import describe
from launch.slurm import Job, check_sbatch
from trainer import config as configuration
from trainer.config import Config
from trainer.parallel.config import DeepSpeedConfig

HELP = """\
Submit a run to SLURM: one task of srun a rank, started again after preemption, time limit and lost nodes.

The code as it lies in the checkout, the resolved config and the versions of the packages are copied into
RUN/submit: what is edited later changes nothing. Words that begin with cluster. are keys of the cluster's config.
"""
EXAMPLE = """\
examples:
  tandem submit configs/vaegan_fashion.yaml --cluster configs/cluster/slurm.yaml
  tandem submit configs/vaegan_fashion.yaml run=runs/b cluster.nodes=4 --cluster configs/cluster/slurm.yaml
  tandem submit configs/vaegan_fashion.yaml --cluster configs/cluster/slurm.yaml --dry-run
"""
CLUSTER = "cluster."  # begins an override that is the cluster's


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="tandem submit",
        description=HELP,
        epilog=EXAMPLE,
        usage="tandem submit CONFIG [key=value ...] --cluster FILE [--dry-run]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", type=Path, help="config of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="on top of it, as in tandem train")
    parser.add_argument(
        "--cluster", type=Path, required=True, metavar="FILE", help="such as configs/cluster/slurm.yaml"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the batch script and a rank's command, no more")
    options, more = parser.parse_known_intermixed_args(argv)
    words = [word.removeprefix("--") if "=" in word else word for word in (*options.overrides, *more)]
    config = configuration.load(options.config, [word for word in words if not word.startswith(CLUSTER)])
    cluster = clusters.load(options.cluster, [word.removeprefix(CLUSTER) for word in words if word.startswith(CLUSTER)])
    job = plan(config, cluster)
    if options.dry_run:
        print(preview(job))
        return 0
    number = submit(job, config, command=["tandem", "submit", *argv])
    size = f"{cluster.nodes} nodes x {cluster.ranks} ranks" if cluster.nodes > 1 else f"{cluster.ranks} ranks"
    print(f"job {number}: {size}, {config.run}; logs: {config.run}/logs/{number}_0.log; `scancel {number}` ends it")
    return 0


def plan(config: Config, cluster: SlurmConfig, *, folder: Path | None = None) -> Job:
    """The job of a run, its paths absolute. ValueError for what cannot work on so many ranks."""
    config.micro_batches(cluster.world)
    if config.parallel.processes not in (None, cluster.world):
        raise ValueError(
            f"parallel.processes: {config.parallel.processes} are asked for, the cluster's config gives {cluster.world}"
        )
    folder = (folder or Path.cwd()).resolve()
    run = Path(os.path.abspath(folder / config.run))  # noqa: PTH100  a link stays as it is called on all nodes
    if any(sign in "%\\'\"" or not sign.isprintable() for sign in str(run)):
        raise ValueError(f"run: SLURM cannot have logs in {str(run)!r}; no quotes, % and \\ in the name")
    return Job(cluster, run=run, folder=folder, lead=cluster.lead(save_seconds(run)))


def preview(job: Job) -> str:
    """What would be submitted: the batch script, and what each task of srun becomes."""
    rank = job.rank
    inside = job.cluster.container.python if job.cluster.container else job.cluster.python or sys.executable
    return f"{job.script()}\n# each rank then becomes, in {rank.folder}:\n# {shlex.join(rank.command(inside))}"


def submit(job: Job, config: Config, *, command: list[str], root: Path = snapshot.ROOT) -> str:
    """Copies code, config and environment into RUN/submit and gives the job to SLURM; returns its id.

    ValueError, and a folder that is as it was, where the run is on its way or done, or SLURM refuses."""
    check_sbatch()
    made = [folder for folder in (job.run, *job.run.parents) if not folder.exists()]
    job.run.mkdir(parents=True, exist_ok=True)
    try:
        with alone(job.run):
            check_free(job.run, config)
            before = set_aside(job.submit)
            try:
                job.submit.mkdir()
                (job.submit / "config.yaml").write_text(
                    configuration.to_text(with_copies(config, job)), encoding="utf-8"
                )
                (job.submit / "cluster.yaml").write_text(clusters.to_text(job.cluster), encoding="utf-8")
                taken = snapshot.take(job.code, root=root)
                _write_json(job.submit / "environment.json", describe())
                number = job.send()
            except BaseException:
                shutil.rmtree(job.submit, ignore_errors=True)
                if before is not None:
                    before.rename(job.submit)
                with contextlib.suppress(OSError):  # there is none, or it holds an earlier job's
                    (job.run / "logs").rmdir()
                raise
            about = {
                "job": number,
                "command": command,
                "folder": str(job.folder),
                "time": time.time(),
                "user": getpass.getuser(),
                "host": socket.gethostname(),
                "commit": taken.commit,
                "changed": list(taken.changed),
                "python": sys.executable,
                **clusters.described(job.cluster),
            }
            _write_json(job.submit / "job.json", about)
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):  # it holds something by now
                (folder / ".submitting").unlink(missing_ok=True)
                folder.rmdir()
        raise
    return number


def with_copies(config: Config, job: Job) -> Config:
    """The config as the job reads it: its folder absolute, the user's DeepSpeed file beside it."""
    config = dataclasses.replace(config, run=job.run)
    if not isinstance(config.parallel, DeepSpeedConfig) or config.parallel.file is None:
        return config
    source, copy = job.folder / config.parallel.file, job.submit / "deepspeed.json"
    if not source.is_file():
        raise ValueError(f"parallel.file: {config.parallel.file}: no such file")
    shutil.copyfile(source, copy)
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, file=copy))


# ---------------------------------------------------------------- what is in the folder already
def check_free(run: Path, config: Config) -> None:
    """ValueError where another job has the folder, or nothing is left to do."""
    about = _read_json(run / "submit" / "job.json")
    number = str(about.get("job", ""))
    if number and (state := state_of(number)):
        raise ValueError(f"run: {run} is job {number}, {state}; end it (scancel {number}), or take another folder")
    if (run / "failed").exists():
        why = (run / "failed").read_text(encoding="utf-8", errors="replace").strip().partition("\n")[0]
        raise ValueError(f"run: {run} is marked as failed ({why}); remove {run / 'failed'} once that is mended")
    checkpoints = run / "checkpoints"
    saved = [int(path.name) for path in checkpoints.iterdir() if path.name.isdigit()] if checkpoints.is_dir() else []
    if saved and max(saved) >= config.images and config.checkpoint.resume in ("auto", "must"):
        raise ValueError(
            f"run: {run} is finished, at {max(saved):,} of {config.images:,} images; raise `images` to go on, or take "
            "another folder"
        )


def state_of(job: str) -> str:
    """SLURM's word for a job that waits or runs, in lower case; "" for one that is over. ValueError where SLURM does
    not answer: a second job in the folder would be worse than none."""
    ran = subprocess.run(
        ["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True, timeout=120, check=False
    )
    if ran.returncode and "Invalid job id" not in ran.stderr:
        raise ValueError(f"squeue: {' '.join(ran.stderr.split())}")
    return ", ".join(sorted(set(ran.stdout.split()))).lower()


def save_seconds(run: Path) -> float | None:
    """How long the run's last save took, where it was measured."""
    found = _read_json(run / "heartbeats" / "rank00000.json").get("save_seconds")
    return float(found) if isinstance(found, (int, float)) else None


def set_aside(submit: Path) -> Path | None:
    """Renames what an earlier submission left, by its job; what one left that was broken off is removed."""
    if not submit.exists():
        return None
    number = _read_json(submit / "job.json").get("job")
    if number is None:
        shutil.rmtree(submit)
        return None
    return submit.rename(submit.with_name(f"submit.{number}"))


@contextlib.contextmanager
def alone(run: Path) -> Iterator[None]:
    """ValueError where another `tandem submit` is at work on the run."""
    path = run / ".submitting"
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"run: another `tandem submit` is at work on {run}") from error
        yield


def _read_json(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return {}


def _write_json(path: Path, value: object) -> None:
    aside = path.with_name(f".{path.name}")
    aside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)

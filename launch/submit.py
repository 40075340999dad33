"""`tandem submit`: a run as a job of a cluster, with its code, config and environment copied into its folder."""

import argparse
import contextlib
import dataclasses
import fcntl
import getpass
import os
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from launch import cluster as clusters
from launch import folders, snapshot, state
from launch.cluster import ClusterConfig, LocalConfig
from launch.env import describe
from launch.here import LocalJob
from launch.slurm import Job
from trainer import config as configuration
from trainer.config import Config
from trainer.parallel.config import DeepSpeedConfig

HELP = """\
Submit a run to SLURM: one task of srun a rank, started again after preemption, time limit and lost nodes. Or, with
--cluster local, train it on this machine in processes that outlive the terminal.

The code as it lies in the checkout, the resolved config and the versions of the packages are copied into
RUN/submit: what is edited later changes nothing. Words that begin with cluster. are keys of the cluster's config.
"""
EXAMPLE = """\
examples:
  tandem submit configs/vaegan_fashion.yaml --cluster configs/cluster/slurm.yaml
  tandem submit configs/vaegan_fashion.yaml run=runs/b cluster.nodes=4 --cluster configs/cluster/slurm.yaml
  tandem submit configs/vaegan_fashion.yaml --cluster configs/cluster/slurm.yaml --dry-run
  tandem submit configs/vae_fashion.yaml --cluster local
"""
CLUSTER = "cluster."  # begins an override that is the cluster's
AnyJob: TypeAlias = Job | LocalJob


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
        "--cluster", type=Path, required=True, metavar="FILE", help="such as configs/cluster/slurm.yaml; or: local"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the batch script and a rank's command, no more")
    options, more = parser.parse_known_intermixed_args(argv)
    words, own = sorted_words([*options.overrides, *more])
    config = configuration.load(options.config, words)
    job = plan(config, clusters.load(options.cluster, own))
    if options.dry_run:
        print(preview(job))
        return 0
    number = submit(job, config, command=["tandem", "submit", *argv])
    print(told(job, number, config.run))
    return 0


def sorted_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides of the run, and of the cluster, of what stands on a command line."""
    plain = [word.removeprefix("--") if "=" in word else word for word in words]
    own = [word.removeprefix(CLUSTER) for word in plain if word.startswith(CLUSTER)]
    return [word for word in plain if not word.startswith(CLUSTER)], own


def told(job: AnyJob, number: str, run: Path) -> str:
    """The line that ends a submission."""
    name = shlex.quote(str(run))
    end = f"`tandem logs -f {name}` follows it, `tandem cancel {name}` ends it"
    if isinstance(job, LocalJob):
        return f"job {number}: {_ranks(job.processes)} on this machine, {run}; {end}"
    cluster = job.cluster
    size = f"{cluster.nodes} nodes x " * (cluster.nodes > 1) + _ranks(cluster.ranks)
    return f"job {number}: {size}, {run}; {end}"


def _ranks(count: int) -> str:
    return f"{count} rank" + "s" * (count != 1)


def plan(config: Config, cluster: ClusterConfig, *, folder: Path | None = None) -> AnyJob:
    """The job of a run, its paths absolute. ValueError for what cannot work on so many ranks."""
    folder = (folder or Path.cwd()).resolve()
    run = Path(os.path.abspath(folder / config.run))  # noqa: PTH100  a link stays as it is called on all nodes
    if any(sign in "%\\'\"" or not sign.isprintable() for sign in str(run)):
        raise ValueError(f"run: SLURM cannot have logs in {str(run)!r}; no quotes, % and \\ in the name")
    job: AnyJob
    if isinstance(cluster, LocalConfig):
        job = LocalJob(cluster, run=run, folder=folder)
        check_world(config, job.processes)
    else:
        check_world(config, cluster.world)
        job = Job(cluster, run=run, folder=folder, lead=cluster.lead(save_seconds(run)))
    return job


def check_world(config: Config, world: int) -> None:
    config.micro_batches(world)
    if config.parallel.processes not in (None, world):
        raise ValueError(
            f"parallel.processes: {config.parallel.processes} are asked for, the cluster's config gives {world}"
        )


def preview(job: AnyJob) -> str:
    """What would be submitted: the batch script, and what each task of srun becomes."""
    if isinstance(job, LocalJob):
        return job.script()
    rank = job.rank_of((job.elements or (job.run,))[0])
    inside = job.cluster.container.python if job.cluster.container else job.cluster.python or sys.executable
    return f"{job.script()}\n# each rank then becomes, in {rank.folder}:\n# {shlex.join(rank.command(inside))}"


def submit(
    job: AnyJob,
    config: Config,
    *,
    command: list[str],
    root: Path = snapshot.ROOT,
    again: bool = False,
) -> str:
    """Copies code, config and environment into RUN/submit and gives the job to SLURM; returns its id.

    again: the code of the submission before, instead of that in `root`. ValueError, and a folder that is as it was,
    where the run is on its way, or SLURM refuses."""
    job.check()
    made = [folder for folder in (job.run, *job.run.parents) if not folder.exists()]
    job.run.mkdir(parents=True, exist_ok=True)
    try:
        with alone(job.run):
            check_free(job.run, config)
            earlier = folders.read_json(job.submit / "job.json")
            before = set_aside(job.submit)
            try:
                job.submit.mkdir()
                copied = with_copies(config, job, before)
                (job.submit / "config.yaml").write_text(configuration.to_text(copied), encoding="utf-8")
                (job.submit / "cluster.yaml").write_text(clusters.to_text(job.cluster), encoding="utf-8")
                if again:
                    assert before is not None
                    code = Path(earlier.get("code", "code"))  # of a sweep: its own for all runs, elsewhere
                    shutil.copytree(before / code, job.code)
                    taken = snapshot.Snapshot(earlier.get("commit"), tuple(earlier.get("changed", ())))
                else:
                    taken = snapshot.take(job.code, root=root)
                folders.write_json(job.submit / "environment.json", describe())
                sent = job.send()
            except BaseException:
                shutil.rmtree(job.submit, ignore_errors=True)
                if before is not None:
                    before.rename(job.submit)
                with contextlib.suppress(OSError):  # there is none, or it holds an earlier job's
                    (job.run / "logs").rmdir()
                raise
            about = {
                **sent,
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
            folders.write_json(job.submit / "job.json", about)
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):  # it holds something by now
                (folder / ".submitting").unlink(missing_ok=True)
                folder.rmdir()
        raise
    return str(sent["job"])


def with_copies(config: Config, job: AnyJob, before: Path | None = None) -> Config:
    """The config as the job reads it: its folder absolute, the user's DeepSpeed file beside it.

    before: where what lay in RUN/submit is now."""
    config = dataclasses.replace(config, run=job.run)
    if not isinstance(config.parallel, DeepSpeedConfig) or config.parallel.file is None:
        return config
    source, copy = job.folder / config.parallel.file, job.submit / "deepspeed.json"
    if source == copy and before is not None:
        source = before / copy.name
    if not source.is_file():
        raise ValueError(f"parallel.file: {config.parallel.file}: no such file")
    shutil.copyfile(source, copy)
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, file=copy))


# ---------------------------------------------------------------- what is in the folder already
def check_free(run: Path, config: Config) -> None:
    """ValueError where another job has the folder, or nothing is left to do."""
    check_idle([run])
    checkpoints = run / "checkpoints"
    saved = [int(path.name) for path in checkpoints.iterdir() if path.name.isdigit()] if checkpoints.is_dir() else []
    if saved and max(saved) >= config.images and config.checkpoint.resume in ("auto", "must"):
        raise ValueError(
            f"run: {run} is finished, at {max(saved):,} of {config.images:,} images; raise `images` to go on, or take "
            "another folder"
        )


def check_idle(runs: Sequence[Path]) -> None:
    """ValueError where a job or a process has one of the folders, or it is marked as failed."""
    found, notes = state.look(run for run in runs if folders.is_run(run))
    if notes:  # a second job in the folder would be worse than none
        raise ValueError(notes[0].partition(";")[0])
    for now in found:
        if now.active or now.state == "unknown":
            if now.kind == "train":
                raise ValueError(
                    f"run: {now.run} is trained already, {now.state}; end it there, or take another folder"
                )
            how = f"end it (tandem cancel {shlex.quote(str(now.run))})"
            raise ValueError(f"run: {now.run} is job {now.job}, {now.state}; {how}, or take another folder")
    for run in runs:
        if (why := folders.first_line(run / "failed")) is not None:
            raise ValueError(f"run: {run} is marked as failed ({why}); remove {run / 'failed'} once that is mended")


def save_seconds(run: Path) -> float | None:
    """How long the run's last save took, where it was measured."""
    found = folders.read_json(run / "heartbeats" / "rank00000.json").get("save_seconds")
    return float(found) if isinstance(found, (int, float)) else None


def set_aside(submit: Path) -> Path | None:
    """Renames what an earlier submission left, by its job; what one left that was broken off is removed."""
    if not submit.exists():
        return None
    number = folders.read_json(submit / "job.json").get("job")
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

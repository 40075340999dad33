"""From a cluster's config to a batch script of SLURM, and its submission, both by submitit."""

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.cluster import SlurmConfig
from launch.rank import Rank

HIDDEN = ("SLURM_CONF", "SLURM_CLUSTERS")  # of SLURM's variables those that say which cluster, not which job


@dataclass(frozen=True)
class Job:
    """A run as SLURM is to start it, or all of a sweep as an array. All paths are absolute."""

    cluster: SlurmConfig
    run: Path
    """Folder of the run, or of the sweep."""
    folder: Path
    """Where it is submitted."""
    lead: int
    """Seconds from the warning to the time limit."""
    elements: tuple[Path, ...] = ()
    """Runs of a sweep, in their order: element i of the array is the i-th."""
    at_once: int | None = None
    """Elements that run at the same time; None: as many as SLURM lets."""
    into: str = "submit"
    """Folder in the run's that holds what is submitted."""

    @property
    def submit(self) -> Path:
        return self.run / self.into

    @property
    def code(self) -> Path:
        return self.submit / "code"

    @property
    def rank(self) -> Rank:
        return self.rank_of(self.run)

    def rank_of(self, run: Path) -> Rank:
        cluster = self.cluster
        return Rank(
            config=str(run / "submit" / "config.yaml"),
            code=str(self.code),
            folder=str(self.folder),
            nodes=cluster.nodes,
            ranks=cluster.ranks,
            gpus=cluster.gpus_per_node,
            cpus=cluster.cpus_per_rank,
            keep=tuple(cluster.environment),
        )

    @property
    def logs(self) -> Path:
        """As SLURM's pattern, in which %a is the number of an element: links lead to the folders of its run."""
        return self.submit / "logs" / "%a" if self.elements else self.run / "logs"

    @property
    def log(self) -> Path:
        """SLURM's pattern of what a rank prints; %j is the job, %t the rank."""
        return self.logs / "%j_%t.log"

    # ------------------------------------------------------------------ the batch script
    def parameters(self) -> dict[str, Any]:
        """For submitit's SlurmExecutor."""
        cluster = self.cluster
        given = {
            "job_name": cluster.name or f"tandem-{self.run.name}",
            "time": cluster.minutes,
            "nodes": cluster.nodes,
            "ntasks_per_node": cluster.ranks,
            "cpus_per_task": cluster.cpus_per_rank,
            "gpus_per_node": _gpus(cluster),
            "mem": cluster.memory,
            "partition": cluster.partition,
            "account": cluster.account,
            "qos": cluster.qos,
            "constraint": cluster.constraint,
            "exclude": cluster.exclude,
            "mail_user": cluster.mail.address if cluster.mail else None,
            "mail_type": ",".join(cluster.mail.events) if cluster.mail else None,
        }
        own: dict[str, Any] = {"requeue": True, "output": str(self.logs / "%j.log")}
        if cluster.reservation is not None:
            own["reservation"] = cluster.reservation
        if self.elements:
            given["array_parallelism"] = self.at_once or len(self.elements)
        return {
            **{name: value for name, value in given.items() if value is not None},
            "signal_delay_s": self.lead,
            "stderr_to_stdout": True,
            "additional_parameters": {**own, **cluster.sbatch},
            "srun_args": self.srun_arguments(),
            "setup": self.setup(),
            "teardown": self.teardown(),
        }

    def srun_arguments(self) -> list[str]:
        # since 22.05 srun does not take --cpus-per-task from sbatch; of two --output it takes the later
        own = ["--kill-on-bad-exit=1", f"--cpus-per-task={self.cluster.cpus_per_rank}", f"--output={self.log}"]
        return [*own, *self.cluster.srun]

    def setup(self) -> list[str]:
        """Lines before srun: what an earlier start left, the user's own, and the code of the snapshot."""
        run = [f"tandem_run={_quoted(self.run)}"]
        if self.elements:
            many = ["tandem_runs=(", *map(_quoted, self.elements), ")"]
            run = [*many, 'tandem_run="${tandem_runs[$SLURM_ARRAY_TASK_ID]}"']
        lines = [
            *run,
            'tandem_told= tandem_log="$tandem_run/logs/$SLURM_JOB_ID.log"',
            "trap 'tandem_told=TERM' TERM",  # so that srun's end is waited for, and the last lines run
            'rm -f "$tandem_run/requeue"',
            'tandem_since=$(stat -c %s "$tandem_log" 2>/dev/null || echo 0)',
            *self.cluster.setup,
            "set +eu",  # the user's lines may have set it, and the end of srun is no end of the script
            f"cd {_quoted(self.code)}",
            f"export PYTHONPATH={_quoted(self.code)}${{PYTHONPATH:+:$PYTHONPATH}}",
        ]
        return [
            *lines,
            *(f"export {name}={shlex.quote(str(value))}" for name, value in self.cluster.environment.items()),
        ]

    def teardown(self) -> list[str]:
        cluster = self.cluster
        words = ["-m", "launch.after", f"--requeues={cluster.requeues}", f"--lead={self.lead}"]
        if cluster.time_limits is not None:
            words.append(f"--time-limits={cluster.time_limits}")
        python = shlex.quote(sys.executable if cluster.container or not cluster.python else cluster.python)
        return [
            "tandem_code=$?",
            f"cd {_quoted(self.code)}",
            f'{python} {shlex.join(words)} --told="$tandem_told" --since="$tandem_since" --log="$tandem_log" '
            '"$tandem_run" "$tandem_code"',
            "exit $?",
        ]

    @property
    def python(self) -> str:
        """What begins a rank's command, as words of a shell."""
        box = self.cluster.container
        if box is None:
            return shlex.quote(self.cluster.python or sys.executable)
        binds = [str(self.folder), str(self.run), *box.binds]
        words = [box.program, "exec", *(["--nv"] if self.cluster.gpus_per_node else [])]
        words += [word for bind in binds for word in ("--bind", bind)]
        return shlex.join([*words, "--pwd", str(self.code), *box.arguments, box.image, box.python])

    def script(self) -> str:
        """The batch script, without SLURM and without writing anything."""
        submitit = _submitit()
        make = submitit.slurm.slurm._make_sbatch_string
        command = f"{self.python} -u -m submitit.core._submit {shlex.quote(str(self.pickles))}"
        count = {"map_count": len(self.elements)} if self.elements else {}
        return str(make(command=command, folder=str(self.pickles), **count, **self.parameters()))

    # ------------------------------------------------------------------ submission
    @property
    def pickles(self) -> Path:
        """submitit's folder."""
        return self.submit / "submitit"

    def check(self) -> None:
        """ValueError where there is no SLURM, or it takes no array of so many."""
        check_sbatch()
        if self.elements and (most := most_elements()) is not None and len(self.elements) > most:
            raise ValueError(
                f"{len(self.elements):,} elements: SLURM takes arrays of at most {most:,} here (MaxArraySize); "
                "fewer values or seeds, or several sweeps"
            )

    def send(self) -> dict[str, Any]:
        """For job.json: SLURM's id of the job, of an array that of the whole. ValueError with SLURM's reason where it
        refuses."""
        submitit = _submitit()
        executor = submitit.SlurmExecutor(self.pickles, python=self.python)
        executor.update_parameters(**self.parameters())
        for number, run in enumerate(self.elements or (self.run,)):
            (run / "logs").mkdir(exist_ok=True)
            if self.elements:
                (self.submit / "logs").mkdir(exist_ok=True)
                (self.submit / "logs" / str(number)).symlink_to(os.path.relpath(run / "logs", self.submit / "logs"))
        with outside_a_job(), contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it raises
            try:
                if not self.elements:
                    return {"kind": "slurm", "job": str(executor.submit(self.rank).job_id)}
                jobs = executor.submit_array([self.rank_of(run) for run in self.elements])
                return {"kind": "slurm", "job": str(jobs[0].job_id).partition("_")[0]}
            except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
                raise ValueError(f"sbatch: {reason(str(error))}") from None


def check_sbatch() -> None:
    """ValueError where there is no SLURM."""
    missing = [name for name in ("sbatch", "srun") if shutil.which(name) is None]
    if missing:
        raise ValueError(
            f"{' and '.join(missing)}: not found; submit where the cluster's SLURM is installed, or look at it with "
            "--dry-run"
        )


def most_elements() -> int | None:
    """Elements that an array may have; None where SLURM does not say."""
    try:
        ran = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, timeout=60, check=False)
    except (subprocess.TimeoutExpired, FileNotFoundError):
        return None
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", ran.stdout, re.MULTILINE)
    return int(found[1]) if found else None  # indices are below it, and begin at 0


def reason(said: str) -> str:
    """SLURM's reason, of what sbatch printed."""
    words = [line.removeprefix("sbatch: ").removeprefix("error: ").strip() for line in said.splitlines()]
    said_so = [line for line in words if "Batch job submission failed" in line]
    useful = said_so or [line for line in words if line]
    return "; ".join(line.removeprefix("Batch job submission failed: ") for line in useful) or "refused without a word"


@contextlib.contextmanager
def outside_a_job() -> Iterator[None]:
    """While inside, the variables of a job in which we may be are hidden, and SBATCH_*, which sbatch would take for
    options above those of the script."""
    prefixes = ("SBATCH_", *(("SLURM_", "SLURMD_") if "SLURM_JOB_ID" in os.environ else ()))
    hidden = {k: v for k, v in os.environ.items() if k.startswith(prefixes) and k not in HIDDEN}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


def _gpus(cluster: SlurmConfig) -> str | int | None:
    if cluster.gpu is not None:
        return f"{cluster.gpu}:{cluster.gpus_per_node}"
    return cluster.gpus_per_node or None


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _submitit() -> Any:
    try:
        import submitit
        import submitit.slurm.slurm
    except ModuleNotFoundError as error:
        raise ValueError("submitit: not installed; `pip install 'tandem[slurm]'`, or `make setup`") from error
    return submitit

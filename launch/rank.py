"""A rank of a SLURM job: what submitit calls in each task of srun. It looks at the world that came up and becomes the
trainer, so that nothing stands between SLURM's signals and the run. Standard library only: every rank imports it."""

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from trainer import signals
from trainer.errors import USER_MISTAKE, leave, to_stderr

MODULE = "import runpy, sys; sys.path[0] = sys.argv.pop(1); runpy.run_module('trainer', None, '__main__', True)"
"""`python -m trainer` of the folder in the first argument: -m would look into the current one first."""
STRAY = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT",
    "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE", "TANDEM_STORE_FD", "TANDEM_LAUNCHER", "TANDEM_FAILURES",
    "TANDEM_GPUS",
)  # fmt: skip
"""What another launcher may have left in the shell that submitted: a rank would take itself for one of its own."""


@dataclass(frozen=True)
class Rank:
    """Called once in every task; does not return."""

    config: str
    """The resolved config of the run."""
    code: str
    """The snapshot."""
    folder: str
    """Where the job was submitted: relative paths of the config begin there."""
    nodes: int
    """Nodes, ranks a node and GPUs a node that were asked for."""
    ranks: int
    gpus: int
    cpus: int
    """Cores of a rank."""
    keep: tuple[str, ...] = ()
    """Variables that the cluster's config sets, so they are no strays."""

    def __call__(self) -> NoReturn:
        variables = os.environ
        say(
            f"job {job(variables)}, start {int(variables.get('SLURM_RESTART_COUNT', '0')) + 1}, rank "
            f"{variables.get('SLURM_PROCID')} of {variables.get('SLURM_STEP_NUM_TASKS')} on {node(variables)}, "
            f"{time.strftime('%Y-%m-%d %H:%M:%S')}"
        )
        fault = self.fault(variables)
        if fault is not None:
            to_stderr(f"tandem: error: {fault}")
            leave(USER_MISTAKE)
        signals.hold()  # submitit's handlers end here, the trainer's begin behind Python's start
        os.chdir(self.folder)
        sys.stdout.flush()
        os.execve(sys.executable, self.command(sys.executable), self.environment(variables))

    def command(self, python: str) -> list[str]:
        return [python, "-c", MODULE, self.code, self.config]

    def environment(self, variables: Mapping[str, str]) -> dict[str, str]:
        """Of the trainer. SLURM's own variables stay: it takes rank, world and where to meet from them."""
        kept = {name: value for name, value in variables.items() if name not in STRAY or name in self.keep}
        threads = {"OMP_NUM_THREADS": str(self.cpus), "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
        if self.gpus:
            kept["TANDEM_GPUS"] = str(self.gpus)  # torch looks whether it finds them
        given = kept.get("PYTHONPATH", "").split(os.pathsep)
        paths = [self.code, *(path for path in given if path not in ("", self.code))]
        return {**threads, **kept, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}

    def fault(self, variables: Mapping[str, str]) -> str | None:
        """What came up and was not asked for, on one line."""
        asked = {"SLURM_STEP_NUM_NODES": self.nodes, "SLURM_STEP_NUM_TASKS": self.nodes * self.ranks}
        for name, number in asked.items():
            if variables.get(name) != str(number):
                what = "nodes" if name.endswith("NODES") else "ranks"
                return (
                    f"{self.nodes} nodes x {self.ranks} ranks were asked for, {variables.get(name, 'no')} {what} came "
                    f"up ({name}); look at `sbatch` and `srun` in the cluster's config"
                )
        visible = [name for name in variables.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
        if self.gpus and len(visible) != self.gpus:
            return (
                f"{self.gpus} GPUs a node were asked for, all of them for each rank to see; {node(variables)} shows "
                f"{len(visible)} (CUDA_VISIBLE_DEVICES={variables.get('CUDA_VISIBLE_DEVICES', '')})"
            )
        return None


def job(variables: Mapping[str, str]) -> str:
    """SLURM's name of the job: 12, or 12_3 of an array."""
    array, element = variables.get("SLURM_ARRAY_JOB_ID"), variables.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{element}" if array and element else variables.get("SLURM_JOB_ID", "?")


def node(variables: Mapping[str, str]) -> str:
    return variables.get("SLURMD_NODENAME", "?")


def say(text: str) -> None:
    print(f"tandem: {text}", flush=True)

"""What the launcher was asked for, so that a world that came up smaller is refused instead of training quietly.

The backend that it asks for is resolve.py's. accelerate 1.15 starts one process for `accelerate launch --cpu
--num_processes 2`, for MULTI_CPU config files, and one a machine for `--num_machines 2 --cpu`, each time without a
word.
"""

import os
import re
from pathlib import Path

import yaml


def number(name: str, *, least: int = 0, most: int = 2**31 - 1) -> int:
    """An environment variable as a number. ValueError with its name where it is none, or out of bounds."""
    text = os.environ[name]
    if not text.isascii() or not text.isdecimal() or not least <= int(text) <= most:
        raise ValueError(f"{name}: {text!r} is no number from {least} to {most}; it is set by whoever starts the ranks")
    return int(text)


def asked_processes() -> tuple[int, str] | None:
    """(processes, by whom) as the launcher was told, or None where nobody said."""
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        return number("WORLD_SIZE", least=1), "WORLD_SIZE"
    accelerate = _accelerate_parent(_command_line(os.getppid()))
    if accelerate is not None:
        return accelerate
    tasks = number("SLURM_STEP_NUM_TASKS", least=1) if "SLURM_STEP_NUM_TASKS" in os.environ else 1
    return (tasks, "srun (SLURM_STEP_NUM_TASKS)") if tasks > 1 else None


def check_gpus(found: int) -> None:
    """ValueError where torch finds another number of GPUs than `tandem submit` asked for: a run of eight GPUs would
    train on a CPU for its whole time limit where a node's driver is gone, or torch is built for CPUs."""
    if "TANDEM_GPUS" in os.environ and (asked := number("TANDEM_GPUS")) != found:
        node = os.environ.get("SLURMD_NODENAME", "this one")
        raise ValueError(
            f"{asked} GPUs a node were asked for, torch finds {found} on {node}; see `tandem env` there: a "
            "driver that does not answer, or torch built for CPUs"
        )


def take_srun() -> None:
    """Under `srun python -m trainer` SLURM's variables become torch's, as torchrun would set them."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in os.environ or tasks == "1" or _accelerate_parent(_command_line(os.getppid())) is not None:
        return
    needed = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE", "SLURM_JOB_ID")
    missing = [name for name in needed if name not in os.environ]
    if missing:
        raise ValueError(
            f"{', '.join(missing)}: not set, but SLURM_STEP_NUM_TASKS is {tasks}; start with `srun python -m trainer "
            "CONFIG`, or unset SLURM_STEP_NUM_TASKS for a process of its own"
        )
    found = {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": _tasks_here(os.environ["SLURM_STEP_TASKS_PER_NODE"]),
    }
    os.environ.update(found)
    os.environ.setdefault("MASTER_ADDR", _first_host(os.environ["SLURM_STEP_NODELIST"]))
    os.environ.setdefault("MASTER_PORT", str(start_port()))


def start_port() -> int | None:
    """The port of this start of a job of SLURM, None outside of one."""
    if "SLURM_JOB_ID" not in os.environ:
        return None
    step, restart = (os.environ.get(name, "0") for name in ("SLURM_STEP_ID", "SLURM_RESTART_COUNT"))
    return _port(number("SLURM_JOB_ID"), *(int(text) if text.isdigit() else 0 for text in (step, restart)))


def _port(job: int, step: int, restart: int) -> int:
    """Below the ports that Linux gives out (32768 on); another for each start of a job, should one still be held."""
    return 20_000 + (7 * job + 1_009 * step + restart) % 12_000


def _first_host(listed: str) -> str:
    """`gpu[03-05,09],login1` -> gpu03"""
    name, bracket, rest = re.split(r",(?![^\[]*\])", listed)[0].partition("[")
    first = re.split(r"[-,\]]", rest)[0] if bracket else ""
    return f"{name}{first}{rest.partition(']')[2]}"


def _tasks_here(listed: str) -> str:
    """`2(x3),1` -> 2 on the first three machines, 1 on the fourth."""
    counts: list[str] = []
    for part in listed.split(","):
        count, _, times = part.partition("(x")
        counts += [count] * int(times.rstrip(")") or 1)
    return counts[min(int(os.environ.get("SLURM_NODEID", "0")), len(counts) - 1)]


def _command_line(pid: int) -> list[str]:
    path = Path(f"/proc/{pid}/cmdline")
    return path.read_bytes().decode(errors="replace").split("\0")[:-1] if path.exists() else []


def _accelerate_parent(argv: list[str]) -> tuple[int, str] | None:
    names = [Path(word).name for word in argv]
    if "launch" not in names or not any(name in ("accelerate", "accelerate.commands.accelerate_cli") for name in names):
        start = next((i for i, word in enumerate(argv) if word == "accelerate.commands.launch"), None)
        if start is None:
            return None
    else:
        start = names.index("launch")
    from accelerate.commands.launch import launch_command_parser

    args, _ = launch_command_parser().parse_known_args(argv[start + 1 :])
    if args.num_processes is not None:
        return int(args.num_processes), "accelerate launch --num_processes"
    from accelerate.commands.config.config_args import default_config_file

    path = Path(args.config_file or default_config_file)
    if path.is_file():
        found = yaml.safe_load(path.read_text())
        if isinstance(found, dict) and isinstance(found.get("num_processes"), int):
            return found["num_processes"], f"num_processes in {path}"
    return None

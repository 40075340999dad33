"""What the launcher was asked for, so that a world that came up smaller is refused instead of training quietly.

accelerate 1.15 starts one process for `accelerate launch --cpu --num_processes 2`, for MULTI_CPU config files, and
one a machine for `--num_machines 2 --cpu`, each time without a word.
"""

import os
from pathlib import Path

import yaml


def asked_processes() -> tuple[int, str] | None:
    """(processes, by whom) as the launcher was told, or None where nobody said."""
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        return int(os.environ["WORLD_SIZE"]), "WORLD_SIZE"
    accelerate = _accelerate_parent(_command_line(os.getppid()))
    if accelerate is not None:
        return accelerate
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    return (tasks, "srun (SLURM_STEP_NUM_TASKS)") if tasks > 1 else None


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

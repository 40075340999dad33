"""`tandem cancel`: ends runs that wait or run, and says what is left of them."""

import argparse
import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch import folders, process, state
from launch.state import Status
from trainer.errors import shown, to_stderr

HELP = """\
End runs that were submitted, of a sweep all that are not over, wait until they are, and say what was saved.

SLURM tells the ranks by TERM and kills them after its KillWait (30 s as shipped): they save where
`checkpoint.notice` of the config allows that. Runs of `--cluster local` save, however long that takes; cancelled
again they end at once.
"""
EXAMPLE = """\
examples:
  tandem cancel runs/vaegan_fashion
  tandem cancel runs/lr_sweep runs/b --wait 0
"""
LOOK = 1.0  # seconds between questions


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="tandem cancel",
        description=HELP,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run or of a sweep")
    parser.add_argument("--wait", type=float, default=120.0, metavar="SECONDS", help="for the end (default: 120)")
    options = parser.parse_args(argv)
    runs = folders.chosen(options.runs)
    found, notes = state.look(runs)
    for note in notes:
        raise ValueError(note)
    active = [one for one in found if one.active and one.kind != "train"]
    for one in found:
        if one not in active:
            print(shown(f"{one.run}: {_left_alone(one)}"))
    cancel(active)
    return report(active, seconds=options.wait)


def cancel(runs: Sequence[Status]) -> None:
    """Tells all of them. ValueError with SLURM's reason where it refuses."""
    jobs = [one.job for one in runs if one.kind == "slurm" and one.job is not None]
    for one in runs:
        if one.kind == "slurm" and one.job is not None and not is_of(one.job, one.run):
            raise ValueError(f"{one.run}: job {one.job} is another's now: it does not write into the run's folder")
    if jobs:
        try:
            ran = subprocess.run(["scancel", *jobs], capture_output=True, text=True, timeout=120, check=False)
        except FileNotFoundError as error:
            raise ValueError("scancel: not found; cancel where the cluster's SLURM is installed") from error
        except subprocess.TimeoutExpired as error:
            raise ValueError("scancel: SLURM does not answer; look with tandem status, and try again") from error
        if ran.returncode:
            raise ValueError(f"scancel: {' '.join(ran.stderr.split())}")
    for one in runs:
        if one.kind == "local":
            cancel_local(one.run, folders.read_json(one.run / "submit" / "job.json"))


def is_of(job: str, run: Path) -> bool:
    """Whether SLURM's job of this number prints into the folder of the run, or of its sweep: a cluster whose state was
    lost, or another one, gives the numbers out again."""
    command = ["scontrol", "show", "job", "-o", job]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return True  # what scancel says then is said
    prints = re.findall(r"\bStdOut=(.*?)(?= \w+=|$)", ran.stdout, re.MULTILINE)
    ours = [run, *([run.parent] if folders.is_sweep(run.parent) else [])]
    places = {str(place) for folder in ours for place in (folder.absolute(), folder.resolve())}
    return not prints or any(one.startswith(f"{place}/") for one in prints for place in places)


def cancel_local(run: Path, about: dict[str, Any]) -> None:
    """Leaves a word for the process that watches over the run (launch/here.py); where that is gone, tells the run."""
    mark = run / "submit" / "cancel"
    mark.write_text("at once\n" if mark.exists() else "save\n", encoding="utf-8")
    child = folders.read_json(run / "submit" / "process.json")
    if not process.alive(about.get("process", {})) and process.alive(child):
        os.kill(int(child["pid"]), signal.SIGINT)


def report(runs: Sequence[Status], *, seconds: float) -> int:
    """Waits for the end of all of them, and says what there is of each. 0; 1 where one is not over in time."""
    limit = time.monotonic() + seconds
    waiting = {one.run: one for one in runs}
    while waiting:
        now, notes = state.look(waiting)
        for one in now:
            if not one.active and not notes:
                before = waiting.pop(one.run)
                print(shown(f"{one.run}: {one.state}; {saved(before, one)}"), flush=True)
        if not waiting or time.monotonic() > limit:
            break
        time.sleep(min(LOOK, max(0.0, limit - time.monotonic())))
    for run, one in waiting.items():
        again = "; `tandem cancel` again ends it at once" if one.kind == "local" else ""
        to_stderr(shown(f"tandem: {run}: told, but not over after {seconds:g} s{again}"))
    return 1 if waiting else 0


def saved(before: Status, after: Status) -> str:
    """What a run that was ended goes on from."""
    if after.saved is None:
        return "nothing was saved"
    of = f" of {after.total:,}" if after.total else ""
    if before.saved != after.saved:
        return f"saved at {after.saved:,}{of} images; `tandem resubmit {folders.quoted(after.run)}` goes on from there"
    lost = f", {before.images - after.saved:,} images back" if before.images > after.saved else ""
    return f"the last checkpoint is at {after.saved:,}{of} images{lost}"


def _left_alone(one: Status) -> str:
    if one.kind == "train":
        return (
            "was not submitted; Ctrl-C where it was started, or kill its process" if one.active else "was not submitted"
        )
    return f"is over already: {one.state}"

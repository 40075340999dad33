"""The end of a start of a SLURM job: `python -m launch.after RUN CODE [options]`, the last line of the batch script.

Decides whether the job is started again, says so on one line, and ends with the job's exit code. Only here, after srun
has returned: `scontrol requeue` ends what still runs. It goes by what the ranks left in RUN and what srun said of each,
since srun's code is that of the rank that ended last. Standard library only: it runs outside a container too.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.errors import (
    ASKS_AGAIN,
    BUG,
    FAILED,
    HUNG,
    INTERRUPTED,
    OUT_OF_MEMORY,
    TERMINATED,
    UNMET,
    USER_MISTAKE,
)

DONE, KILLED = 0, 128 + signal.SIGKILL
WARNED = (128 + signal.SIGUSR1, 128 + signal.SIGUSR2)  # before the trainer had taken them
SAYS = re.compile(r"^srun: error: (?P<node>\S+): tasks? (?P<ranks>[\d,-]+): (?P<what>.+)$", re.MULTILINE)
ENDS = re.compile(r"\*\*\* JOB \d+ ON \S+ CANCELLED AT \S+(?: DUE TO (?P<why>[A-Z ]+[A-Z]))?")
LOST = re.compile(r"^srun: error: Node failure on (\S+)", re.MULTILINE)
CODES = {signal.strsignal(number): 128 + number for number in signal.valid_signals()} | {"Out Of Memory": OUT_OF_MEMORY}
"""What srun says of a task that ended by a signal, in English."""
PASSIVE = (ASKS_AGAIN, TERMINATED, BUG)
"""Codes with which ranks follow another that failed: its peers lose it, or srun ends them."""
LASTING = (BUG, USER_MISTAKE, OUT_OF_MEMORY, FAILED, INTERRUPTED, TERMINATED)
"""Codes that another start would end with too, or that somebody wanted."""
WORDS = {
    UNMET: "the port where the ranks meet is taken",
    HUNG: "a rank hung; its name is in the log and its stack in stacks/",
    KILLED: "a rank was killed",
    OUT_OF_MEMORY: "out of memory",
    ASKS_AGAIN: "saved, but left no mark",
}

AWAY = ("Unable to contact slurm controller", "Socket timed out", "Connection refused", "Zero Bytes")
"""What SLURM's programs say of a controller that is being started again, or handed over."""
PATIENCE, PAUSE = 900.0, 10.0  # seconds

PORTS = 10  # starts in which the port of the ranks may be taken: each has another, and none is the run's failure

Kind = Literal["asked", "time limit", "failure", "port"]


@dataclass(frozen=True)
class End:
    """How a start ended."""

    code: int
    """Exit code of what ended it."""
    where: str = ""
    """"rank 3 on node2", where srun said so."""


@dataclass(frozen=True)
class Verdict:
    code: int
    reason: str
    again: Kind | None = None
    """Why the job is to be started again; None: it is not."""


@dataclass(frozen=True)
class Policy:
    requeues: int
    """Starts after failures."""
    time_limits: int | None
    """Starts after the time limit."""
    lead: int
    """Seconds from the warning to the time limit."""


def first_failure(said: str, code: int) -> End:
    """What ended a start, from srun's lines on its tasks; srun's own exit code where there are none."""
    ends = [End(_code(found["what"]), f"rank {found['ranks']} on {found['node']}") for found in SAYS.finditer(said)]
    ends = [end for end in ends if end.code]
    return next((end for end in ends if end.code not in PASSIVE), ends[0] if ends else End(code))


def told_by(said: str, got: str) -> str:
    """Why SLURM ended the start, of what its daemons said: "cancelled", "time limit", "node2 was lost" ...; "": it did
    not. got: what the batch script got. It matters: scontrol would bring a job back that a person has cancelled."""
    lost, ended = LOST.search(said), ENDS.search(said)
    if lost:
        return f"{lost[1]} was lost"
    if ended:
        return (ended["why"] or "cancelled").lower()
    return got


def _code(what: str) -> int:
    number = re.search(r"exit code (\d+)", what)
    return (
        int(number[1])
        if number
        else next((code for text, code in CODES.items() if text and what.startswith(text)), BUG)
    )


def judge(
    run: Path, end: End, *, marker: str | None, told: str, left: float | None, policy: Policy, lost: bool = False
) -> Verdict:
    """marker: what RUN/requeue said. told: see `told_by`. left: seconds to the time limit, where SLURM said so.
    lost: whether the job has lost a node, see `lost_node`."""
    if end.code == DONE:
        return Verdict(DONE, "done")
    if (run / "failed").exists():
        return Verdict(FAILED, f"{_first_line(run / 'failed')}; {run / 'failed'} says more")
    late = told == "time limit" or (left is not None and left <= policy.lead + 120)
    if (marker is not None or end.code in WARNED) and (late or not told):
        reason = marker or "warned before it had begun"
        if not late:
            return Verdict(ASKS_AGAIN, reason, "asked")
        used = count(run, "time limit")
        if policy.time_limits is not None and used >= policy.time_limits:
            return Verdict(ASKS_AGAIN, f"{reason}; time_limits: {policy.time_limits} starts after one are used up")
        more = "" if policy.time_limits is None else f", {policy.time_limits - used - 1} more after it"
        return Verdict(ASKS_AGAIN, f"{reason}, at the time limit{more}", "time limit")
    if told == "cancelled":
        return Verdict(end.code, "cancelled")
    where = "" if end.code == HUNG else end.where  # all ranks end with that code; which one hung stands in the log
    what = f"{where}: " * bool(where) + WORDS.get(end.code, f"exit code {end.code}")
    if told:
        return Verdict(end.code, f"{what}; SLURM ended the job ({told}) and decides itself whether it starts again")
    if end.code == TERMINATED and lost:
        what += ", by a TERM that SLURM had for the start that lost its node"
    elif end.code in LASTING:
        return Verdict(end.code, f"{what}; not a failure that passes by itself")
    if end.code == UNMET and count(run, "port") < PORTS:
        return Verdict(end.code, f"{what}; the next start has another", "port")
    used = count(run, "failure")
    if used >= policy.requeues:
        return Verdict(end.code, f"{what}; requeues: {policy.requeues} starts after failures are used up")
    return Verdict(end.code, f"{what}; {policy.requeues - used - 1} more after this one", "failure")


def count(run: Path, kind: Kind) -> int:
    """Starts so far of this submission for this reason."""
    return sum(line.get("again") == kind for line in lines(run / "submit" / "ends.jsonl"))


def lost_node(run: Path, job: str, restart: int) -> bool:
    """Whether an earlier start of the job lost a node. The signals by which srun ended its ranks then are kept for that
    node, and come to it when it is back, be there another start by then (SLURM 22.05: about a minute after)."""
    ends = [line for line in lines(run / "submit" / "ends.jsonl") if line.get("job") == job]
    return len(ends) < restart or any(
        word in str(line.get("reason")) for line in ends for word in ("was lost", "node failure")
    )


def lines(path: Path) -> list[dict[str, object]]:
    """Of a .jsonl; one that was cut short is left out."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict)]


def requeue(job: str, *, patience: float = PATIENCE, pause: float = PAUSE) -> str | None:
    """None once the job waits again, or SLURM's reason why it does not. A controller that is away for a while, as jobs
    do not notice otherwise, is asked again for `patience` seconds."""
    since = time.monotonic()
    while True:
        try:
            ran = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=120, check=False)
            said = " ".join((ran.stderr or ran.stdout).split()) or f"scontrol ended with {ran.returncode}"
        except subprocess.TimeoutExpired:
            said = f"{AWAY[0]}: no answer within 120 s"
        except OSError as error:
            return f"scontrol: {error.strerror}"
        else:
            if ran.returncode == 0:
                return None
        if "disabled" in said:
            return f"{said}: the job, or this cluster, does not allow requeues (--no-requeue)"
        if not any(word in said for word in AWAY) or time.monotonic() - since > patience:
            return said
        time.sleep(pause)


def time_left(job: str) -> float | None:
    """Seconds to the job's time limit; None where it has none, or SLURM does not say."""
    try:
        command = ["squeue", "-h", "-j", job, "-o", "%L"]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (subprocess.TimeoutExpired, OSError):
        return None
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", ran.stdout.strip().partition("\n")[0])
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return 86_400.0 * days + 3_600 * hours + 60 * minutes + seconds


def _first_line(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace").strip().partition("\n")[0] or "marked as failed"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.after", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("code", type=int, help="of srun")
    parser.add_argument("--told", default="", help="signal that the batch script got")
    parser.add_argument("--since", type=int, default=0, help="byte of the job's log at which this start begins")
    parser.add_argument("--log", type=Path, required=True, help="of the batch script, with what srun says")
    parser.add_argument("--requeues", type=int, required=True)
    parser.add_argument("--time-limits", type=int)
    parser.add_argument("--lead", type=int, required=True)
    options = parser.parse_args(argv)
    run: Path = options.run
    own, restart = os.environ.get("SLURM_JOB_ID", "?"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    array, element = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{element}" if array and element else own  # the number of one element is that of the array too

    marker_file, marker = run / "requeue", None
    with contextlib.suppress(FileNotFoundError):
        marker = marker_file.read_text(encoding="utf-8").strip() or "asked for"
        marker_file.unlink()
    said = ""
    with contextlib.suppress(FileNotFoundError), options.log.open("rb") as file:
        file.seek(options.since)
        said = file.read().decode(errors="replace")
    end = first_failure(said, options.code) if options.code else End(DONE)
    told = told_by(said, options.told)
    policy = Policy(options.requeues, options.time_limits, options.lead)
    left = time_left(job) if told in ("", "TERM") and (marker is not None or end.code in WARNED) else None
    lost = lost_node(run, job, restart)
    outside = told or ("lost node" if lost and end.code in (TERMINATED, KILLED) else "")  # see trainer/attempts.py
    verdict = judge(run, end, marker=marker, told=told, left=left, policy=policy, lost=lost)

    rank = re.match(r"rank (\d+)", end.where)
    log = run / "logs" / f"{own}_{rank[1] if rank else 0}.log"
    outcome = f"; see {log}" if verdict.again is None and verdict.code != DONE and log.exists() else ""
    line = {"time": time.time(), "job": job, "restart": restart, "code": verdict.code, "reason": verdict.reason}
    try:
        with (run / "submit" / "ends.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({**line, "raw": own, "outside": outside, "again": verdict.again}) + "\n")
    except OSError as error:  # a full disk is no reason not to go on
        print(f"tandem: {error.strerror}: {run / 'submit' / 'ends.jsonl'}", flush=True)
    if verdict.again is not None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the requeue's own
        refused = requeue(job)
        outcome = "; starts again" if refused is None else f"; SLURM refused to start it again: {refused}"
    print(f"tandem: job {job}, start {restart + 1}: {verdict.reason}{outcome}", flush=True)
    return verdict.code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

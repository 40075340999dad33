"""What SLURM says of jobs: one call of squeue for all of them, its reasons in plain words."""

import contextlib
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass

FORMAT = "%i|%A|%T|%S|%N|%r"  # the reason last: it may hold anything
REASONS = {
    "Priority": "other jobs come first",
    "Resources": "waits for nodes to become free",
    "BeginTime": "waits for its begin time",
    "JobArrayTaskLimit": "waits for other elements of its sweep",
    "PartitionConfig": "asks for more nodes or CPUs than the partition has",
    "PartitionNodeLimit": "asks for more nodes than the partition allows, or for some that are down",
    "PartitionTimeLimit": "asks for more time than the partition allows",
    "PartitionDown": "the partition is closed",
    "PartitionInactive": "the partition is closed",
    "ReqNodeNotAvail": "nodes that it asks for are down or reserved",
    "BadConstraints": "no node has the features that it asks for",
    "Dependency": "waits for another job",
    "DependencyNeverSatisfied": "waits for another job, which failed",
    "JobHeldUser": "held by its user (scontrol release)",
    "JobHeldAdmin": "held by an administrator",
    "Reservation": "waits for its reservation to begin",
    "Licenses": "waits for a licence",
    "NodeDown": "a node that it needs is down",
    "Cleaning": "what the last start left is being cleaned up",
    "launch_failed_requeued_held": "its nodes could not start it; held (scontrol release)",
}
PREFIXES = {
    "QOSMax": "the limit of its quality of service",
    "QOSGrp": "the limit of all jobs of its quality of service is reached",
    "QOSMin": "asks for less than its quality of service demands",
    "QOSNotAllowed": "its quality of service is not allowed here",
    "QOS": "the limit of its quality of service",
    "AssocGrp": "the limit of all jobs of its account is reached",
    "AssocMax": "the limit of its account",
    "Assoc": "the limit of its account",
    "InvalidAccount": "its account is none",
    "InvalidQOS": "its quality of service is none",
    "MaxGRESPerAccount": "the limit of its account",
    "Nodes required for job are DOWN": "nodes that it asks for are down or reserved",
}
SECONDS = 20  # for an answer


@dataclass(frozen=True)
class Entry:
    """A job, or an element of an array."""

    raw: str
    """SLURM_JOB_ID, of its own for each element of an array that has begun."""
    state: str
    """PENDING, RUNNING ..."""
    start: float | None
    """When it began, or is thought to begin."""
    reason: str
    """In SLURM's word; "" for none."""


def plain(reason: str, *, again: bool = False) -> str:
    """A reason in words, with SLURM's own behind. again: the job has run before."""
    if reason in ("", "None"):
        return "has only just come" if not again else "starts again"
    word = reason.strip("()").split(",")[0]
    if word == "BeginTime" and again:
        return "waits after a requeue (BeginTime)"
    told = REASONS.get(word) or next((text for start, text in PREFIXES.items() if word.startswith(start)), None)
    return f"{told} ({word})" if told and " " not in word else told or word


def ask(jobs: Iterable[str]) -> tuple[dict[str, Entry], str | None]:
    """{job: what squeue says}, for those that SLURM knows, with elements of arrays as 12_3; and a note, where it does
    not answer: then nothing is known."""
    numbers = sorted({job.partition("_")[0] for job in jobs})
    if not numbers:
        return {}, None
    command = ["squeue", "-h", "-r", "-t", "all", "-j", ",".join(numbers), "-o", FORMAT]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except FileNotFoundError:
        return {}, "squeue: not found; what is said of SLURM's jobs is from their folders"
    except (OSError, subprocess.TimeoutExpired) as error:
        said = f"no answer in {SECONDS} s" if isinstance(error, subprocess.TimeoutExpired) else error.strerror
        return {}, f"squeue: {said}; what is said of SLURM's jobs is from their folders"
    if ran.returncode and "Invalid job id" not in ran.stderr:
        said = " ".join(ran.stderr.split()) or f"exit code {ran.returncode}"
        return {}, f"squeue: {said}; what is said of SLURM's jobs is from their folders"
    return parse(ran.stdout), None


def parse(text: str) -> dict[str, Entry]:
    found = {}
    for line in text.splitlines():
        parts = line.strip().split("|", 5)
        if len(parts) == 6:
            job, raw, state, start, _, reason = parts
            found[job] = Entry(raw, state, _time(start), "" if reason == "None" else reason)
    return found


def _time(text: str) -> float | None:
    with contextlib.suppress(ValueError):
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    return None

"""How a run is doing, of what it wrote into its folder and what SLURM says of its job. Standard library only, so that
`tandem status` answers at once; it writes nothing."""

import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launch import beats, folders, process, squeue
from launch.after import lines
from launch.squeue import Entry
from trainer.errors import ASKS_AGAIN, FAILED, HUNG, INTERRUPTED, TERMINATED, USER_MISTAKE

LONG = 60.0  # seconds in one place that are worth a word
JOB, LOCAL_JOB = r"\d+(_\d+)?", r"local-\d+"
LOOP = "in a row at "  # in RUN/failed of a crash loop
ENDED = {
    "COMPLETED": "done",
    "CANCELLED": "cancelled",
    "REVOKED": "cancelled",
    "TIMEOUT": "time limit",
    "DEADLINE": "the job's deadline passed",
    "NODE_FAIL": "a node was lost",
    "BOOT_FAIL": "a node did not boot",
    "PREEMPTED": "preempted",
    "OUT_OF_MEMORY": "SLURM ended it: more memory than the job asked for",
    "FAILED": "failed",
}
"""SLURM's states of a job that is over."""

State = Literal[
    "pending", "requeued", "starting", "running", "stopping", "suspended", "hung",
    "done", "stopped", "cancelled", "failed", "crash loop", "unknown",
]  # fmt: skip
ACTIVE: tuple[State, ...] = ("pending", "requeued", "starting", "running", "stopping", "suspended", "hung")
Kind = Literal["slurm", "local", "train"]


@dataclass(frozen=True)
class Status:
    """A run. Fields that are None are not known, or do not apply."""

    run: Path
    kind: Kind
    """Who started it: a job of SLURM, `tandem submit --cluster local`, or a command."""
    job: str | None
    state: State
    why: str
    """Why it waits, or ended; "" where there is nothing to say."""
    images: int
    total: int | None
    images_per_second: float | None
    seconds_left: float | None
    saved: int | None
    """Images of the newest checkpoint."""
    saved_age: float | None
    """Seconds since it was written."""
    starts: int
    slowest: str
    """The rank that others wait for; "" where none is behind."""

    @property
    def active(self) -> bool:
        return self.state in ACTIVE


def look(runs: Iterable[Path]) -> tuple[list[Status], list[str]]:
    """All runs, with one call of squeue; and notes on what could not be asked."""
    abouts = {run: _about(run) for run in runs}
    jobs = [str(about["job"]) for about in abouts.values() if about.get("kind") == "slurm"]
    entries, note = squeue.ask(jobs)
    known = None if note else entries
    found = [of(run, about, known) for run, about in abouts.items()]
    unsure = note is not None and any(one.kind == "slurm" and (one.active or one.state == "unknown") for one in found)
    return found, [note] if note and unsure else []


def _about(run: Path) -> dict[str, Any]:
    """submit/job.json. {} for one with a job that is none: what stands there becomes a word of squeue and scancel."""
    about = {"kind": "slurm"} | folders.read_json(run / "submit" / "job.json")
    fits = JOB if about["kind"] == "slurm" else LOCAL_JOB
    return about if re.fullmatch(fits, str(about.get("job", "")), re.ASCII) else {}


def of(run: Path, about: Mapping[str, Any], entries: Mapping[str, Entry] | None) -> Status:
    """about: submit/job.json, {} for a run that was not submitted. entries: what SLURM knows; None: it did not say."""
    told = folders.heartbeats(run)
    job = str(about["job"]) if "job" in about else None
    ends = lines(run / "submit" / "ends.jsonl")
    kind: Kind = "train" if job is None else "local" if about.get("kind") == "local" else "slurm"
    if kind == "local":
        state, why = _local(run, about, told, ends)
    elif kind == "slurm":
        assert job is not None
        state, why = _slurm(run, job, told, ends, entries, submitted=_number(about, "time"))
    else:
        state, why = _train(run, told)
    by_hand = told and kind != "train" and state not in ACTIVE and _later(told, about, ends)
    if by_hand:  # `tandem train` in the folder of a job that was over
        kind, (state, why) = "train", _train(run, told)
    return _status(run, kind, job, state, why, told)


def _status(run: Path, kind: Kind, job: str | None, state: State, why: str, told: list[dict[str, Any]]) -> Status:
    first = told[0] if told else {}
    saved = folders.checkpoints(run)
    done = folders.read_json(run / "finished")
    newest = int(saved[-1].name) if saved else None
    images = max(int(first.get("images", 0)), newest or 0) if state in ("running", "stopping", "hung") else newest or 0
    if state == "done":
        images = max(images, int(_number(done, "images")), int(first.get("images", 0)))
    total = first.get("total") or folders.total(run)
    speed = first.get("images_per_second")
    left = None
    if state == "running" and speed and total:
        left = max(0.0, (int(total) - images) / float(speed))
    return Status(
        run=run,
        kind=kind,
        job=job,
        state=state,
        why=why,
        images=images,
        total=int(total) if total else None,
        images_per_second=float(speed) if speed and state == "running" else None,
        seconds_left=left,
        saved=newest,
        saved_age=max(0.0, time.time() - saved[-1].stat().st_mtime) if saved else None,
        starts=len(lines(run / "attempts.jsonl")),
        slowest=beats.slowest(told) if state in ("running", "stopping", "hung") else "",
    )


# ---------------------------------------------------------------- a job of SLURM
def _slurm(
    run: Path,
    job: str,
    told: list[dict[str, Any]],
    ends: list[dict[str, object]],
    entries: Mapping[str, Entry] | None,
    *,
    submitted: float,
) -> tuple[State, str]:
    if entries is None:
        return _unasked(run, told, ends)
    entry = entries.get(job)
    if entry is None:
        return _over(run, ends, "", submitted=submitted)
    if entry.state in ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT"):
        again = any((run / "logs").glob(f"{entry.raw}_*.log"))
        return ("requeued" if again else "pending"), squeue.plain(entry.reason, again=again)
    if entry.state in ENDED:
        return _over(run, ends, entry.state, submitted=submitted)
    if entry.state in ("SUSPENDED", "STOPPED"):
        return "suspended", "SLURM has stopped it for a while"
    if entry.state == "CONFIGURING":
        return "starting", "its nodes are being made ready"
    now = [one for one in told if entry.start is None or float(one["time"]) >= entry.start - 1]
    if entry.state in ("COMPLETING", "SIGNALING", "STAGE_OUT") or (run / "requeue").exists():
        return "stopping", folders.first_line(run / "requeue") or ""
    return _at_work(now)


def _unasked(run: Path, told: list[dict[str, Any]], ends: list[dict[str, object]]) -> tuple[State, str]:
    """SLURM does not answer."""
    if told and beats.age(told[0]) < beats.quiet(told) and told[0]["at"] != "end":
        return _at_work(told)
    if ends and ends[-1].get("again") is None:
        return _over(run, ends, "", submitted=0)
    return (
        "unknown",
        f"its last sign of life is {beats.duration(beats.age(told[0]))} old" if told else "SLURM did not say",
    )


def _over(run: Path, ends: list[dict[str, object]], state: str, *, submitted: float) -> tuple[State, str]:
    """state: SLURM's; "" where it has forgotten the job."""
    last = ends[-1] if ends else {}
    code, reason = last.get("code"), str(last.get("reason", ""))
    if state == "COMPLETED" or code == 0:
        return "done", ""
    if (marked := folders.first_line(run / "failed")) is not None:
        return ("crash loop" if LOOP in marked else "failed"), marked
    if state in ("CANCELLED", "REVOKED"):
        return "cancelled", ""
    if ends and last.get("again") is None:
        return _by_code(code), reason
    if state:
        return "failed", ENDED[state] if not reason else f"{ENDED[state]}, after: {reason}"
    done = folders.read_json(run / "finished")
    if done and (run / "finished").stat().st_mtime >= submitted:
        return "done", ""
    if ends:
        return "failed", f"was to start again ({reason}), but SLURM knows the job no more"
    return "failed", "SLURM knows the job no more, and it has left no word; see logs"


def _by_code(code: object) -> State:
    if code == FAILED:
        return "crash loop"
    return "cancelled" if code in (INTERRUPTED, TERMINATED) else "stopped" if code == ASKS_AGAIN else "failed"


# ---------------------------------------------------------------- a run of this machine
def _local(
    run: Path, about: Mapping[str, Any], told: list[dict[str, Any]], ends: list[dict[str, object]]
) -> tuple[State, str]:
    submit = run / "submit"
    watcher, child = about.get("process", {}), folders.read_json(submit / "process.json")
    last = ends[-1] if ends else {}
    if ends and last.get("again") is None:
        marked = folders.first_line(run / "failed")
        if last.get("code") == 0:
            return "done", ""
        if last.get("reason") == "cancelled" or str(last.get("reason")).startswith("cancelled"):
            return "cancelled", "" if last.get("reason") == "cancelled" else str(last["reason"])
        if marked is not None:
            return ("crash loop" if LOOP in marked else "failed"), marked
        return _by_code(last.get("code")), str(last.get("reason", ""))
    if process.elsewhere(watcher):
        if told and beats.age(told[0]) < beats.quiet(told):
            return _at_work(told)
        return "unknown", f"it was submitted on {watcher.get('host')}; ask there"
    running = process.alive(child)
    if running and (submit / "cancel").exists():
        return "stopping", "cancelled"
    if running:
        return _at_work([one for one in told if float(one["time"]) >= float(child.get("time", 0))])
    if not process.alive(watcher):
        return "failed", "the process that watched over it is gone; `tandem resubmit` goes on"
    if ends:
        return "requeued", str(last.get("reason", ""))
    return "pending", "waits for the runs before it" if not child else "between two starts"


def _train(run: Path, told: list[dict[str, Any]]) -> tuple[State, str]:
    """A run of `tandem train`, torchrun, accelerate launch."""
    first = told[0] if told else {}
    mine = bool(first) and not process.elsewhere(first) and Path("/proc/self").exists()
    lives = mine and _is(first)
    if first and (lives or (not mine and beats.age(first) < beats.quiet(told))):
        return _at_work(told)
    rows = lines(run / "attempts.jsonl")
    code = rows[-1].get("code") if rows else None
    if (marked := folders.first_line(run / "failed")) is not None:
        return ("crash loop" if LOOP in marked else "failed"), marked
    if code == 0 or (code is None and (run / "finished").exists()):
        return "done", ""
    if code in (INTERRUPTED, TERMINATED):
        return "stopped", "Ctrl-C" if code == INTERRUPTED else "TERM"
    if code == ASKS_AGAIN:
        return "stopped", folders.first_line(run / "requeue") or "saved, and asks to be started again"
    if code == USER_MISTAKE:
        return "failed", "a mistake in the config or the data"
    if code is not None:
        return "failed", {HUNG: "a rank hung; see stacks/"}.get(int(str(code)), f"exit code {code}")
    return "failed", _crash(run, since=_number(rows[-1], "time") if rows else 0.0)


def _crash(run: Path, *, since: float) -> str:
    """The last line of the error that ended the first rank of the last start."""
    told = []
    if (run / "crashes").is_dir():
        told = [folders.read_json(path) for path in (run / "crashes").glob("rank*.json")]
    late = sorted((_number(one, "time"), str(one.get("text", ""))) for one in told if _number(one, "time") >= since)
    if late and late[0][1].strip():
        return late[0][1].strip().splitlines()[-1]
    if (run / "stacks" / "hang.json").exists():
        return "a rank hung; see stacks/"
    return "ended without a word: killed, or its machine was lost"


def _is(first: Mapping[str, Any]) -> bool:
    """Whether the rank's number is still that of the rank."""
    return process.began_before(int(first.get("pid", 0)), _number(first, "started") + 5)


def _at_work(told: list[dict[str, Any]]) -> tuple[State, str]:
    """Of a run that has processes; told: its heartbeats of this start."""
    if not told:
        return "starting", ""
    first = told[0]
    if beats.age(first) > beats.quiet(told):
        return "hung", f"no sign of life for {beats.duration(beats.age(first))}"
    if first["at"] == "meet":
        return "starting", beats.DOING["meet"]
    if first["at"] == "end":
        return "stopping", ""
    since = time.time() - float(first["since"])
    return "running", f"{beats.DOING.get(first['at'], first['at'])} for {beats.duration(since)}" if since > LONG else ""


def _later(told: list[dict[str, Any]], about: Mapping[str, Any], ends: list[dict[str, object]]) -> bool:
    """Whether the ranks that spoke last are not of the job."""
    over = _number(ends[-1], "time") if ends else 0.0
    return bool(ends) and _number(told[0], "started") > max(over, _number(about, "time"))


def _number(of: Mapping[str, Any], key: str) -> float:
    found = of.get(key)
    return float(found) if isinstance(found, (int, float)) else 0.0

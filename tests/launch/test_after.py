"""Whether a job is started again, and what is said of it, without a SLURM."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.after import PORTS, End, Policy, first_failure, judge, lines, lost_node, requeue, told_by
from tests.starts import ROOT

POLICY = Policy(requeues=2, time_limits=None, lead=120)
KILL = """\
srun: launch/slurm: _step_signal: Terminating StepId=12.0
slurmstepd: error: *** STEP 12.0 ON node1 CANCELLED AT 2026-11-25T14:00:00 ***
srun: error: node1: tasks 0-1: Exited with exit code 1
srun: error: node2: task 3: Killed
srun: error: node2: task 2: Terminated
"""


@pytest.mark.parametrize(
    ("said", "code", "end"),
    [
        (KILL, 143, End(137, "rank 3 on node2")),  # its peers lost it, and srun's own code is the last one's
        ("srun: error: node1: task 0: Exited with exit code 2\n" + KILL, 143, End(2, "rank 0 on node1")),
        ("srun: error: gpu[1-2]: tasks 0-15: Exited with exit code 75", 75, End(75, "rank 0-15 on gpu[1-2]")),
        ("srun: error: a: task 0: Segmentation fault (core dumped)", 139, End(139, "rank 0 on a")),
        ("srun: error: a: task 1: User defined signal 2", 140, End(140, "rank 1 on a")),
        ("srun: error: a: task 1: Out Of Memory", 1, End(71, "rank 1 on a")),
        ("srun: error: Unable to create step for job 9: Invalid specification", 1, End(1)),
        ("", 137, End(137)),
    ],
)
def test_the_rank_that_failed_first_is_found_in_what_srun_says(said: str, code: int, end: End) -> None:
    assert first_failure(said, code) == end


STEPD = "slurmstepd-node1: error: *** {what} ON node1 CANCELLED AT 2026-11-25T14:29:48{why} ***"


@pytest.mark.parametrize(
    ("said", "signal", "told"),
    [
        (STEPD.format(what="JOB 14", why=""), "TERM", "cancelled"),
        (STEPD.format(what="JOB 14", why=" DUE TO TIME LIMIT"), "TERM", "time limit"),
        (STEPD.format(what="JOB 14", why=" DUE TO JOB REQUEUE"), "TERM", "job requeue"),
        (
            STEPD.format(what="JOB 14", why=" DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS"),
            "TERM",
            "node failure",
        ),
        (STEPD.format(what="STEP 14.0", why=""), "", ""),  # srun ended the other ranks
        ("srun: error: Node failure on node2\n" + STEPD.format(what="JOB 14", why=""), "TERM", "node2 was lost"),
        ("", "TERM", "TERM"),
    ],
)
def test_why_slurm_ended_a_start_is_found_in_what_its_daemons_say(said: str, signal: str, told: str) -> None:
    assert told_by(said, signal) == told


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "submit").mkdir()
    return tmp_path


def ended(run: Path, *again: str) -> None:
    (run / "submit" / "ends.jsonl").write_text("".join(json.dumps({"again": kind}) + "\n" for kind in again))


@pytest.mark.parametrize(
    ("code", "marker", "told", "left", "verdict"),
    [
        (0, None, "", None, (0, None)),
        (75, "USR2 at 640 images", "", 50_000.0, (75, "asked")),
        (143, "USR2 at 640 images", "", None, (75, "asked")),  # srun ended a rank that was slow to leave
        (75, "USR2 at 640 images", "TERM", 100.0, (75, "time limit")),
        (75, "USR2 at 640 images", "time limit", None, (75, "time limit")),
        (75, "USR2 at 640 images", "cancelled", None, (75, None)),  # scontrol would bring it back
        (75, "USR2 at 640 images", "preemption", None, (75, None)),  # SLURM starts it again itself
        (75, "USR2 at 640 images", "TERM", 50_000.0, (75, None)),
        (140, None, "", 50_000.0, (75, "asked")),
        (137, None, "", None, (137, "failure")),
        (139, None, "", None, (139, "failure")),
        (70, None, "", None, (70, "failure")),
        (69, None, "", None, (69, "port")),  # the port is another one then
        (75, None, "", None, (75, "failure")),
        (137, None, "TERM", None, (137, None)),  # scancel, a lost node: SLURM's to decide
        (143, None, "", None, (143, None)),
        (1, None, "", None, (1, None)),
        (2, None, "", None, (2, None)),
        (71, None, "", None, (71, None)),
        (72, None, "", None, (72, None)),
        (130, None, "", None, (130, None)),
    ],
)
def test_a_start_is_judged(
    code: int, marker: str | None, told: str, left: float | None, verdict: tuple[int, str | None], run: Path
) -> None:
    found = judge(run, End(code), marker=marker, told=told, left=left, policy=POLICY)
    assert (found.code, found.again) == verdict, found


def test_a_term_that_slurm_kept_for_a_lost_node_is_a_failure_of_the_start_that_it_hits(run: Path) -> None:
    assert not lost_node(run, "7", 0) and lost_node(run, "7", 1)  # the batch script was on the node
    reason = "rank 0 on node1: exit code 1; SLURM ended the job (node2 was lost) and decides itself"
    (run / "submit" / "ends.jsonl").write_text(json.dumps({"job": "7", "again": None, "reason": reason}) + "\n")
    assert lost_node(run, "7", 1) and not lost_node(run, "8", 0)
    again = judge(run, End(143, "rank 2 on node2"), marker=None, told="", left=None, policy=POLICY, lost=True)
    assert again.again == "failure" and "rank 2 on node2: exit code 143, by a TERM that SLURM had for" in again.reason
    for told in ("cancelled", "TERM"):
        assert judge(run, End(143), marker=None, told=told, left=None, policy=POLICY, lost=True).again is None


def test_failures_and_time_limits_are_counted_apart_and_preemptions_not(run: Path) -> None:
    ended(run, "asked", "asked", "asked", "time limit", "failure")
    killed = judge(run, End(137), marker=None, told="", left=None, policy=POLICY)
    assert killed.again == "failure" and "0 more after this one" in killed.reason
    ended(run, "failure", "failure")
    over = judge(run, End(137, "rank 3 on node2"), marker=None, told="", left=None, policy=POLICY)
    assert over.again is None and over.reason.startswith("rank 3 on node2: a rank was killed; requeues: 2 ")
    ended(run, "time limit")
    limited = Policy(requeues=2, time_limits=1, lead=120)
    late = judge(run, End(75), marker="USR2", told="", left=90.0, policy=limited)
    assert late.again is None and "time_limits: 1" in late.reason
    assert judge(run, End(75), marker="USR2", told="", left=9_000.0, policy=limited).again == "asked"


def test_a_run_that_is_marked_as_failed_is_not_started_again(run: Path) -> None:
    (run / "failed").write_text("3 starts in a row at 640 images\n\nTraceback ...\n")
    found = judge(run, End(137), marker="USR2", told="", left=None, policy=POLICY)
    assert (found.code, found.again) == (72, None)
    assert "3 starts in a row at 640 images" in found.reason and str(run / "failed") in found.reason


def test_a_line_that_was_cut_short_is_left_out(run: Path) -> None:
    (run / "a.jsonl").write_text('{"again": "failure"}\n{"aga')
    assert lines(run / "a.jsonl") == [{"again": "failure"}]


def test_a_port_that_is_taken_is_no_failure_of_the_run(run: Path) -> None:
    for _ in range(PORTS):
        found = judge(run, End(69, "rank 0 on node1"), marker=None, told="", left=None, policy=POLICY)
        assert found.again == "port"
        with (run / "submit" / "ends.jsonl").open("a") as file:
            file.write('{"again": "port"}\n')
    assert judge(run, End(137), marker=None, told="", left=None, policy=POLICY).again == "failure"  # all are left
    assert judge(run, End(69), marker=None, told="", left=None, policy=POLICY).again == "failure"


def test_a_controller_that_is_away_for_a_while_is_asked_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = tmp_path / "tries"
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(
        f"#!/bin/sh\necho once >> {tries}\n[ $(wc -l < {tries}) -ge 3 ] && exit 0\n"
        "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2\nexit 1\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    assert requeue("12", pause=0.01) is None and tries.read_text().count("once") == 3
    tries.unlink()
    assert "Unable to contact" in str(requeue("12", patience=0.0, pause=0.01))
    program.unlink()
    monkeypatch.setenv("PATH", str(program.parent))
    assert requeue("12") == "scontrol: No such file or directory"


@pytest.mark.parametrize("refuses", [False, True])
def test_the_program_takes_the_mark_away_and_says_what_it_did(refuses: bool, run: Path) -> None:
    programs = run / "bin"
    programs.mkdir()
    answer = "echo Requested operation is presently disabled for job 12 >&2; exit 1" if refuses else "exit 0"
    for name, text in (("scontrol", answer), ("squeue", "echo 1-00:00:00")):
        (programs / name).write_text(f"#!/bin/sh\necho {name} $* >> {run}/called\n{text}\n")
        (programs / name).chmod(0o755)
    (run / "requeue").write_text("USR2 at 640 images\n")
    (run / "12.log").write_text("srun: error: a: task 0: Exited with exit code 2\n" + "earlier start\n")
    since = (run / "12.log").stat().st_size
    words = [str(run), "143", "--log", str(run / "12.log"), f"--since={since}", "--told=", "--requeues=3", "--lead=120"]
    ran = subprocess.run(
        [sys.executable, "-S", "-m", "launch.after", *words],  # -S: nothing but the standard library
        cwd=ROOT,
        env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "12"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 75, ran.stderr
    assert (run / "called").read_text() == "squeue -h -j 12 -o %L\nscontrol requeue 12\n"
    assert not (run / "requeue").exists()
    assert ran.stdout.startswith("tandem: job 12, start 1: USR2 at 640 images; ") and ran.stdout.count("\n") == 1
    assert ("starts again" in ran.stdout) == (not refuses) and ("(--no-requeue)" in ran.stdout) == refuses

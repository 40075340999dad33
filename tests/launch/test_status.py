"""What `tandem status` says, of made folders and a squeue that stands in."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch import beats, cancel, folders, process, squeue, state, status, submit
from launch.state import Status
from tests.launch import made


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where programs stand in."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return made.submitted(tmp_path / "runs" / "a")


def of(run: Path) -> Status:
    (found,), notes = state.look([run])
    assert notes == []
    return found


def says(path: Path, *lines: str) -> None:
    made.squeue(path, *lines)


# ---------------------------------------------------------------- jobs of SLURM
@pytest.mark.parametrize(
    ("reason", "why"),
    [
        ("PartitionConfig", "asks for more nodes or CPUs than the partition has (PartitionConfig)"),
        ("Resources", "waits for nodes to become free (Resources)"),
        ("Priority", "other jobs come first (Priority)"),
        ("BeginTime", "waits for its begin time (BeginTime)"),
        ("QOSMaxGRESPerUser", "the limit of its quality of service (QOSMaxGRESPerUser)"),
        ("AssocGrpCPUMinutesLimit", "the limit of all jobs of its account is reached (AssocGrpCPUMinutesLimit)"),
        ("JobArrayTaskLimit", "waits for other elements of its sweep (JobArrayTaskLimit)"),
        ("ReqNodeNotAvail, UnavailableNodes:gpu[1|2]", "nodes that it asks for are down or reserved (ReqNodeNotAvail)"),
        ("Nodes required for job are DOWN, DRAINED", "nodes that it asks for are down or reserved"),
        ("SomethingNew", "SomethingNew"),
        ("None", "has only just come"),
    ],
)
def test_a_pending_job_says_in_plain_words_why(path: Path, run: Path, reason: str, why: str) -> None:
    says(path, f"12|12|PENDING|N/A||{reason}")
    found = of(run)
    assert (found.state, found.why, found.images, found.total) == ("pending", why, 0, 64_000)


def test_a_job_that_waits_after_a_start_is_requeued(path: Path, run: Path) -> None:
    (run / "logs").mkdir()
    (run / "logs" / "12_0.log").touch()
    says(path, "12|12|PENDING|N/A||BeginTime")
    assert (of(run).state, of(run).why) == ("requeued", "waits after a requeue (BeginTime)")


def test_a_running_job_tells_speed_time_left_checkpoint_and_starts(path: Path, run: Path) -> None:
    says(path, f"12|12|RUNNING|{made.at(300)}|node1|None")
    made.heartbeat(run)
    made.saved(run, 6_400)
    (run / "attempts.jsonl").write_text('{"images": 0}\n{"images": 6400}\n')
    found = of(run)
    assert (found.state, found.images, found.total, found.starts, found.saved) == ("running", 12_800, 64_000, 2, 6_400)
    assert found.seconds_left == 100 and found.saved_age == pytest.approx(90, abs=5)
    assert found.slowest == ""
    text = status.as_text([found])
    assert "12,800 / 64,000" in text and "512" in text and "6,400, 90 s ago" in text and "100 s" in text


@pytest.mark.parametrize(
    ("beat", "line", "expected"),
    [
        ({"age": 300}, 200, "starting"),  # the heartbeat of the start before
        ({"at": "meet"}, 200, "starting"),
        ({"at": "end"}, 200, "stopping"),
        ({"age": 100}, 200, "hung"),
        ({"age": 2, "since": -200}, 400, "running"),
    ],
)
def test_a_running_job_is_what_its_heartbeats_say(
    path: Path, run: Path, beat: dict[str, Any], line: int, expected: str
) -> None:
    says(path, f"12|12|RUNNING|{made.at(line)}|node1|None")
    since = {"since": made.NOW() + beat["since"]} if "since" in beat else {}
    made.heartbeat(run, **beat | since)
    found = of(run)
    assert found.state == expected
    if since:
        assert found.why == "in an update for 3 min"


def test_one_that_saves_to_be_started_again_is_stopping(path: Path, run: Path) -> None:
    says(path, f"12|12|RUNNING|{made.at(300)}|node1|None")
    (run / "requeue").write_text("USR2 at 12,800 images\n")
    assert (of(run).state, of(run).why) == ("stopping", "USR2 at 12,800 images")


def test_the_slowest_rank_is_named(path: Path, run: Path) -> None:
    says(path, f"12|12|RUNNING|{made.at(300)}|node1|None")
    for rank in range(4):
        made.heartbeat(run, rank)
    assert of(run).slowest == ""
    made.heartbeat(run, 2, passed=[90, 0], at="data", since=made.NOW() - 30, host="node7")
    assert of(run).slowest == "rank 2 on node7: waiting for data for 30 s"
    made.heartbeat(run, 3, age=200)
    assert of(run).slowest == "rank 3 on node1: no sign of life for 3 min"


@pytest.mark.parametrize("remembered", [True, False])
@pytest.mark.parametrize(
    ("word", "code", "reason", "expected"),
    [
        ("COMPLETED", 0, "done", "done"),
        ("FAILED", 2, "rank 1 on node2: exit code 2; not a failure that passes by itself", "failed"),
        ("FAILED", 137, "rank 1 on node2: a rank was killed; requeues: 3 starts ...", "failed"),
        ("CANCELLED", 143, "cancelled", "cancelled"),
        ("FAILED", 72, "crash loop", "crash loop"),
    ],
)
def test_the_end_of_a_job_is_told_with_its_reason_also_when_slurm_has_forgotten_it(
    path: Path, run: Path, word: str, code: int, reason: str, expected: str, remembered: bool
) -> None:
    says(path, *([f"12|12|{word}|{made.at(300)}||None"] if remembered else []))
    made.ended(run, code, reason)
    found = of(run)
    assert found.state == expected and not found.active
    assert found.why == (
        reason if expected in ("failed", "crash loop") or (word, remembered) == ("CANCELLED", False) else ""
    )


def test_a_run_that_is_marked_says_so(path: Path, run: Path) -> None:
    says(path)
    made.ended(run, 72, "x")
    (run / "failed").write_text("3 starts in a row at 640 images, and none came to the next checkpoint\n\nTraceback\n")
    assert (of(run).state, of(run).why[:13]) == ("crash loop", "3 starts in a")
    (run / "failed").write_text("somebody said no\n")
    assert (of(run).state, of(run).why) == ("failed", "somebody said no")


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("TIMEOUT", "time limit"),
        ("NODE_FAIL", "a node was lost"),
        ("OUT_OF_MEMORY", "SLURM ended it: more memory than the job asked for"),
        ("", "SLURM knows the job no more, and it has left no word; see logs"),
    ],
)
def test_an_end_of_which_only_slurm_knows_is_told(path: Path, run: Path, word: str, why: str) -> None:
    says(path, *([f"12|12|{word}|{made.at(300)}||None"] if word else []))
    assert (of(run).state, of(run).why) == ("failed", why)


@pytest.mark.parametrize("broken", ["missing", "refuses", "hangs"])
def test_a_squeue_that_does_not_answer_is_a_note(
    path: Path, run: Path, broken: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if broken == "missing":
        monkeypatch.setenv("PATH", str(path))
    elif broken == "refuses":
        made.squeue(path, code=1, error="slurm_load_jobs error: Unable to contact slurm controller")
    else:
        monkeypatch.setattr(squeue, "SECONDS", 0.2)
        (path / "squeue").write_text("#!/bin/sh\nexec sleep 5\n")
        (path / "squeue").chmod(0o755)
    assert status.main([str(run)]) == 0
    said = capsys.readouterr()
    assert said.err.startswith("tandem: squeue: ") and said.err.count("\n") == 1
    assert "unknown" in said.out
    made.heartbeat(run)
    assert state.look([run])[0][0].state == "running"  # it lives
    made.ended(run, 0, "done")
    made.heartbeat(run, age=300)
    assert state.look([run]) == (state.look([run])[0], []) and of(run).state == "done"  # nothing to ask


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("heartbeats/rank00000.json", json.dumps({"rank": 0, "time": 1.0, "at": "step", "since": 1.0} | one))
          for one in ({"images": None}, {"images": "x"}, {"total": "x"}, {"passed": 3}, {"time": "now"}, {"at": 7})),
        ("heartbeats/rank00000.json", "[" * 100_000),
        ("attempts.jsonl", b"\xff\xfe{}"),
        ("submit/ends.jsonl", b"\xff\xfe\n[]\n{}\n"),
        ("finished", '{"images": null, "figures": 3}'),
        ("submit/job.json", '{"job": ["1"], "kind": 2}'),
        ("sweep.json", '{"elements": 3}'),
        ("sweep.json", "[{}]"),
    ],
)  # fmt: skip
def test_a_damaged_file_of_one_run_keeps_none_from_being_shown(
    path: Path, tmp_path: Path, name: str, content: str | bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    made.squeue(path)
    for run in ("a", "b"):
        made.submitted(tmp_path / "runs" / run)
        made.heartbeat(tmp_path / "runs" / run)
        made.ended(tmp_path / "runs" / run, 0, "done")
    file = tmp_path / "runs" / "a" / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert status.main([str(tmp_path / "runs")]) == 0
    said = capsys.readouterr().out
    assert "a " in said and "b " in said and "done" in said


def test_squeue_is_asked_once_for_all_runs_and_elements_of_arrays(path: Path, tmp_path: Path) -> None:
    runs = [made.submitted(tmp_path / "runs" / name, job) for name, job in (("a", "7"), ("b", "12_0"), ("c", "12_1"))]
    calls = tmp_path / "calls"
    lines = ("7|7|PENDING|N/A||Priority", "12_0|13|PENDING|N/A||Priority", f"12_1|12|CANCELLED|{made.at(9)}||None")
    made.squeue(path, *lines, calls=calls)
    found, _ = state.look(runs)
    assert [one.state for one in found] == ["pending", "pending", "cancelled"]
    assert calls.read_text().splitlines() == [f"-h -r -t all -j 12,7 -o {squeue.FORMAT}"]


# ---------------------------------------------------------------- runs of this machine
def test_a_local_run_is_what_its_processes_are(tmp_path: Path) -> None:
    run = made.here(tmp_path / "a")
    assert (of(run).state, of(run).why) == ("pending", "waits for the runs before it")
    mine = process.identity(os.getpid()) | {"time": made.NOW() - 60}
    folders.write_json(run / "submit" / "process.json", mine)
    assert of(run).state == "starting"
    made.heartbeat(run)
    assert of(run).state == "running"
    (run / "submit" / "cancel").touch()
    assert of(run).state == "stopping"
    folders.write_json(run / "submit" / "process.json", mine | {"started": "1"})  # another process has its number now
    made.ended(run, 137, "a rank was killed; 2 more after this one", "failure")
    assert of(run).state == "requeued"
    made.ended(run, 130, "cancelled")
    assert of(run).state == "cancelled"
    made.here(run, alive=False)
    (run / "submit" / "ends.jsonl").unlink()
    assert (of(run).state, of(run).why[:11]) == ("failed", "the process")
    made.submitted(run, "local-1", kind="local", process={**mine, "host": "elsewhere"})
    made.heartbeat(run, age=999)
    assert (of(run).state, of(run).why) == ("unknown", "it was submitted on elsewhere; ask there")


def test_a_run_that_nobody_submitted_is_told_from_its_heartbeats_and_starts(tmp_path: Path) -> None:
    run = tmp_path / "a"
    made.heartbeat(run, host="elsewhere")
    assert (of(run).kind, of(run).state) == ("train", "running")
    made.heartbeat(run, age=300, host="elsewhere")
    assert (of(run).state, of(run).why) == ("failed", "ended without a word: killed, or its machine was lost")
    rows = {0: "done", 130: "stopped", 143: "stopped", 75: "stopped", 2: "failed", 70: "failed"}
    for code, expected in rows.items():
        (run / "attempts.jsonl").write_text(json.dumps({"time": 1.0, "images": 0, "code": code}) + "\n")
        assert of(run).state == expected, code
    (run / "attempts.jsonl").write_text(json.dumps({"time": 1.0, "images": 0}) + "\n")
    folders_of = run / "crashes"
    folders_of.mkdir()
    (folders_of / "rank00000.json").write_text(json.dumps({"time": 2.0, "text": "Traceback\nKeyError: 'lost'\n"}))
    assert of(run).why == "KeyError: 'lost'"


def test_a_number_that_another_process_has_now_is_not_the_run(tmp_path: Path) -> None:
    import socket

    run = tmp_path / "a"
    long_ago = {"host": socket.gethostname(), "age": 900, "started": made.NOW() - 10**6}
    made.heartbeat(run, pid=os.getpid(), **long_ago)
    assert of(run).state == "failed"
    made.heartbeat(run, pid=os.getpid(), **(long_ago | {"started": made.NOW()}))
    assert of(run).state == "hung"


def test_a_run_that_somebody_goes_on_with_by_hand_after_its_job_is_that_persons(path: Path, run: Path) -> None:
    says(path)
    made.ended(run, 143, "cancelled", time=made.NOW() - 800)
    made.heartbeat(run, host="elsewhere", job=None)
    assert (of(run).kind, of(run).state) == ("train", "running")


@pytest.mark.parametrize("job", ["--user=me", "12 13", "12,13", "", "12_"])
def test_what_is_no_job_becomes_no_word_of_slurms_programs(path: Path, run: Path, job: str) -> None:
    calls = run.parent / "calls"
    made.squeue(path, calls=calls)
    made.submitted(run, job)
    assert of(run).job is None and not calls.exists()


# ---------------------------------------------------------------- the command
def test_all_runs_below_runs_are_shown_and_json_is_for_programs(
    path: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    says(path, "12|12|PENDING|N/A||Priority")
    made.heartbeat(run.parent / "deep" / "er" / "b", host="elsewhere")
    (run.parent / "no-run").mkdir()
    monkeypatch.chdir(run.parents[1])
    assert status.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["run", "runs/a", "runs/deep/er/b"]
    assert status.main(["runs/a", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["runs"][0] | {"run": "runs/a", "state": "pending", "active": True} == told["runs"][0]
    for folder, said in (("runs/none", "no such folder"), ("runs/no-run", "neither a run")):
        with pytest.raises(ValueError, match=said):
            status.main([folder])


def test_without_runs_it_says_how_to_make_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert status.main([]) == 0
    assert capsys.readouterr().out.startswith("no runs in runs/ (tandem train")


def test_names_cannot_steer_the_terminal(path: Path, tmp_path: Path) -> None:
    run = made.submitted(tmp_path / "a\x1b[31m")
    says(path, "12|12|PENDING|N/A||Pri\x1b[0mority")
    assert "\x1b" not in status.as_text([of(run)])


def test_it_imports_nothing_heavy() -> None:
    script = (
        "import sys; from launch import status, logs, cancel;"
        "heavy = {'torch', 'numpy', 'tyro', 'pydantic', 'accelerate', 'rich', 'yaml', 'submitit'} & set(sys.modules);"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (119, "119 s"),
        (120, "2 min"),
        (3_599, "59 min"),
        (3_600, "1 h"),
        (7_500, "2 h 5 min"),
        (90_000, "1 d 1 h"),
    ],
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert beats.duration(seconds) == text


@pytest.mark.parametrize("mine", [True, False])
def test_a_job_of_the_runs_number_that_is_another_is_not_cancelled(path: Path, run: Path, mine: bool) -> None:
    made.squeue(path, f"12|12|RUNNING|{made.at(30)}||None")
    where = run if mine else Path("/elsewhere")
    for name, said in (
        ("scontrol", f"echo 'JobId=12 JobName=x StdOut={where}/logs/12.log Power='"),
        ("scancel", f"touch {path}/ended"),
    ):
        (path / name).write_text(f"#!/bin/sh\n{said}\n")
        (path / name).chmod(0o755)
    if mine:
        assert cancel.main([str(run), "--wait", "0"]) == 1
    else:
        with pytest.raises(ValueError, match="job 12 is another's now"):
            cancel.main([str(run), "--wait", "0"])
    assert (path / "ended").exists() == mine


def test_a_folder_in_which_a_command_trains_is_not_submitted(tmp_path: Path) -> None:
    made.heartbeat(tmp_path / "run", pid=os.getpid(), host=process.identity(os.getpid())["host"], started=time.time())
    with pytest.raises(ValueError, match="is trained already, running"):
        submit.check_idle([tmp_path / "run"])

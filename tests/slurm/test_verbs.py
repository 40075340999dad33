"""status, logs, cancel, resubmit and sweep on a real SLURM. All jobs are there at the same time."""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import cli, folders, sweep
from launch import cluster as clusters
from tests.slurm.jobs import Submitted, checkout, scontrol, stub
from tests.starts import ROOT
from tools.slurm.cluster import Cluster

LONG = {"images": 100_000}
WORDS = ["optim.lr=1e-3,2e-3", "method.kl.weight=1,4"]


@dataclass
class Made:
    root: Path
    """The checkout that they were submitted from."""
    jobs: dict[str, Submitted]
    sweep: Path

    def __getitem__(self, name: str) -> Submitted:
        return self.jobs[name]


@pytest.fixture(scope="module")
def made(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("verbs")
    root = checkout(folder / "checkout")
    one = {"ranks_per_node": 1}
    jobs = {
        "large": stub(root, folder / "large", LONG, nodes=4, cpus_per_rank=9, **one),
        "later": stub(root, folder / "later", LONG, sbatch={"begin": "now+600"}, **one),
        "long": stub(root, folder / "long", LONG | {"rest": 20}),
        "told": stub(root, folder / "told", LONG | {"rest": 20}),
    }
    whole, elements = sweep.expand(ROOT / "configs" / "vae_fashion.yaml", [*WORDS, f"run={folder}/sweep"], seeds=2)
    for number, element in enumerate(elements):
        plan = {"images": 400 if number == 7 else 20, "rest": 20, "figures": {"psnr": 20.0 + number}}
        (whole / element.folder).mkdir(parents=True)
        (whole / element.folder / "plan.json").write_text(json.dumps(plan))
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"time": 10, **one}))
    job = sweep.plan(whole, elements, clusters.load(path), at_once=4)
    sweep.send(job, elements, command=["tandem", "sweep"], root=root)
    return Made(root, jobs, whole)


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert cli.dispatch(list(words)) == code
    return capsys.readouterr().out


def status(capsys: pytest.CaptureFixture[str], *runs: Path) -> dict[str, dict[str, Any]]:
    told = json.loads(said(capsys, "status", *map(str, runs), "--json"))
    assert told["notes"] == []
    return {Path(one["run"]).name: one for one in told["runs"]}


def test_status_says_what_each_is_at_and_why_it_waits(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    made["long"].begun()
    told = status(capsys, *(job.run for job in made.jobs.values()))
    assert (told["later"]["state"], told["later"]["why"]) == ("pending", "waits for its begin time (BeginTime)")
    assert told["large"]["state"] == "pending"
    assert told["large"]["why"] == "asks for more nodes or CPUs than the partition has (PartitionConfig)"
    long = told["long"]
    assert (long["kind"], long["job"], long["active"]) == ("slurm", made["long"].number, True)
    assert long["state"] in ("starting", "running")  # the stub has no heartbeats
    assert "BeginTime" in said(capsys, "status", str(made["later"].run))


def test_logs_are_followed_over_a_requeue_until_the_job_has_ended(made: Made) -> None:
    job = made["told"].begun()
    command = [sys.executable, "-m", "launch.cli", "logs", str(job.run), "-f", "--rank", "all"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as following:
        assert following.stdout is not None
        first = [following.stdout.readline() for _ in range(2)]
        assert any("stub 1 begins at 0" in line or "start 1" in line for line in first)
        subprocess.run(["scancel", "--signal=USR2", job.number], check=True)
        rest = following.stdout.read()
    assert following.returncode == 0
    saved = job.lines("attempts.jsonl")[1]["images"]
    for rank in (0, 1):
        assert f"[{rank}] tandem: job {job.number}, start 2, rank {rank} of 2" in rest
        assert f"[{rank}] stub 1 begins at {saved}" in rest
    assert f"USR2 at {saved} images; starts again" in rest
    assert rest.splitlines()[-1] == f"tandem: job {job.number}, start 2: done"


def test_of_an_array_only_the_element_that_asks_for_it_starts_again_and_the_results_are_shown(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = folders.elements(made.sweep)
    assert len(runs) == 8
    last = Submitted(runs[7], folders.read_json(runs[7] / "submit" / "job.json")["job"])
    last.begun(seconds=120)
    subprocess.run(["scancel", "--signal=USR2", last.number], check=True)
    limit = time.monotonic() + 120
    while {one["state"] for one in status(capsys, made.sweep).values()} != {"done"}:
        assert time.monotonic() < limit, said(capsys, "status", str(made.sweep))
        time.sleep(1)
    told = status(capsys, made.sweep)
    assert [one["starts"] for one in told.values()] == [1] * 7 + [2], last.said()
    assert [one["job"] for one in told.values()] == [f"{last.number.partition('_')[0]}_{n}" for n in range(8)]
    ends = [Submitted(run, "").ends() for run in runs]
    assert ends == [[(0, None)]] * 7 + [[(75, "asked"), (0, None)]]
    assert all(len(list((run / "logs").glob("*_0.log"))) == 1 for run in runs)
    assert len(list(made.sweep.glob("submit.*/code"))) == 1
    text = said(capsys, "status", str(made.sweep))
    assert f"{made.sweep}: all runs are done" in text
    assert "20.5 ± 0.71" in text and "26.5 ± 0.71" in text
    table = json.loads(said(capsys, "sweep", "--table", str(made.sweep), "--json"))
    assert [row["done"] for row in table["groups"]] == [2] * 4
    assert table["groups"][1]["values"] == {"optim.lr": "1e-3", "method.kl.weight": "4"}
    assert table["groups"][1]["figures"]["psnr"]["mean"] == 22.5
    lines = (made.sweep / "results.csv").read_text().splitlines()
    assert len(lines) == 9 and lines[0] == "run,optim.lr,method.kl.weight,seed,psnr"


def test_an_array_larger_than_slurm_takes_is_refused_with_its_number(made: Made) -> None:
    most = next(line.split()[-1] for line in scontrol("show", "config").splitlines() if "MaxArraySize" in line)
    words = ["sweep", str(ROOT / "configs" / "vae_fashion.yaml"), f"run={made.sweep}2", "--seeds", str(int(most) + 1)]
    with pytest.raises(
        ValueError, match=rf"{int(most) + 1:,} elements: SLURM takes arrays of at most {int(most):,} here"
    ):
        cli.dispatch([*words, "--cluster", str(ROOT / "configs" / "cluster" / "cpu.yaml"), "cluster.nodes=1"])
    assert not made.sweep.with_name("sweep2").exists()


def test_what_is_cancelled_stays_so_until_it_is_submitted_again_with_the_code_it_had(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    job = made["long"].begun()
    with pytest.raises(ValueError, match="is on its way: "):
        cli.dispatch(["resubmit", str(job.run)])
    names = ("long", "later", "large")
    told = said(capsys, "cancel", *(str(made[name].run) for name in names)).splitlines()
    assert sorted(told) == sorted(
        [
            f"{made['large'].run}: cancelled; nothing was saved",
            f"{made['later'].run}: cancelled; nothing was saved",
            next(line for line in told if line.startswith(f"{job.run}: cancelled; saved at ")),
        ]
    )
    assert said(capsys, "cancel", str(job.run)) == f"{job.run}: is over already: cancelled\n"
    assert status(capsys, job.run)["long"]["state"] == "cancelled"

    main = made.root / "trainer" / "__main__.py"
    main.write_text(main.read_text().replace("VERSION = 1", "VERSION = 2"))
    (job.run / "plan.json").write_text(json.dumps({"images": 1}))  # what is saved is more: ends at once
    (job.run / "failed").write_text("nobody should\n")
    with pytest.raises(ValueError, match=r"is marked as failed \(nobody should\); read .* then --force"):
        cli.dispatch(["resubmit", str(job.run)])
    words = ("resubmit", str(job.run), "cluster.name=again", "--force")
    again = Submitted(job.run, said(capsys, *words).split()[1].rstrip(":")).wait()
    assert again.state() == "COMPLETED" and again.show()["JobName"] == "again", again.said()
    assert "stub 1 begins at " in again.log(0)
    assert status(capsys, job.run)["long"]["state"] == "done"
    assert (job.run / f"submit.{job.number}" / "job.json").exists()
    with pytest.raises(ValueError, match="is done; for more"):
        cli.dispatch(["resubmit", str(job.run)])

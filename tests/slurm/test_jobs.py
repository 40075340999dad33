"""What happens to jobs on a real SLURM. All of them run at the same time; each test looks at one of them."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from launch import cluster as clusters
from launch import submit
from tests.slurm.jobs import Submitted, checkout, scontrol, stub
from tests.starts import ROOT
from tools.slurm.cluster import Cluster
from trainer import config as configuration

LONG = {"images": 100_000}
SHORT = {"images": 40}


@dataclass
class Jobs:
    root: Path
    jobs: dict[str, Submitted]

    def __getitem__(self, name: str) -> Submitted:
        return self.jobs[name]


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """All submitted, and what is to happen to them from outside has happened; node3 comes back at the end."""
    folder = tmp_path_factory.mktemp("jobs")
    root = checkout(folder / "checkout")
    on = {name: {"sbatch": {"nodelist": name}} for name in ("node1", "node4")}
    late = {"begin": "now+4"}
    found = {
        "lost": stub(
            root,
            folder / "lost",
            LONG | {"rest": 10, "fail": {"rank": 0, "after": 60, "how": "1"}},
            nodes=2,
            sbatch={"nodelist": "node[2-3]"},
        ),
        "preempted": stub(root, folder / "preempted", LONG | {"rest": 10}, **on["node1"], cpus_per_rank=4),
        "limit": stub(
            root, folder / "limit", LONG | {"rest": 10}, time=1, signal_lead=30, time_limits=1, **on["node4"]
        ),
        "cancelled": stub(root, folder / "cancelled", LONG, **on["node4"]),
        "killed": stub(
            root,
            folder / "killed",
            SHORT | {"fail": {"rank": 1, "after": 10, "how": "kill"}},
            requeues=1,
            **on["node4"],
        ),
        "mistaken": stub(
            root, folder / "mistaken", LONG | {"fail": {"rank": 1, "after": 10, "how": "2"}}, **on["node4"]
        ),
        "hung": stub(
            root,
            folder / "hung",
            SHORT | {"fail": {"rank": 1, "after": 10, "how": "70"}},
            requeues=1,
            **on["node4"],
        ),
        "looped": stub(root, folder / "looped", SHORT | {"fail": {"rank": 0, "after": 10, "how": "72"}}, **on["node4"]),
        "fixed": stub(root, folder / "fixed", LONG, sbatch={"nodelist": "node4"}),
        "uneven": stub(root, folder / "uneven", SHORT, srun=["--ntasks=1"], **on["node4"]),
        "blind": stub(
            root,
            folder / "blind",
            SHORT,
            ranks_per_node=None,
            gpus_per_node=2,
            srun=["--gpus-per-task=1"],
            **on["node4"],
        ),
        "queued": stub(
            root, folder / "queued", SHORT, gpus_per_node=2, ranks_per_node=None, sbatch={"nodelist": "node4", **late}
        ),
    }
    path = root / "trainer" / "__main__.py"
    path.write_text(path.read_text().replace("VERSION = 1", "VERSION = 2"))
    shutil.rmtree(root / "launch")
    (folder / "queued.yaml").unlink()
    everything = Jobs(root, found)

    found["lost"].begun()
    cluster.fail("node3")
    found["preempted"].begun()
    scontrol("update", f"JobId={found['fixed'].begun().number}", "Requeue=0")
    subprocess.run(["scancel", "--signal=USR2", found["fixed"].number], check=True)
    subprocess.run(
        ["sbatch", "-p", "high", "-w", "node1", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1"], check=True
    )
    return everything


def test_a_queued_job_runs_the_code_that_was_submitted(jobs: Jobs) -> None:
    done = jobs["queued"].wait()
    assert done.state() == "COMPLETED", done.said()
    assert "stub 1 begins at 0" in done.log(0) and "rank 1 of 2 on node4" in done.log(1)  # each saw both GPUs
    assert not (jobs.root / "launch").exists() and "VERSION = 2" in (jobs.root / "trainer" / "__main__.py").read_text()


def test_a_preempted_job_saves_and_goes_on_as_the_code_that_was_submitted(jobs: Jobs) -> None:
    done = jobs["preempted"].wait()
    assert done.state() == "COMPLETED", done.said()
    assert done.ends() == [(75, "asked"), (0, None)]
    first, second = done.lines("attempts.jsonl")
    assert (first["images"], first["restart"], second["restart"]) == (0, 0, 1)
    assert f"USR2 at {second['images']} images; starts again" in done.log()
    for rank in (0, 1):
        assert "stub 1 begins at 0" in done.log(rank) and f"stub 1 begins at {second['images']}" in done.log(rank)
    assert "start 2, rank 1 of 2 on node1" in done.log(1)
    assert not (done.run / "requeue").exists()


def test_a_cancelled_job_is_not_started_again_and_its_folder_is_free(jobs: Jobs) -> None:
    job = jobs["cancelled"].begun()
    config = configuration.load(ROOT / "configs" / "vae_fashion.yaml", [f"run={job.run}"])
    with pytest.raises(ValueError, match=rf"run: \S+ is job {job.number}, (starting|running); end it"):
        submit.check_free(job.run, config)
    for words in (["--signal=USR2"], []):  # the second in which the ranks ask to be started again
        subprocess.run(["scancel", *words, job.number], check=True)
    job.wait()
    assert job.state() == "CANCELLED" and job.show()["Restarts"] == "0"
    assert job.ends() in ([], [(75, None)])  # SLURM may kill the batch script before it has come to its end
    assert not (job.run / "requeue").exists()
    submit.check_free(job.run, config)


def test_a_killed_rank_ends_the_job_at_once_and_it_starts_again_as_often_as_configured(jobs: Jobs) -> None:
    done = jobs["killed"].wait()
    assert done.state() == "FAILED"
    assert done.ends() == [(137, "failure"), (137, None)], done.said()
    assert "rank 1 on node4: a rank was killed; 0 more after this one; starts again" in done.log()
    assert "requeues: 1 starts after failures are used up" in done.log()


def test_a_mistake_of_the_user_is_not_tried_again(jobs: Jobs) -> None:
    done = jobs["mistaken"].wait()
    assert done.show()["ExitCode"] == "2:0"
    assert done.ends() == [(2, None)]
    assert f"see {done.run}/logs/{done.number}_1.log" in done.log()
    assert done.log(1).splitlines()[-1] == "tandem: error: as planned"


def test_a_hang_is_tried_again_as_often_as_configured(jobs: Jobs) -> None:
    done = jobs["hung"].wait()
    assert done.state() == "FAILED" and done.show()["ExitCode"] == "70:0"
    assert done.ends() == [(70, "failure"), (70, None)], done.said()
    assert (
        "start 1: a rank hung; its name is in the log and its stack in stacks/; 0 more after this one; starts again"
        in done.log()
    )


def test_a_crash_loop_ends_the_job_with_its_reason(jobs: Jobs) -> None:
    done = jobs["looped"].wait()
    assert done.ends() == [(72, None)], done.said()
    assert f"3 starts in a row at 0 images; {done.run}/failed says more" in done.log()


def test_a_requeue_that_slurm_refuses_is_told_with_its_reason(jobs: Jobs) -> None:
    done = jobs["fixed"].wait()
    assert done.state() == "FAILED"
    assert "SLURM refused to start it again" in done.log() and "(--no-requeue)" in done.log()


@pytest.mark.parametrize(
    ("name", "word"), [("uneven", "1 nodes x 2 ranks were asked for, 1 ranks came up"), ("blind", "2 GPUs a node")]
)
def test_a_world_that_was_not_asked_for_ends_the_job_with_the_reason(name: str, word: str, jobs: Jobs) -> None:
    done = jobs[name].wait()
    assert done.show()["ExitCode"] == "2:0", done.said()
    assert done.ends() == [(2, None)]
    assert f"tandem: error: {word}" in done.log(0)


def test_a_job_goes_on_after_its_time_limit_as_often_as_configured(jobs: Jobs) -> None:
    done = jobs["limit"].wait()
    assert done.state() == "COMPLETED", done.said()
    assert done.ends() == [(75, "time limit"), (0, None)]
    assert "at the time limit, 0 more after it; starts again" in done.log()


def test_a_job_that_loses_a_node_starts_again_though_its_other_ranks_failed_first(jobs: Jobs, cluster: Cluster) -> None:
    job = jobs["lost"]
    job.wait("PENDING", seconds=90)
    cluster.begin("node3")
    job.wait()
    assert job.state() == "COMPLETED", job.said()
    first, second = job.lines("attempts.jsonl")
    assert (first["restart"], second["restart"]) == (0, 1)
    if job.ends()[:-1]:  # SLURM may kill the batch script before it has come to its end
        assert job.ends() == [(1, None), (0, None)] and "node3 was lost" in job.log()


def test_what_slurm_refuses_is_one_line_and_leaves_nothing(
    cluster: Cluster, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cluster.yaml"
    for asked, why in (
        ({"partition": "nowhere"}, "sbatch: Invalid partition name specified"),
        ({"memory": "900T"}, "sbatch: Requested node configuration is not available"),
        ({"constraint": "h100"}, "sbatch: Invalid feature specification"),
    ):
        path.write_text(yaml.safe_dump({"time": 10, **asked}))
        config = configuration.load(ROOT / "configs" / "vae_fashion.yaml", [f"run={tmp_path}/a/run", "batch=80"])
        with pytest.raises(ValueError, match=why) as raised:
            submit.submit(submit.plan(config, clusters.load(path)), config, command=[], root=tmp_path)
        assert "\n" not in str(raised.value)
        assert capfd.readouterr() == ("", "")
        assert not (tmp_path / "a").exists()

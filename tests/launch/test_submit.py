"""What `tandem submit` would hand to SLURM, and what it refuses, without one."""

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from launch import cluster as clusters
from launch import folders, slurm, snapshot, submit
from launch.rank import Rank
from tests import starts
from trainer import config as configuration

VAE = str(starts.ROOT / "configs" / "vae_fashion.yaml")


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert submit.main([VAE, *words, "--dry-run"]) == 0
    return capsys.readouterr().out


def asks(folder: Path, **keys: object) -> tuple[str, str]:
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump({"time": "1-00:00:00", **keys}))
    return ("--cluster", str(path))


@pytest.fixture
def no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.parametrize("name", ["slurm", "cpu", "container"])
def test_a_dry_run_shows_script_and_command_without_slurm_and_writes_nothing(
    name: str, no_slurm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = shown(capsys, "--cluster", str(starts.ROOT / "configs" / "cluster" / f"{name}.yaml"), "batch=64")
    run = tmp_path / "runs" / "vae_fashion"
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash" and "#SBATCH --nodes=2" in lines and "#SBATCH --requeue" in lines
    assert f"{run}/submit/config.yaml" in lines[-1] and "trainer" in lines[-1]
    (srun,) = [shlex.split(line) for line in lines if line.startswith("srun")]
    assert "--kill-on-bad-exit=1" in srun and f"--output={run}/logs/%j_%t.log" in srun
    assert ("apptainer" in srun) == (name == "container")
    assert list(tmp_path.iterdir()) == []
    assert subprocess.run(["/bin/bash", "-n"], input=text, text=True).returncode == 0


def test_every_key_is_in_the_script_and_what_a_shell_could_read_is_quoted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nasty = "a b; $(touch HERE) `x` 'y'"
    asked = asks(
        tmp_path,
        partition="gpu",
        nodes=4,
        gpus_per_node=8,
        gpu="h100",
        cpus_per_rank=12,
        memory="400G",
        account="vision",
        qos="long",
        constraint="ib&nvme",
        exclude="gpu[07-09]",
        reservation="days",
        name=nasty,
        mail={"address": "a@b.org", "events": ["FAIL", "REQUEUE"]},
        setup=["module load cuda/12.8", "source $HOME/venv/bin/activate"],
        environment={"NCCL_SOCKET_IFNAME": "ib0", "NASTY": nasty},
        python="python3.11",
        sbatch={"exclusive": True, "nice": 100},
        srun=["--cpu-bind=cores"],
        requeues=5,
        time_limits=7,
        signal_lead=300,
    )
    text = shown(capsys, *asked, f"run={tmp_path}/run; touch HERE", "batch=64")
    lines = text.splitlines()
    for option in (
        "partition=gpu", "nodes=4", "ntasks-per-node=8", "gpus-per-node=h100:8", "cpus-per-task=12", "mem=400G",
        "account=vision", "qos=long", "constraint='ib&nvme'", "exclude='gpu[07-09]'", "reservation=days",
        f"job-name={shlex.quote(nasty)}", "mail-user=a@b.org", "mail-type=FAIL,REQUEUE", "exclusive", "nice=100",
        "time=1440", "signal=USR2@300",
    ):  # fmt: skip
        assert f"#SBATCH --{option}" in lines, option
    assert "module load cuda/12.8" in lines and "source $HOME/venv/bin/activate" in lines
    assert f"export NASTY={shlex.quote(nasty)}" in lines
    assert lines.index("module load cuda/12.8") < lines.index("export NCCL_SOCKET_IFNAME=ib0")
    assert "--requeues=5 --lead=300 --time-limits=7" in text
    (srun,) = [shlex.split(line) for line in lines if line.startswith("srun")]
    assert {"--cpu-bind=cores", "--cpus-per-task=12", "python3.11"} <= set(srun)

    # the script itself, with programs that do nothing
    (tmp_path / "bin").mkdir()
    for name in ("srun", "python3.11", "module"):
        (tmp_path / "bin" / name).write_text('#!/bin/sh\nprintf "%s\\n" "$NASTY" "$@" >> "$OUT"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "run; touch HERE" / "submit" / "code").mkdir(parents=True)
    home = {"HOME": str(tmp_path), "OUT": str(tmp_path / "out"), "PATH": f"{tmp_path}/bin:/usr/bin:/bin"}
    subprocess.run(["/bin/bash"], input=text, text=True, cwd=tmp_path, env=home, timeout=60)
    assert nasty in (tmp_path / "out").read_text().splitlines()
    assert not list(tmp_path.rglob("HERE"))


def test_the_users_lines_keep_no_start_from_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shell options and names of variables that they leave behind, while srun ends with the code of a saved run."""
    asked = asks(
        tmp_path, setup=["set -euo pipefail", "run=elsewhere log=elsewhere code=0"], python="python3.11",
        environment={"NCCL_IB_DISABLE": 1, "told": "TERM"},
    )  # fmt: skip
    text = shown(capsys, *asked, f"run={tmp_path}/run")
    (tmp_path / "bin").mkdir()
    for name, body in (("srun", "exit 75"), ("python3.11", 'printf "%s\\n" "$NCCL_IB_DISABLE" "$@" >> "$OUT"')):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "run" / "submit" / "code").mkdir(parents=True)
    home = {"HOME": str(tmp_path), "OUT": str(tmp_path / "out"), "PATH": f"{tmp_path}/bin:/usr/bin:/bin"}
    subprocess.run(["/bin/bash"], input=text, text=True, cwd=tmp_path, env=home, timeout=60)
    words = (tmp_path / "out").read_text().splitlines()
    assert words[0] == "1" and "launch.after" in words and "--told=" in words
    assert words[-2:] == [f"{tmp_path}/run", "75"]


def test_a_container_binds_what_the_run_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    box = {"image": "my image.sif", "binds": ["/data:/data:ro"], "arguments": ["--cleanenv"], "python": "/opt/py"}
    text = shown(capsys, *asks(tmp_path, gpus_per_node=2, container=box), f"run={tmp_path}/run")
    (srun,) = [shlex.split(line) for line in text.splitlines() if line.startswith("srun")]
    command = srun[srun.index("apptainer") :]
    run = f"{tmp_path}/run"
    assert command == [
        "apptainer", "exec", "--nv", "--bind", str(Path.cwd()), "--bind", run, "--bind", "/data:/data:ro",
        "--pwd", f"{run}/submit/code", "--cleanenv", "my image.sif", "/opt/py", "-u", "-m", "submitit.core._submit",
        f"{run}/submit/submitit",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["batch=63"], "batch: 63 does not divide among 4 ranks"),
        (["parallel.processes=3"], "parallel.processes: 3 are asked for, the cluster's config gives 4"),
        (["run=runs/100%"], "run: SLURM cannot have logs in"),
        (["cluster.nodes=two"], "command line: nodes: "),
        (["cluster.time=1"], "time: 1 minutes are short of"),
        (["--cluster.nodes=0"], "nodes: 0 must be at least 1"),
        (["--optim.rate=1"], "command line: unknown key optim.rate"),
        (["--dry-ran"], "command line: '--dry-ran' is no key=value"),
        (["cluster.nodes=0"], "nodes: 0 must be at least 1"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as raised:
        submit.main([VAE, *words, "--cluster", str(starts.ROOT / "configs" / "cluster" / "cpu.yaml")])
    assert said in str(raised.value) and "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_without_slurm_it_says_so_and_writes_nothing(
    no_slurm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"sbatch and srun: not found; .*--dry-run"):
        submit.main([VAE, "--cluster", str(starts.ROOT / "configs" / "cluster" / "cpu.yaml")])
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_finished_or_failed_is_refused_and_one_that_has_more_to_do_is_not(tmp_path: Path) -> None:
    config = configuration.load(Path(VAE), [f"run={tmp_path}/run", "images=640"])
    saved = tmp_path / "run" / "checkpoints" / "000000000640"
    saved.mkdir(parents=True)
    with pytest.raises(ValueError, match="is finished, at 640 of 640 images; raise `images`"):
        submit.check_free(config.run, config)
    submit.check_free(config.run, configuration.load(Path(VAE), [f"run={tmp_path}/run", "images=641"]))
    (config.run / "failed").write_text("crash loop\nmore")
    with pytest.raises(ValueError, match=r"is marked as failed \(crash loop\); remove"):
        submit.check_free(config.run, config)


@pytest.mark.parametrize("refused", [True, False])
def test_a_submission_that_fails_gives_the_folder_back_but_not_once_the_job_is_slurms(
    refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration.load(Path(VAE), [f"run={tmp_path}/run"])
    job = submit.plan(config, clusters.load(starts.ROOT / "configs" / "cluster" / "cpu.yaml"))
    (job.submit / "code").mkdir(parents=True)
    (job.submit / "job.json").write_text(json.dumps({"job": "12"}))

    def send(self: slurm.Job) -> dict[str, str]:
        if refused:
            raise ValueError("sbatch: no")
        return {"job": "13"}

    def full(path: Path, value: object) -> None:
        if path.name == "job.json":
            raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(slurm.Job, "send", send)
    monkeypatch.setattr(slurm.Job, "check", lambda self: None)
    monkeypatch.setattr(submit, "check_idle", lambda runs: None)
    monkeypatch.setattr(folders, "write_json", full)
    monkeypatch.setattr(submit, "describe", dict)
    with pytest.raises((ValueError, OSError), match="sbatch: no" if refused else "No space left"):
        submit.submit(job, config, command=[], root=starts.ROOT)
    assert (job.submit / "config.yaml").exists() == (not refused)
    assert (job.submit / "code" / "trainer").exists() == (not refused)
    assert (job.run / "submit.12").exists() == (not refused)


def test_an_earlier_submission_is_kept_by_its_job_and_a_broken_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "submit" / "code").mkdir(parents=True)
    assert submit.set_aside(tmp_path / "submit") is None and not (tmp_path / "submit").exists()
    (tmp_path / "submit").mkdir()
    (tmp_path / "submit" / "job.json").write_text(json.dumps({"job": "12"}))
    assert submit.set_aside(tmp_path / "submit") == tmp_path / "submit.12"


def test_two_submissions_of_one_run_at_once_are_refused(tmp_path: Path) -> None:
    again = submit.alone(tmp_path)
    with submit.alone(tmp_path), pytest.raises(ValueError, match="another `tandem submit` is at work"), again:
        pass


def test_the_notice_is_as_long_as_the_last_save_needs(tmp_path: Path) -> None:
    config = configuration.load(Path(VAE), [f"run={tmp_path}/run"])
    asked = clusters.load(starts.ROOT / "configs" / "cluster" / "cpu.yaml")
    assert submit.plan(config, asked).lead == 120
    (tmp_path / "run" / "heartbeats").mkdir(parents=True)
    (tmp_path / "run" / "heartbeats" / "rank00000.json").write_text('{"save_seconds": 200.5}')
    assert submit.plan(config, asked).lead == 401


def test_inside_a_job_its_variables_are_hidden_from_sbatch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBATCH_NO_REQUEUE", "1")  # a shell's, which would win over the script
    with slurm.outside_a_job():
        assert "SBATCH_NO_REQUEUE" not in os.environ
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_CONF"):
        monkeypatch.setenv(name, "7")
    with slurm.outside_a_job():
        assert not {"SLURM_NTASKS", "SBATCH_NO_REQUEUE"} & set(os.environ) and os.environ["SLURM_CONF"] == "7"
    assert os.environ["SLURM_NTASKS"] == "7"


# ---------------------------------------------------------------- a rank
RANK = Rank(config="/c.yaml", code="/code", folder="/", nodes=2, ranks=4, gpus=4, cpus=3, keep=("MASTER_PORT",))
WORLD = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "8", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"SLURM_STEP_NUM_TASKS": "1"}, "2 nodes x 4 ranks were asked for, 1 ranks came up"),
        ({"SLURM_STEP_NUM_NODES": "1"}, "1 nodes came up"),
        ({"CUDA_VISIBLE_DEVICES": "0"}, "4 GPUs a node were asked for"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "shows 0"),
    ],
)
def test_a_rank_finds_a_world_that_was_not_asked_for(change: dict[str, str], said: str | None) -> None:
    found = RANK.fault(WORLD | change)
    assert (found is None) if said is None else (found is not None and said in found)


def test_a_rank_takes_nothing_that_another_launcher_left() -> None:
    given = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "5", "PYTHONPATH": "/mine", "OMP_NUM_THREADS": "2"}
    found = RANK.environment(given | WORLD)
    assert "RANK" not in found and "WORLD_SIZE" not in found and found["MASTER_PORT"] == "5"
    assert found["PYTHONPATH"] == "/code:/mine" and found["OMP_NUM_THREADS"] == "2"
    assert RANK.environment(WORLD)["OMP_NUM_THREADS"] == "3"
    assert RANK.environment(WORLD)["TANDEM_GPUS"] == "4"


# ---------------------------------------------------------------- the snapshot
def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True)


def test_the_snapshot_is_the_working_tree_that_git_knows(tmp_path: Path) -> None:
    root = tmp_path / "checkout"
    for name in ("trainer/a.py", "trainer/gone.py", "docs/b.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("old")
    (root / ".gitignore").write_text("*.log\n")
    (root / "link.py").symlink_to("trainer/a.py")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-qm", "first")
    (root / "trainer" / "a.py").write_text("changed")
    (root / "trainer" / "gone.py").unlink()
    (root / "trainer" / "new.py").write_text("new")
    (root / "trainer" / "x.log").write_text("ignored")
    (root / "huge.bin").write_text("a run that lies in the checkout, not in a package")
    found = snapshot.take(tmp_path / "copy", root=root)
    copied = {
        str(path.relative_to(tmp_path / "copy")): path for path in (tmp_path / "copy").rglob("*") if path.is_file()
    }
    assert set(copied) == {".gitignore", "docs/b.md", "link.py", "trainer/a.py", "trainer/new.py"}
    assert copied["trainer/a.py"].read_text() == "changed"
    assert not copied["link.py"].is_symlink()
    assert found.commit is not None and len(found.commit) == 40
    assert found.changed == ("trainer/a.py", "trainer/gone.py", "trainer/new.py")


def test_the_snapshot_of_an_installed_package_is_its_packages(tmp_path: Path) -> None:
    for name in ("trainer/a.py", "trainer/__pycache__/a.pyc", "launch/b.py", "numpy/c.py"):
        (tmp_path / "site" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / name).touch()
    assert snapshot.take(tmp_path / "copy", root=tmp_path / "site") == snapshot.Snapshot(commit=None)
    found = {str(path.relative_to(tmp_path / "copy")) for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    assert found == {"trainer/a.py", "launch/b.py"}

"""A launcher that started fewer processes than it was asked for is found and refused."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests import starts
from trainer.parallel import launcher

ROOT = Path(__file__).resolve().parents[2]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli"]


@pytest.fixture(autouse=True)
def nobody_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


def write_config(folder: Path, data: Path) -> Path:
    path = folder / "vae.yaml"
    path.write_text(
        f"run: {folder}/run\nimages: 64\nbatch: 16\n"
        f"data: {{kind: shards, path: {data}, size: 28, channels: 1}}\nmethod: {{kind: vae}}\n"
    )
    return path


def test_accelerate_launch_that_starts_one_of_two_is_refused_in_one_line(tmp_path: Path, fashion: Path) -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process and says nothing of it."""
    command = [*ACCELERATE, "launch", "--cpu", "--num_processes", "2", "--mixed_precision", "no", "-m", "trainer"]
    process = subprocess.Popen(
        [*command, str(write_config(tmp_path, fashion))],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "HF_HOME": str(tmp_path)},
    )
    try:
        _, said = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    (line,) = [line for line in said.splitlines() if line.startswith("tandem: error:")]
    assert "2 processes were asked for by accelerate launch --num_processes, 1 came up" in line
    assert "--processes 2" in line and "torchrun --nproc-per-node 2" in line
    # accelerate reports the trainer's exit code in its own words, and ends with its own
    assert "returned non-zero exit status 2" in said
    assert process.returncode != 0
    assert not (tmp_path / "run").exists()


def parent(monkeypatch: pytest.MonkeyPatch, *argv: str) -> None:
    monkeypatch.setattr(launcher, "_command_line", lambda pid: list(argv))


def test_a_multi_cpu_config_file_says_how_many_were_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cpu.yaml"
    path.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_processes: 3\nuse_cpu: true\n"
    )
    parent(monkeypatch, "python", "/bin/accelerate", "launch", "--config_file", str(path), "-m", "trainer", "c.yaml")
    assert launcher.asked_processes() == (3, f"num_processes in {path}")


@pytest.mark.parametrize(
    ("argv", "asked"),
    [
        (["python", "/venv/bin/accelerate", "launch", "--num_processes", "4", "-m", "trainer", "c.yaml"], 4),
        (["python", "/venv/bin/accelerate", "launch", "--num_processes=4", "-m", "trainer", "c.yaml"], 4),
        (["python", "-m", "accelerate.commands.launch", "--num_processes", "2", "-m", "trainer", "c.yaml"], 2),
        (["python", "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2", "c.py"], 2),
    ],
)
def test_every_way_to_call_accelerate_is_read(monkeypatch: pytest.MonkeyPatch, argv: list[str], asked: int) -> None:
    parent(monkeypatch, *argv)
    assert launcher.asked_processes() == (asked, "accelerate launch --num_processes")


@pytest.mark.parametrize("argv", [[], ["bash"], ["python", "-m", "pytest"], ["tandem", "train", "launch.yaml"]])
def test_a_parent_that_is_no_launcher_asked_for_nothing(monkeypatch: pytest.MonkeyPatch, argv: list[str]) -> None:
    parent(monkeypatch, *argv)
    assert launcher.asked_processes() is None


def test_torchrun_says_it_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert launcher.asked_processes() == (8, "WORLD_SIZE")


def test_srun_of_several_tasks_without_a_process_group_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    parent(monkeypatch, "slurmstepd: [12.0]")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert launcher.asked_processes() == (4, "srun (SLURM_STEP_NUM_TASKS)")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert launcher.asked_processes() is None


@pytest.mark.parametrize(
    ("listed", "host"),
    [
        ("localhost", "localhost"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[03-05,09],login1", "gpu03"),
        ("gpu[7,9]", "gpu7"),
        ("rack[1-2]-ib", "rack1-ib"),
    ],
)
def test_the_first_host_of_slurms_list(listed: str, host: str) -> None:
    assert launcher._first_host(listed) == host


@pytest.mark.parametrize(("node", "tasks"), [("0", "2"), ("2", "2"), ("3", "1")])
def test_the_tasks_of_a_machine_from_slurms_list(node: str, tasks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NODEID", node)
    assert launcher._tasks_here("2(x3),1") == tasks


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WORLD_SIZE", "abc"),
        ("WORLD_SIZE", "0"),
        ("RANK", "x"),
        ("LOCAL_RANK", "-1"),
        ("MASTER_PORT", "99999"),
        ("MASTER_PORT", "٣"),
        ("ACCELERATE_GRADIENT_CLIPPING", "abc"),
    ],
)
def test_a_variable_that_is_no_number_is_named(name: str, value: str, few: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, few)
    given = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    deepspeed = {"ACCELERATE_USE_DEEPSPEED": "true"} if name.startswith("ACCELERATE") else {}
    starts.each(tmp_path / "logs", ([str(config)], given | deepspeed | {name: value})).wait().refused(
        f"{name}: {value!r}"
    )


def test_gpus_that_torch_does_not_find_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher.check_gpus(0)
    monkeypatch.setenv("TANDEM_GPUS", "8")
    monkeypatch.setenv("SLURMD_NODENAME", "gpu07")
    launcher.check_gpus(8)
    with pytest.raises(ValueError, match="8 GPUs a node were asked for, torch finds 0 on gpu07"):
        launcher.check_gpus(0)


def test_each_start_of_each_job_meets_on_a_port_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = {launcher._port(job, 0, restart) for job in range(1_000, 1_700) for restart in range(7)}
    assert len(ports) == 700 * 7 and min(ports) >= 20_000 and max(ports) < 32_000
    assert launcher._port(12, 0, 0) != launcher._port(12, 1, 0)
    for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    job = {"SLURM_JOB_ID": "12", "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_RESTART_COUNT": "2", "SLURM_LOCALID": "1"}
    for name, value in (job | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_NODEID": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "2(x2)")
    parent(monkeypatch, "slurmstepd")
    launcher.take_srun()
    try:
        assert os.environ["MASTER_PORT"] == str(20_000 + 7 * 12 + 2) and os.environ["MASTER_ADDR"] == "gpu03"
        assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_WORLD_SIZE"]) == ("3", "4", "2")
    finally:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)


def test_ranks_of_a_job_whose_port_another_program_has_end_with_the_code_of_another_start(
    few: Path, tmp_path: Path
) -> None:
    """Whatever that program does with who knocks there; launch.after starts the job again, on the next port."""
    job, port = next((job, found) for job in range(1, 2_000) if not taken(found := launcher._port(job, 0, 0)))
    with socket.create_server(("127.0.0.1", port)) as server:
        threading.Thread(target=turn_away, args=(server,), daemon=True).start()
        shared = {
            "SLURM_JOB_ID": str(job), "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost",
            "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_ID": "0", "SLURM_NODEID": "0",
        }  # fmt: skip
        ranks = [shared | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in (0, 1)]
        words = [str(write_config(tmp_path, few)), "parallel.timeout=5"]  # srun ends rank 1 before that
        ended = starts.each(tmp_path / "logs", *((words, mine) for mine in ranks)).wait()
    assert ended.codes == [69, 69], ended.err
    assert f"rank 0 cannot listen on port {port}, this start's (Address already in use)" in ended.err
    assert not (tmp_path / "run").exists()


def taken(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def turn_away(server: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            server.accept()[0].close()

"""Every shipped file of accelerate starts what it says; srun and torchrun bring up the same world."""

import re
from pathlib import Path

import pytest
import yaml

from tests import starts
from tests.parallel.launches import ACCELERATE, gan, launched, of_one_process, same_losses
from trainer import config as configuration
from trainer.parallel.config import DDPConfig, DeepSpeedConfig

FOLDER = starts.ROOT / "configs" / "accelerate"
SHIPPED = sorted(path.stem for path in FOLDER.glob("*.yaml"))
RUN = {  # on this machine; those of several machines run in test_machines.py
    "one": pytest.param("one", 1, DDPConfig(), marks=pytest.mark.slow),
    "ddp": pytest.param("ddp", 2, DDPConfig()),
    **{
        f"zero{stage}": pytest.param(
            f"zero{stage}",
            2,
            DeepSpeedConfig(stage=stage, file=Path(f"configs/deepspeed/zero{stage}.json")),  # type: ignore[arg-type]
            marks=[] if stage == 3 else pytest.mark.slow,
        )
        for stage in (1, 2, 3)
    },
}
MACHINES = {"ddp_machines", "zero2_machines"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, few: Path) -> dict[str, dict[int, float]]:
    return of_one_process(tmp_path_factory.mktemp("alone"), few)


# ---------------------------------------------------------------- the shipped files
def test_every_shipped_file_is_run_by_a_test_and_has_its_line_in_the_readme() -> None:
    assert set(SHIPPED) == set(RUN) | MACHINES
    page = (FOLDER / "README.md").read_text()
    assert set(re.findall(r"\[(\w+)\.yaml\]\(\1\.yaml\)", page)) == set(SHIPPED)
    shipped = {path.stem for path in (starts.ROOT / "configs" / "deepspeed").glob("*.json")}
    assert set(re.findall(r"\]\(\.\./deepspeed/(\w+)\.json\)", page)) == shipped


@pytest.mark.parametrize("name", SHIPPED)
def test_accelerate_reads_it_and_nothing_in_it_is_without_effect(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    path = FOLDER / f"{name}.yaml"
    found = load_config_from_file(str(path))  # refuses words that it does not know
    tree = yaml.safe_load(path.read_text())
    assert found.num_processes == (1 if name == "one" else 2) and not found.use_cpu
    assert found.num_machines == (2 if name in MACHINES else 1)
    assert tree["mixed_precision"] == "no"  # precision is the run's config's
    zero = tree.get("deepspeed_config", {})
    assert bool(zero) == name.startswith("zero") == (tree["distributed_type"] == "DEEPSPEED")
    if zero:
        assert zero["deepspeed_config_file"] == f"configs/deepspeed/{name.removesuffix('_machines')}.json"
        assert zero["deepspeed_multinode_launcher"] == "standard"  # the default, pdsh, wants ssh and a host file


@pytest.mark.parametrize(("name", "world", "parallel"), RUN.values())
def test_a_shipped_file_starts_what_it_says(
    name: str,
    world: int,
    parallel: DDPConfig | DeepSpeedConfig,
    few: Path,
    alone: dict[str, dict[int, float]],
    tmp_path: Path,
) -> None:
    path = gan(tmp_path, few)
    command = [*ACCELERATE, "--config_file", f"configs/accelerate/{name}.yaml", "-m", "trainer", str(path)]
    ((code, said),) = launched([command], tmp_path)
    assert code == 0, said
    same_losses(path, alone, world=world)
    assert configuration.load(path.with_suffix("") / "config.yaml", []).parallel == parallel


# ---------------------------------------------------------------- other launchers, by their variables
def test_srun_brings_up_its_tasks_as_one_world(few: Path, alone: dict[str, dict[int, float]], tmp_path: Path) -> None:
    path = gan(tmp_path, few)
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "2"}
    step |= {"SLURM_JOB_ID": str(5_000 + abs(hash(str(tmp_path))) % 9_000), "SLURM_STEP_ID": "0"}
    each = [step | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in (0, 1)]
    starts.each(tmp_path / "logs", *(([str(path)], mine) for mine in each)).wait().ok()
    same_losses(path, alone, world=2)


def test_srun_that_says_too_little_is_refused(few: Path, tmp_path: Path) -> None:
    said = starts.each(tmp_path / "logs", ([str(gan(tmp_path, few))], {"SLURM_STEP_NUM_TASKS": "2"})).wait()
    said.refused("SLURM_PROCID", "not set", "srun python -m trainer CONFIG")


def test_half_of_torchs_variables_are_refused(few: Path, tmp_path: Path) -> None:
    half = {"RANK": "0", "WORLD_SIZE": "2"}
    said = starts.each(tmp_path / "logs", ([str(gan(tmp_path, few))], half)).wait()
    said.refused("LOCAL_RANK, MASTER_ADDR, MASTER_PORT", "not set", "torchrun")


def test_stage_0_of_the_launcher_runs_as_ddp_and_the_log_says_so(
    few: Path, alone: dict[str, dict[int, float]], tmp_path: Path
) -> None:
    path = gan(tmp_path, few)
    asked = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}
    ended = starts.each(tmp_path / "logs", ([str(path)], asked)).wait().ok()
    assert "ZeRO stage 0 shares nothing out among the ranks: it runs as parallel.kind: ddp" in ended.out
    same_losses(path, alone, world=1)
    assert configuration.load(path.with_suffix("") / "config.yaml", []).parallel == DDPConfig()


def test_a_check_is_of_the_backend_that_will_run(few: Path, tmp_path: Path) -> None:
    words = ("parallel.kind=deepspeed", "parallel.stage=0", "--processes", "2")
    said = starts.tandem(tmp_path / "logs", "check", str(gan(tmp_path, few)), *words).ok()
    assert "it runs as parallel.kind: ddp" in " ".join(said.out.split())

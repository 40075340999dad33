"""What a run may ask of a cluster, and what is refused by its key."""

from pathlib import Path

import pytest
import yaml

from launch import cluster
from launch.cluster import minutes
from tests.starts import ROOT

SHIPPED = sorted((ROOT / "configs" / "cluster").glob("*.yaml"))


def write(folder: Path, **keys: object) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump({"time": 60, **keys}))
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_file_is_one_and_comes_back_from_its_text(path: Path, tmp_path: Path) -> None:
    found = cluster.load(path)
    (tmp_path / "again.yaml").write_text(cluster.to_text(found))
    assert cluster.load(tmp_path / "again.yaml") == found
    assert f"--cluster configs/cluster/{path.name}" in path.read_text().splitlines()[0]


@pytest.mark.parametrize(
    ("time", "wanted"),
    [(90, 90), ("90", 90), ("1:30:00", 90), ("0:00:01", 1), ("2-00", 2880), ("1-02:03", 1563), ("1-02:03:04", 1564)],
)
def test_a_time_limit_is_minutes_or_as_slurm_writes_it(time: int | str, wanted: int) -> None:
    assert minutes(time) == wanted


@pytest.mark.parametrize("time", [0, -5, "1:30", "1-25:00:00", "1:61:00", "1d", "", "1e2", 10**9])
def test_another_time_limit_is_refused(time: int | str) -> None:
    with pytest.raises(ValueError, match=r"^time: "):
        minutes(time)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"partion": "a"}, "unknown key partion; did you mean partition?"),
        ({"gpus": 8}, "unknown key gpus; did you mean gpu"),
        ({"mail": {"adress": "a@b"}}, "unknown key mail.adress; did you mean mail.address?"),
        ({"kind": "slrum"}, "kind: "),
        ({"nodes": 0}, "nodes: 0 must be at least 1"),
        ({"nodes": "2"}, "nodes: "),
        ({"gpus_per_node": 8, "ranks_per_node": 4}, "ranks_per_node: 4 ranks on 8 GPUs"),
        ({"gpu": "a100"}, "gpu: a100 needs gpus_per_node"),
        ({"memory": "64 gigabytes"}, "memory: '64 gigabytes' is no number"),
        ({"environment": {"A B": "c"}}, "environment: 'A B' is no name of a variable"),
        ({"environment": {"A": "b\nrm -rf x"}}, "environment.A: "),
        ({"account": "a\n#SBATCH --nodes=9"}, "account: "),
        ({"setup": ["module load a\nb"]}, "setup: "),
        ({"sbatch": {"nodes": 4}}, "sbatch: nodes is what the key nodes says"),
        ({"sbatch": {"output": "x"}}, "sbatch: output is set by tandem"),
        ({"sbatch": {"--exclusive": True}}, "sbatch: '--exclusive' is no option"),
        ({"sbatch": {"exclusive": False}}, "sbatch: exclusive: false"),
        ({"sbatch": {"n": 3}}, "sbatch: 'n' is no option"),
        ({"sbatch": {"tim": 5}}, "sbatch: 'tim': sbatch would take it for time"),
        ({"environment": {"tandem_run": "elsewhere"}}, "environment: tandem_run: names with tandem_"),
        ({"container": {"image": "a\0b"}}, ""),
        ({"signal_lead": 3600}, "signal_lead: 3600 s leave nothing of the time limit, 3600 s"),
        ({"requeues": -1}, "requeues: -1 must be at least 0"),
        ({"time_limits": -1}, "time_limits: -1 must be at least 0"),
        ({"mail": {"address": "a@b", "events": []}}, "mail.events: name at least one"),
    ],
)
def test_a_mistake_is_named_by_file_and_key(keys: dict[str, object], said: str, tmp_path: Path) -> None:
    path = write(tmp_path, **keys)
    with pytest.raises(ValueError) as raised:
        cluster.load(path)
    assert str(raised.value).startswith(f"{path}") and said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_local_is_a_word_and_a_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = cluster.load(Path("local"), ["processes=2"])
    assert found == cluster.LocalConfig(processes=2)
    (tmp_path / "here.yaml").write_text(cluster.to_text(found))
    assert cluster.load(tmp_path / "here.yaml") == found
    for word, said in (
        ("nodes=2", "command line: unknown key nodes"),
        ("processes=0", "processes: 0 must be at least 1"),
        ("kind=here", "local: kind: 'here' is none of slurm, local"),
    ):
        with pytest.raises(ValueError, match=said):
            cluster.load(Path("local"), [word])


def test_the_time_limit_must_be_said(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("nodes: 2\n")
    with pytest.raises(ValueError, match="key time is missing"):
        cluster.load(tmp_path / "empty.yaml")


def test_an_override_of_the_command_line_is_checked_as_the_file_is(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert cluster.load(path, ["nodes=4"]).nodes == 4
    with pytest.raises(ValueError, match=r"command line: unknown key nods; did you mean nodes\?"):
        cluster.load(path, ["nods=4"])


def test_the_notice_leaves_time_for_two_saves_and_is_never_short(tmp_path: Path) -> None:
    found = cluster.load(write(tmp_path))
    assert found.lead(None) == found.lead(3.0) == 120
    assert found.lead(400.2) == 801
    assert cluster.load(write(tmp_path, signal_lead=30)).lead(400.0) == 30
    with pytest.raises(ValueError, match="time: 60 minutes are short of twice the 2000 s"):
        found.lead(1000.0)

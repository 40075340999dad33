"""The cluster program itself; all else here needs that it brings up nodes, and that one fails and comes back."""

from pathlib import Path

import pytest

from tools.slurm.__main__ import main
from tools.slurm.cluster import HOSTS, Cluster


def test_its_status_says_whether_all_is_well(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.begin("node3")
    assert main(["status", "--dir", str(cluster.dir)]) == 0
    assert "slurmctld: process " in capsys.readouterr().out
    assert main(["env", "--dir", str(cluster.dir)]) == 0
    assert f"SLURM_CONF={cluster.config}" in capsys.readouterr().out


def test_a_node_that_is_none_is_named(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fail-node", "node9", "--dir", str(cluster.dir)])
    assert "no such node: node9; there are node1, node2, node3, node4" in capsys.readouterr().err


def test_a_folder_that_cannot_hold_one_is_refused() -> None:
    for folder in ("relative", "/tmp/a b"):
        with pytest.raises(RuntimeError, match="must be absolute, without blanks"):
            Cluster(Path(folder))


def test_stopping_where_nothing_runs_changes_nothing(tmp_path: Path) -> None:
    before = HOSTS.read_text()
    Cluster(tmp_path).stop()
    Cluster(tmp_path / "none").stop()
    assert HOSTS.read_text() == before
    lines, well = Cluster(tmp_path).status()
    assert not well and "nothing is set up" in lines[0]

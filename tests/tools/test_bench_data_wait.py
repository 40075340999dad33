"""The bench of waiting reads what real runs wrote to their boards."""

import json
from pathlib import Path

import pytest

from tools.bench.data import wait


def test_each_run_gives_a_figure_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "wait.json"
    assert wait.main(["--kinds", "npy", "--readers", "0,2", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [(row["kind"], row["readers"]) for row in found["rows"]] == [("npy", 0), ("npy", 2)]
    for row in found["rows"]:
        assert len(row["rest"]) == wait.LOGS - 1
        assert all(0 <= share < 1 for share in (row["first"], *row["rest"]))
    assert len(capsys.readouterr().out.splitlines()) == 4

"""The benchmarks of backends and of precisions run, or compare what they are given. No figure is held to anything."""

import json
import math
from pathlib import Path

import pytest

from tools.bench import parallel, precision


def test_a_short_run_has_every_backend_in_one_start_and_writes_ratios_machine_and_versions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("deepspeed")
    out = tmp_path / "parallel.json"
    argv = ["--processes", "1", "--accumulate", "1,2", "--backends", "ddp,zero3-d1", "--width", "4", "--batch", "8"]
    argv += ["--seconds", "0.01", "--rounds", "2", "--out", str(out)]
    assert parallel.main(argv) == 0
    found = json.loads(out.read_text())
    assert found["command"] == "python -m tools.bench.parallel " + " ".join(argv)
    assert found["machine"]["cores"] >= 1 and "deepspeed" in found["versions"]
    cases = [(row["accumulate"], row["variant"]) for row in found["rows"]]
    assert cases == [(1, "bare"), (1, "plain"), (1, "ddp"), (1, "zero3-d1"), (2, "ddp"), (2, "zero3-d1")]
    for row in found["rows"]:
        assert row["processes"] == 1 and row["ms_per_update"] > 0
        assert ("time_of_bare" in row) == ("time_of_plain" in row) == (row["accumulate"] == 1)
        assert 0 < row["time_of_ddp"]["least"] <= row["time_of_ddp"]["median"] <= row["time_of_ddp"]["most"]
    assert "zero3-d1" in capsys.readouterr().out


def test_ratios_are_of_time_and_compare_within_their_round() -> None:
    costs = {"bare": [1.0, 2.0], "ddp": [2.0, 4.0], "zero3": [3.0, 6.0]}
    rows = {row["variant"]: row for row in parallel.rows_of(costs, processes=1, accumulate=1)}
    assert rows["zero3"]["time_of_ddp"] == {"median": 1.5, "least": 1.5, "most": 1.5}
    assert rows["zero3"]["time_of_bare"]["median"] == 3.0


def test_what_a_precision_moves_stands_beside_what_a_seed_moves() -> None:
    base = {0: {"loss/a": [9.0, 1.0]}, 1: {"loss/a": [7.0, 3.0]}}
    own = {0: {"loss/a": [9.0, 1.5]}, 1: {"loss/a": [7.0, 2.9]}}
    (row,) = precision.compare(base, own)
    assert row["base"] == 2.0 and row["own"] == 2.2  # the second half of a curve
    assert row["spread"] == 1.0
    assert math.isclose(row["moved"], 0.1)
    assert [round(pair, 9) for pair in row["pairs"]] == [0.25, 0.05]


def test_one_seed_has_no_spread(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        precision.parse(["--seeds", "0"])
    assert stopped.value.code == 2
    assert "--seeds: one seed has no spread" in capsys.readouterr().err


def test_a_run_that_fails_is_said_with_its_variant_and_seed(tmp_path: Path) -> None:
    given = precision.parse(["--config", str(tmp_path / "none.yaml")])
    with pytest.raises(OSError, match=r"bf16, seed 1: the run failed: .*none\.yaml"):
        precision.curve(tmp_path, given, "bf16", 1)

"""The bench of the plan measures what it says: real requests, and an index that the data plane accepts."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tools.bench.data import plan
from tools.bench.data.__main__ import main
from trainer.data import ShardsConfig
from trainer.data import index as indices

ROOT = Path(__file__).parents[2]
SMALL = ["--samples", "2000", "--shards", "40", "--ranks", "8", "--share", "5", "--window", "3", "--count", "4"]


def test_it_gives_times_and_memory_of_plan_and_look_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *SMALL]) == 0
    said = capsys.readouterr().out
    assert said.startswith("2,000 samples in 40 shards, window 3, 8 ranks, batch 40 (5 a rank)\n")
    rows = re.findall(r"^(.+?) +(\d+\.\d\d) +(\d+\.\d\d) +(\d+\.\d\d)$", said, flags=re.MULTILINE)
    assert [name for name, *_ in rows] == [
        "batch after batch", "anywhere: another epoch and window each", "the first of an epoch",
        "a new start at 0% of an epoch", "a new start at 95%", "batch after batch, with look-up",
    ]  # fmt: skip
    assert all(float(median) <= float(p99) <= float(most) for _, median, p99, most in rows)
    assert re.search(r"^memory of the plan: \d+ MiB$", said, flags=re.MULTILINE)
    assert re.search(r"^memory of plan and index: \d+ MiB$", said, flags=re.MULTILINE)


def test_the_order_can_be_measured_without_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *SMALL, "--no-index"]) == 0
    assert "look-up" not in capsys.readouterr().out


def test_the_made_index_is_one_of_that_many_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "LINKS", 3)
    plan.make_set(tmp_path, shards=8, each=5)
    index = indices.load(ShardsConfig(path=tmp_path, size=1), "train")
    assert index.samples == 40 and len(index.shards) == 8
    assert index.rows(np.array([0, 7, 39]))["begin"].tolist() == [0, 2 * plan.MEMBER, 4 * plan.MEMBER]
    index.close()


def test_time_and_memory_are_those_of_what_ran() -> None:
    """In a process of its own: this one has memory to give back whenever it likes."""
    ran = subprocess.run([sys.executable, "-c", MEASURE], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    few, many, grown = json.loads(ran.stdout)
    assert few < many
    assert 60 < grown < 80  # 64 MiB


MEASURE = """
import json, numpy
from tools.bench.data import plan
before, kept = plan.reset_peak(), []
few, many = plan.timed([lambda: None, lambda: kept.append(numpy.random.default_rng(0).random(8 << 20))])
print(json.dumps([few, many, plan.peak() - before]))
"""


def test_a_bench_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"usage: python -m tools\.bench\.data plan\|read"):
        main(["write"])
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "--samples", "3", "--shards", "4"])


@pytest.mark.slow
def test_a_billion_samples_in_a_hundred_thousand_shards_take_less_than_256_mib(tmp_path: Path) -> None:
    """In a process of its own: what other tests hold does not count."""
    done = subprocess.run([sys.executable, "-m", "tools.bench.data", "plan"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1,000,000,000 samples in 100,000 shards, window 4, 4,096 ranks")
    found = re.search(r"^memory of plan and index: (\d+) MiB$", done.stdout, flags=re.MULTILINE)
    assert found and int(found[1]) < 256

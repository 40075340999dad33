"""The soak of the data stream finds nothing wrong with it, and would find what is wrong."""

import argparse
import os
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.starts import ROOT
from tools.soak import data as soak
from tools.soak.count import Count, Part, consumed, count
from trainer.data import ShardsConfig, Stream


def soaked(*options: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.soak.data", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.mark.parametrize(("ranks", "more"), [(4, ["--tail", "drop"]), (2, ["--sets", "2"])])
def test_kills_lose_double_and_misplace_nothing(ranks: int, more: list[str]) -> None:
    ran = soaked("--samples", "4000", "--ranks", str(ranks), "--kills", "2", "--seed", "1", *more)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    *starts, last = ran.stdout.splitlines()
    assert len(starts) == 3 and sum("killed" in line for line in starts) == 2
    assert re.fullmatch(
        rf"4,000 samples, {ranks} ranks, 2 kills, 3 starts at .* ranks: 0 lost, 0 doubled, 0 out of place", last
    )


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("more", [[], ["--tail", "drop"], ["--sets", "3"]])
def test_a_million_samples_and_twenty_kills(more: list[str]) -> None:
    ran = soaked("--samples", "1000000", "--ranks", "4", "--kills", "20", "--seed", "0", *more, timeout=1700)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "20 kills" in ran.stdout.splitlines()[-1]


# ------------------------------------------------------------------ what it would find
ORDER = [3, 1, 2, 0, 4, 1, 0, 3, 4, 2]  # two epochs of five


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (ORDER, Count(0, 0, 0)),
        ([3, 1, 0, 2, 4, 1, 0, 3, 4, 2], Count(0, 0, 2)),  # two of them changed places
        ([3, 1, 2, 0, 4, 1, 0, 3, 4], Count(1, 0, 1)),  # the end is missing
        ([3, 1, 2, -1, 4, 1, 0, 3, 4, 2], Count(1, 0, 1)),  # a rank wrote nothing down
        ([3, 1, 2, 2, 4, 1, 0, 3, 4, 2], Count(1, 1, 1)),  # one took another's place
        ([*ORDER, 2], Count(0, 1, 1)),
        ([1, 1, 2, 0, 4, 3, 0, 3, 4, 2], Count(0, 0, 2)),  # twice in one epoch and never in the other
        ([3, 1, 2, 0, 7, 1, 0, 3, 4, 2], Count(1, 1, 1)),  # a number that there is not
    ],
)
def test_losses_doubles_and_wrong_places_are_counted(found: list[int], expected: Count) -> None:
    assert count(found, ORDER) == expected


@settings(deadline=None)
@given(st.sets(st.integers(0, 99), min_size=1), st.sets(st.integers(0, 99), min_size=1), st.integers(0, 9))
def test_every_planted_loss_and_double_is_counted(lost: set[int], doubled: set[int], seed: int) -> None:
    right = random.Random(seed).sample(range(100), 100)
    found = [sample for sample in right if sample not in lost] + sorted(doubled)
    came_to = count(found, right)
    assert (came_to.lost, came_to.doubled) == (len(lost - doubled), len(doubled - lost))
    assert bool(came_to.misplaced) == (found != right)  # the last one, lost and given again, is where it was


def logs(folder: Path, shares: Sequence[Sequence[int]], torn: bytes = b"") -> Path:
    """A file a rank; the last one ends in the middle of a write."""
    folder.mkdir()
    for rank, numbers in enumerate(shares):
        (folder / f"{rank}.i8").write_bytes(np.array(numbers, "<i8").tobytes() + torn * (rank == len(shares) - 1))
    return folder


def part(folder: Path, start: int, until: int, world: int) -> Part:
    return Part(start, until, world, lambda rank: folder / f"{rank}.i8")


def test_what_ranks_wrote_is_put_together_up_to_the_commit(tmp_path: Path) -> None:
    first = logs(tmp_path / "0", [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7]], torn=b"cut")  # the third batch was not committed
    second = logs(tmp_path / "1", [[8, 9, 10, 11, 12, 13, 14, 15]])
    third = logs(tmp_path / "2", [[], []])
    parts = [part(first, 0, 8, 2), part(second, 8, 16, 1), part(third, 16, 16, 2)]
    assert consumed(parts, batch=4) == list(range(16))


def test_what_a_rank_did_not_write_is_lost(tmp_path: Path) -> None:
    folder = logs(tmp_path / "0", [[0, 1, 4, 5], [2, 3]])
    assert consumed([part(folder, 0, 8, 2)], batch=4) == [0, 1, 2, 3, 4, 5, -1, -1]


@pytest.mark.parametrize("fault", [None, "swap", "lose", "double"])
def test_a_fault_of_the_processes_is_exit_code_1(
    fault: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(folder: Path, given: argparse.Namespace, chance: random.Random) -> tuple[list[Part], int]:
        """Instead of processes: what one stream gives, with a fault."""
        config = ShardsConfig(path=soak.set_folder(folder, 0), size=2, channels=1)
        stream = Stream(config, split="train", batch=1, rank=0, world=1, seed=given.seed)
        numbers = stream.order.take(0, given.samples).tolist()
        stream.close()
        if fault == "swap":
            numbers[500], numbers[501] = numbers[501], numbers[500]
        elif fault == "lose":
            del numbers[500]
        elif fault == "double":
            numbers[501] = numbers[500]
        return [part(logs(folder / "logs", [numbers]), 0, given.samples, 1)], 0

    monkeypatch.setattr(soak, "run", run)
    assert soak.main(["--samples", "1000", "--ranks", "1", "--kills", "0"]) == (0 if fault is None else 1)
    said = capsys.readouterr().out.splitlines()[-1]
    shown = {None: "0 lost, 0 doubled, 0 out of place", "swap": "0 lost, 0 doubled, 2 out of place"}
    shown |= {"lose": "1 lost, 0 doubled, 500 out of place", "double": "1 lost, 1 doubled, 1 out of place"}
    assert said == f"1,000 samples, 1 ranks, 0 kills, 1 starts at 1 ranks: {shown[fault]}"


def test_samples_that_ranks_do_not_divide_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        soak.main(["--samples", "1001", "--ranks", "2"])
    assert "--samples 1001 does not divide among --ranks 2" in capsys.readouterr().err

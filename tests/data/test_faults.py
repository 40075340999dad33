"""Data that fails under a run: every rank stops with the same word, at an update that is saved; and who may start a
program."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import starts
from tests.data.server import Fault, serving, until
from tests.runs import saved, write_config
from trainer.data import ShardsConfig
from trainer.data import index as indices
from trainer.data.order import Order

JUNK = b"not an image"


@pytest.fixture
def write(tmp_path: Path, write_set: Callable[..., Path]) -> Callable[..., Path]:
    """write(bad_train, bad_test): the config of a run on 40 + 20 samples of 28 x 28; those numbers are junk."""

    def make(bad: dict[int, bytes], bad_test: dict[int, bytes], **data: object) -> Path:
        write_set(tmp_path / "set", [16, 24], shape=(28, 28, 1), bad=bad)
        write_set(tmp_path / "set", [20], shape=(28, 28, 1), split="test", bad=bad_test)
        more = {"images": 64, "batch": 4, "log": {"every": 4}, "checkpoint": {"every": 400}}
        path = write_config(tmp_path / "run.yaml", "vae", data=tmp_path / "set", **more)
        tree = json.loads(path.read_text())
        path.write_text(json.dumps({**tree, "data": tree["data"] | data}))
        return path

    return make


@pytest.mark.parametrize("late", [False, True])
def test_a_sample_that_one_rank_cannot_use_ends_all_ranks_with_its_name_and_saves_what_was_trained(
    write: Callable[..., Path], tmp_path: Path, late: bool
) -> None:
    # the last of 40 in the order of seed 0 comes to rank 1 in update 10, and the first to rank 0 in update 1
    order = Order([16, 24], seed=0, window=2).take(0, 40)
    number = int(order[39 if late else 0])
    config = write({number: JUNK}, {}, max_bad_fraction=0.0, window=2)
    ended = starts.train(tmp_path / "logs", str(config), world=2).wait()
    assert ended.codes == [2, 2], ended.err
    lines = [line for line in ended.err.splitlines() if line.startswith("tandem: error:")]
    assert len(lines) == 2 and len(set(lines)) == 1, ended.err  # one a rank, the same
    assert f"{number:06d}" in lines[0] and "data.max_bad_fraction" in lines[0]
    assert "Traceback" not in ended.err
    assert bool(saved(tmp_path / "run")) is late  # nothing was trained before the first update
    if late:
        assert saved(tmp_path / "run") == [36]


def test_a_sample_of_the_test_split_that_one_rank_cannot_use_ends_all_ranks(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    config = write({}, {18: JUNK}, max_bad_fraction=0.0)
    ended = starts.train(tmp_path / "logs", str(config), world=2).wait()
    assert ended.codes == [2, 2], ended.err
    assert ended.err.count("tandem: error:") == 2 and ended.err.count("000018") == 2, ended.err


def test_bad_samples_are_counted_over_ranks_and_kept_in_the_runs_folder_once(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    config = write({3: JUNK, 30: b""}, {5: JUNK}, max_bad_fraction=0.1)
    starts.train(tmp_path / "logs", str(config), world=2).wait().ok()
    starts.train(tmp_path / "logs", str(config), "images=160", world=1).wait().ok()  # meets them again
    found = [json.loads(line) for line in (tmp_path / "run" / "quarantine" / "train.jsonl").read_text().splitlines()]
    assert [(Path(row["shard"]).name, row["key"]) for row in sorted(found, key=lambda row: row["sample"])] == [
        ("0000.tar", "000003"), ("0001.tar", "000030"),
    ]  # fmt: skip
    assert all(row["reason"] for row in found)
    (row,) = map(json.loads, (tmp_path / "run" / "quarantine" / "test.jsonl").read_text().splitlines())
    assert row["key"] == "000005"


def test_more_bad_samples_than_allowed_over_all_ranks_end_all_ranks(write: Callable[..., Path], tmp_path: Path) -> None:
    """No rank alone has met too many: 3 of 40 are allowed, and each of two ranks meets two or three of five."""
    order = Order([16, 24], seed=0, window=2).take(0, 40).reshape(10, 2, 2)
    bad = [*order[1, 0], *order[2, 1], order[5, 0, 0]]  # rank 0, rank 1, rank 0
    config = write({int(number): JUNK for number in bad}, {}, max_bad_fraction=0.075, window=2)
    ended = starts.train(tmp_path / "logs", str(config), world=2).wait()
    assert ended.codes == [2, 2], ended.err
    assert "data.max_bad_fraction" in ended.err and "Traceback" not in ended.err


@pytest.mark.parametrize("word", ["data.allow_pipe=true", "data={path: x, size: 28, allow_pipe: true}"])
def test_a_command_line_cannot_allow_a_program_to_be_started(few: Path, tmp_path: Path, word: str) -> None:
    config = write_config(tmp_path / "run.yaml", "vae", data=few)
    ended = starts.train(tmp_path / "logs", str(config), word).wait()
    ended.refused("command line", "data.allow_pipe", "YAML")


@pytest.mark.parametrize("first", [False, True])
def test_a_run_that_waits_for_data_hears_that_it_is_to_end_and_saves_what_was_trained(
    write: Callable[..., Path], tmp_path: Path, first: bool
) -> None:
    order = Order([16, 24], seed=0, window=1)
    missing = int(order.shards(0)[0] if first else order.following(0)[0])
    updates = 0 if first else int(order.sizes[order.shards(0)[0]]) // 4
    with serving() as server:
        config = write({}, {}, window=1, cache_mb=0, readers=1, prefetch=1)
        index_of(tmp_path / "set")
        for path in (tmp_path / "set").rglob("*.*"):
            server.files[str(path.relative_to(tmp_path))] = path.read_bytes()
        server.faults = [Fault(on=f"train/{missing:04d}.tar", hold=100, times=99)]
        data = {"path": server.url, "remote": {"cache": str(tmp_path / "cache"), "timeout": 100}}
        tree = json.loads(config.read_text())
        config.write_text(json.dumps({**tree, "data": tree["data"] | data, "checkpoint": {"every": 4}}))
        started = starts.train(tmp_path / "logs", str(config))
        until(lambda: len(server.of(f"train/{missing:04d}.tar")), within=100)
        if not first:
            until(lambda: saved(tmp_path / "run")[-1:] == [4 * (updates - 1)], within=100)
        else:
            until((tmp_path / "run" / "board").exists, within=100)
        time.sleep(1)  # now it waits
        started.kill(signal.SIGTERM)
        ended = started.wait()
    assert ended.codes == [128 + signal.SIGTERM], ended.err
    assert "Traceback" not in ended.err and f"stopped at {4 * updates:,} images" in ended.out
    assert saved(tmp_path / "run")[-1:] == ([] if first else [4 * updates])


def index_of(path: Path) -> None:
    for split in ("train", "test"):
        indices.load(ShardsConfig(path=path, size=28, channels=1), split).close()


def test_splits_of_other_classes_are_refused(write: Callable[..., Path], tmp_path: Path) -> None:
    config = write({}, {})
    index_of(tmp_path / "set")
    path = tmp_path / "set" / "test" / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"classes": ["cat", "dog", "emu"]}))
    ended = starts.train(tmp_path / "logs", str(config)).wait()
    ended.refused("data.path: the classes of", "set/train (3, such as 0)", "set/test (3, such as cat)")

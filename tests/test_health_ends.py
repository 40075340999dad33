"""How a run ends that cannot go on: a crash loop, too little memory; and what its folder tells of its starts."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import starts
from tests.runs import write_config
from trainer import config as configuration
from trainer.attempts import ask_again
from trainer.out_of_memory import advice, is_one


def break_step(kind: str, after: int = 2) -> None:
    """The update after `after` of them fails in this process."""
    from trainer import loop

    step, count = loop.train_step, [0]

    def fails(*given: Any, **more: Any) -> None:
        count[0] += 1
        if count[0] > after:
            if kind == "bug":
                raise KeyError("lost")
            if kind == "host":
                torch.empty(1 << 46)  # more than any machine has: torch's own error
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
        step(*given, **more)

    loop.train_step = fails


def begin(folder: Path, *argv: str, kind: str) -> starts.Ended:
    return starts.each(folder, (argv, {}), before=[functools.partial(break_step, kind)]).wait()


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- crash loop
def test_three_starts_without_progress_are_the_last_until_a_person_has_looked(few: Path, tmp_path: Path) -> None:
    config, run, logs = write_config(tmp_path / "run.yaml", "vae", data=few), tmp_path / "run", tmp_path / "logs"
    for _ in range(2):
        ended = begin(logs, str(config), kind="bug")
        assert ended.code == 1 and ended.err.endswith("KeyError: 'lost'\n")
    refused = begin(logs, str(config), "data.max_bad_fraction=7", kind="bug")  # a mistake is no start
    assert refused.code == 2 and len(rows(run)) == 2
    third = begin(logs, str(config), kind="bug")
    assert third.code == 72
    assert third.err == (
        "tandem: error: crash loop: 3 starts in a row at 0 images, and none came to the next checkpoint; the last "
        f"error is in {run}/failed; mend it, and start again without that file\n"
    )
    failed = (run / "failed").read_text()
    assert failed.startswith("3 starts in a row at 0 images, and none came to the next checkpoint\n\nrank 0 on ")
    assert "in fails" in failed and failed.rstrip().endswith("KeyError: 'lost'")

    fourth = starts.train(logs, str(config)).wait()
    assert fourth.code == 72 and fourth.err.count("\n") == 1
    assert f"read {run}/failed, mend it, and start again without it" in fourth.err
    assert len(rows(run)) == 3

    (run / "failed").unlink()
    ask_again(run, "left by a batch script that was killed")
    starts.train(logs, str(config)).wait().ok()
    assert [row.get("code") for row in rows(run)] == [None, None, 72, 0]
    assert not (run / "requeue").exists()


def test_starts_that_slurm_ended_are_no_crash_loop(few: Path, tmp_path: Path) -> None:
    """A lost node, of which the batch script may have told or gone with it; not a rank that crashed."""
    config, run, logs = write_config(tmp_path / "run.yaml", "vae", data=few), tmp_path / "run", tmp_path / "logs"
    (run / "submit").mkdir(parents=True)
    (run / "submit" / "job.json").write_text("{}")
    told = {"raw": "7", "restart": 0, "outside": "node2 was lost"}
    (run / "submit" / "ends.jsonl").write_text(json.dumps(told) + "\n")

    def start(restart: int, kind: str) -> starts.Ended:
        variables = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restart)}
        return starts.each(logs, ([str(config)], variables), before=[functools.partial(break_step, kind)]).wait()

    for restart in range(3):  # nothing is told of the second and third
        assert start(restart, "bug").code == 1
    for restart in (1, 2):
        with (run / "submit" / "ends.jsonl").open("a") as file:
            file.write(json.dumps({"raw": "7", "restart": restart, "outside": ""}) + "\n")
    assert start(3, "bug").code == 72


def test_progress_and_another_config_are_no_crash_loop(few: Path, tmp_path: Path) -> None:
    config, run, logs = write_config(tmp_path / "run.yaml", "vae", data=few), tmp_path / "run", tmp_path / "logs"
    for learning_rate in ("1e-3", "1e-3", "5e-4", "5e-4"):
        assert begin(logs, str(config), f"optim.lr={learning_rate}", kind="bug").code == 1
    for _ in range(3):  # a checkpoint every third update
        before = [functools.partial(break_step, "bug", 4)]
        assert starts.each(logs, ([str(config)], {}), before=before).wait().code == 1
    assert [row["images"] for row in rows(run)] == [0, 0, 0, 0, 0, 48, 96]
    assert not (run / "failed").exists()


# ---------------------------------------------------------------- memory
@pytest.mark.parametrize(
    ("kind", "said"), [("cuda", "CUDA out of memory"), ("host", "images (DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_is_one_line_with_what_to_change(kind: str, said: str, few: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", "vaegan", data=few)
    ended = begin(tmp_path / "logs", str(config), kind=kind)
    assert ended.code == 71 and ended.err.count("\n") == 1, ended
    assert ended.err.startswith("tandem: error: out of memory in an update, at 32 images (")
    for word in (said, "micro_batch=8 (now null, a rank's whole share of 16)", "method.autoencoder.recompute=true"):
        assert word in ended.err
    told = json.loads((tmp_path / "run" / "crashes" / "rank00000.json").read_text())
    assert told["code"] == 71 and "in fails" in told["text"]


def test_the_advice_names_the_keys_that_help_with_the_values_they_have(few: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path / "run.yaml", "vaegan", data=few)
    found = advice(configuration.load(path, ["micro_batch=4"]), 2, cuda=True)
    assert found == [
        "set micro_batch=2 (now 4)",
        "method.autoencoder.recompute=true method.discriminator.recompute=true (now false)",
        "precision=bf16 in a new run (now fp32)",
        "parallel.kind=deepspeed parallel.stage=2 (now auto)",
    ]
    words = ["micro_batch=1", "method.autoencoder.recompute=true", "method.discriminator.recompute=true"]
    words += ["precision=bf16", "parallel.kind=deepspeed", "parallel.stage=2"]
    assert advice(configuration.load(path, words), 2, cuda=True) == [
        "parallel.stage=3 (now 2)",
        "parallel.offload=cpu (now none)",
    ]
    assert not is_one(RuntimeError("size mismatch")) and is_one(MemoryError())

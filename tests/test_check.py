"""`tandem check CONFIG`: the figures are those of the networks, and nothing is left behind."""

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import starts
from tests.runs import IMAGES, METHODS, write_config
from trainer import check
from trainer import config as configuration


def figures(config: Path, *overrides: str, world: int = 1) -> dict[str, str]:
    return check.check(configuration.load(config, list(overrides)), world=world).rows


def number(text: str, pattern: str) -> float:
    found = re.search(pattern, text)
    assert found is not None, f"{pattern} not in {text}"
    return float(found[1].replace(",", ""))


@pytest.mark.parametrize("method", METHODS)
def test_parameters_and_checkpoint_are_those_of_a_run(method: str, few: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", method, data=few)
    rows = figures(config)
    starts.train(tmp_path / "logs", str(config), "images=32").wait().ok()
    path = tmp_path / "run" / "checkpoints" / "000000000032"
    told = {
        name: int(count.replace(",", "")) for name, count in re.findall(r"(\w+) ([\d,]+) parameters", rows["networks"])
    }
    files = {file.stem: file for file in path.glob("*.safetensors") if "." not in file.stem and file.stem != "balance"}
    assert told == {name: sum(t.numel() for t in load_file(file).values()) for name, file in files.items()}
    size = sum(file.stat().st_size for file in path.iterdir()) / 1e6
    assert number(rows["a checkpoint"], r"([\d.,]+) MB") == pytest.approx(size, abs=0.1)
    tensors = {file.name.removesuffix(".safetensors"): load_file(file) for file in path.glob("*.safetensors")}
    held = {"parameters": "", "optimizer": ".optimizer", "average": ".ema"}
    for row, suffix in held.items():
        found = [t for name in told for t in tensors.get(name + suffix, {}).values() if t.dim() or not suffix]
        assert number(rows[f"- {row}"], r"^([\d.,]+)") == pytest.approx(
            4 * sum(map(torch.numel, found)) / 1e6, abs=0.06
        )
    assert number(rows["- gradients"], r"^([\d.,]+)") == pytest.approx(4 * sum(told.values()) / 1e6, abs=0.06)


def test_a_known_network_has_the_parameters_and_operations_counted_by_hand(few: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", "vae", data=few)
    rows = figures(config, "method.autoencoder={kind: conv, width: 4, multipliers: [1, 2], latent: 3, norm: none}")
    # encoder: 4x4/2 1 -> 4, 3x3 4 -> 8, linear 8*14*14 -> 2*3; decoder: linear 3 -> 8*14*14, up 3x3 8 -> 4, 3x3 4 -> 1
    layers = {  # weights, biases, multiplications of a forward
        "down": (16 * 4, 4, 14 * 14 * 16 * 4),
        "conv": (9 * 4 * 8, 8, 14 * 14 * 9 * 4 * 8),
        "posterior": (1568 * 6, 6, 1568 * 6),
        "entry": (3 * 1568, 1568, 3 * 1568),
        "up": (9 * 8 * 4, 4, 14 * 14 * 16 * 8 * 4),  # as one transposed 4x4 convolution: 16 products an input pixel
        "head": (9 * 4 * 1, 1, 28 * 28 * 9 * 4),
    }
    parameters = sum(weights + biases for weights, biases, _ in layers.values())
    assert rows["networks"] == f"autoencoder {parameters:,} parameters"
    forward = sum(products for _, _, products in layers.values())
    # backward: once by the weights and once by the inputs, but not by the image; a product is two operations
    total = 2 * (3 * forward - layers["down"][2])
    assert number(rows["cost"], r"([\d.,]+) MFLOPs") == pytest.approx(total / 1e6, abs=0.06)


def test_batches_and_budget_are_derived_for_the_ranks_asked_for(few: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", "vaegan", data=few)
    rows = figures(config, "batch=32", "micro_batch=4", world=2)
    assert rows["global batch"] == "32 images: 2 ranks x 4 micro-batches of 4"
    assert rows["budget"] == f"{IMAGES} images, 12 updates, 0.6 epochs"
    assert rows["an epoch"] == "600 images; 200 to test on"
    assert (rows["image"], rows["latent"], rows["method"]) == ("1 x 28 x 28", "16", "vaegan")


def test_smaller_micro_batches_need_less_memory_and_cost_the_same(few: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", "vae", data=few)
    whole, parts = figures(config, "batch=256"), figures(config, "batch=256", "micro_batch=64")
    assert whole["cost"] == parts["cost"]
    activations = [number(rows["- activations"], r"([\d.,]+)") for rows in (whole, parts)]
    batch = 256 * 28 * 28 * 4 / 1e6  # the images themselves are kept whole
    assert activations[1] == pytest.approx((activations[0] - batch) / 4 + batch, abs=0.1)


def test_every_term_takes_part_in_the_two_updates(few: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", "vaegan", data=few)
    rows = figures(config, "method.adversarial_from=200")
    terms = {"autoencoder/nll", "autoencoder/kl", "autoencoder/adversarial", "discriminator/adversarial"}
    assert terms | {"discriminator/r1", "discriminator/r2"} <= set(
        re.findall(r"([\w/]+) [\d.e+-]+", rows["two updates"])
    )


def test_a_check_of_a_run_that_is_there_changes_nothing(few: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", "vae", data=few)
    starts.train(tmp_path / "logs", str(config)).wait().ok()
    before = starts.listing(tmp_path / "run")
    said = starts.tandem(tmp_path / "logs", "check", str(config), "--processes", "2").ok()
    assert starts.listing(tmp_path / "run") == before
    assert "2 ranks x 1 micro-batch of 8" in said.out
    starts.tandem(tmp_path / "logs", "check", str(config), f"run={tmp_path / 'new' / 'run'}").ok()
    assert not (tmp_path / "new").exists()


def test_torch_and_the_random_state_are_as_they_were(few: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    figures(write_config(tmp_path / "run.yaml", "gan", data=few))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_lazy_penalty_costs_its_share_of_an_update(few: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", "gan", data=few)
    always, lazy, never = (
        number(figures(config, *words)["cost"], r"([\d.,]+) MFLOPs")
        for words in (["method.critic.penalty_interval=0"], [], ["method.critic.r1=0", "method.critic.r2=0"])
    )
    assert always > never
    assert lazy == pytest.approx((always + never) / 2, abs=0.11)  # every second update; figures have one decimal


def test_a_disk_without_room_for_the_runs_checkpoints_is_told(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path / "run.yaml", "vae", data=few, checkpoint={"keep_last": 2})
    said = figures(config)["a checkpoint"]
    size, needed = number(said, r"^([\d.,]+) MB"), number(said, r"needs ([\d.,]+) MB")
    assert needed == pytest.approx(4 * size, abs=0.25)  # two, the best, and the one being written
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(3.5e6 * size)))
    with pytest.raises(ValueError, match=r"4 checkpoints \(keep_last 2 \+ the best"):
        figures(config)


def test_a_config_for_deepspeed_is_checked_on_one_process_without_it(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path / "run.yaml", "gan", data=few)
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # an import of it raises
    words = ["parallel.kind=deepspeed", "parallel.stage=3", "parallel.weights=fp16", "precision=fp16"]
    rows = figures(config, *words, world=4)
    assert "ZeRO stage 3" in rows["backend"] and "fp16" in rows["backend"] and "4 ranks" in rows["backend"]
    assert "one process" in rows["backend"]
    assert {"- gathered", "- buckets", "sent a rank"} <= set(rows)
    assert "discriminator/r1" in rows["two updates"]
    with pytest.raises(ValueError, match="batch: 16 does not divide among 5 ranks"):
        figures(config, *words, world=5)


def test_recomputed_activations_are_smaller_and_cost_a_forward_more(few: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", "vae", data=few)
    network = "method.autoencoder={{kind: conv, width: 8, multipliers: [1, 2], latent: 3, blocks: 2, recompute: {}}}"
    kept, again = (figures(config, "batch=64", network.format(word)) for word in ("false", "true"))
    assert kept["two updates"] == again["two updates"]
    activations = [number(rows["- activations"], r"([\d.,]+)") for rows in (kept, again)]
    assert activations[1] < 0.6 * activations[0]
    cost = [number(rows["cost"], r"([\d.,]+) MFLOPs") for rows in (kept, again)]
    assert (
        1.1 < cost[1] / cost[0] < 1.34
    )  # a forward is a third of an update; the last layer of a part is not run again


def test_numbers_of_ranks_are_compared_in_a_table(few: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", "vaegan", data=few)
    said = starts.tandem(tmp_path / "logs", "check", str(config), "--processes", "1,2,64").ok()
    for word in ("1 rank ", "64 ranks", "ddp", "stage 1", "stage 2", "stage 3", "never to"):
        assert word in said.out
    ended = starts.tandem(tmp_path / "logs", "check", str(config), "--processes", "2,x")
    assert ended.code == 2 and "2,x is not a number of processes" in ended.err

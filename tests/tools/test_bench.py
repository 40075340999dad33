"""The speed benchmark runs and says what it measured. No figure is held to anything: the machine is shared."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tools.bench import train as bench
from tools.bench.bare import ConventionalLoop, loop_of
from tools.bench.recipes import RECIPES, recipe
from tools.shards.make import main as make

VARIANTS = {"bare", "bare, contiguous", "tandem, in memory", "tandem, shards"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 grey images of 28 x 28 pixels as shards."""
    folder = tmp_path_factory.mktemp("bench")
    generator = torch.Generator().manual_seed(0)
    for number in range(96):
        pixels = torch.randint(0, 256, (28, 28), generator=generator, dtype=torch.uint8)
        (folder / "images" / str(number % 2)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(folder / "images" / str(number % 2) / f"{number}.png")
    assert make(["folder", str(folder / "images"), str(folder / "shards"), "--size", "28", "--channels", "1"]) == 0
    return folder / "shards"


def test_a_short_run_prints_a_table_and_writes_figures_machine_and_versions(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    argv = ["--models", "vae-tiny", "--seconds", "0.01", "--rounds", "2", "--data", str(shards), "--out", str(out)]
    assert bench.main(argv) == 0
    found = json.loads(out.read_text())
    assert found["command"] == "python -m tools.bench.train " + " ".join(argv)
    assert found["versions"]["torch"] == torch.__version__
    assert found["machine"]["cores"] >= 1
    assert found["date"].endswith("+00:00")
    rows = {row["variant"]: row for row in found["rows"]}
    assert set(rows) == VARIANTS
    assert rows["bare"]["ratio_to_bare"] == {"median": 1.0, "least": 1.0, "most": 1.0}
    for row in rows.values():
        spread = row["ratio_to_bare"]
        assert row["images_per_cpu_s"] > 0
        assert 0 < spread["least"] <= spread["median"] <= spread["most"]
    printed = capsys.readouterr().out
    assert all(name in printed for name in VARIANTS)


def test_ratios_compare_within_their_round() -> None:
    rows = bench.table("vae", 10, {"bare": [1.0, 2.0, 4.0], "slow": [2.0, 4.0, 8.0]})
    assert rows[1]["ratio_to_bare"] == {"median": 0.5, "least": 0.5, "most": 0.5}
    assert rows[1]["images_per_cpu_s"] == 2.5


@pytest.mark.parametrize("name", RECIPES)
def test_bare_loops_train_every_network(name: str) -> None:
    """What is compared with does the work: each network moves, and stays finite."""
    config = recipe(name, Path("unused"))
    loops = [loop_of(config)]
    if config.method.kind == "vaegan":
        loops.append(ConventionalLoop(config, layout=torch.channels_last))
    for loop in loops:
        before = {key: [p.clone() for p in network.parameters()] for key, network in loop.networks.items()}
        image = torch.rand(config.batch, 1, 28, 28) * 2 - 1
        loop.updates = 0  # an update with penalties, where there are any
        loop.update(image.contiguous(memory_format=torch.channels_last))
        for key, network in loop.networks.items():
            for old, new in zip(before[key], network.parameters(), strict=True):
                assert new.isfinite().all()
                assert not torch.equal(old, new), f"{type(loop).__name__}: a weight of {key} did not move"


def test_a_name_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.parse(["--models", "vea"])
    assert stopped.value.code == 2
    assert "'vea' is none of vae-tiny, vae-small, vae, gan, vaegan" in capsys.readouterr().err

"""Every shipped config trains, is checked, and its run draws what its method can."""

from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests import starts
from tests.runs import curves, saved
from trainer import config as configuration

CONFIGS = sorted(path.stem for path in (starts.ROOT / "configs").glob("*.yaml"))


def test_there_is_one_for_each_family() -> None:
    kinds = {
        yaml.safe_load((starts.ROOT / "configs" / f"{name}.yaml").read_text())["method"]["kind"] for name in CONFIGS
    }
    assert {"vae", "gan", "vaegan"} <= kinds


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shipped_config_trains_and_draws(name: str, shipped: Path, tmp_path: Path) -> None:
    run = shipped / "runs" / name
    assert saved(run) == [320, 640]
    found = curves(run)
    config = configuration.load(run / "config.yaml", [])  # the resolved config is one that can be fed back
    losses = [values for tag, values in found.items() if tag.startswith("loss/")]
    assert losses and all(640 in values or len(values) > 0 for values in losses)
    assert (config.run, config.images) == (Path("runs") / name, 640)
    has_encoder = config.method.kind != "gan"
    for verb in ("sample", "interpolate") + (("reconstruct",) if has_encoder else ()):
        out = tmp_path / f"{verb}.png"
        starts.tandem(tmp_path / "logs", verb, f"runs/{name}", "--out", str(out), cwd=shipped).ok()
        with Image.open(out) as picture:
            assert picture.format == "PNG" and picture.getextrema() != (255, 255)
    drawn = {path.name for path in (run / "pictures").iterdir()}
    assert drawn >= {"samples.png", "interpolation.png"} | ({"reconstructions.png"} if has_encoder else set())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shipped_config_passes_its_check_on_two_processes(name: str, shipped: Path, tmp_path: Path) -> None:
    words = ("check", f"configs/{name}.yaml", "--processes", "2", *starts.small(name))
    said = starts.tandem(tmp_path / "logs", *words, cwd=shipped).ok()
    assert "2 ranks x 1 micro-batch of 32" in said.out


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shipped_config_says_in_its_first_line_how_it_is_run(name: str) -> None:
    text = (starts.ROOT / "configs" / f"{name}.yaml").read_text()
    assert f"tandem train configs/{name}.yaml" in text.splitlines()[0]
    assert yaml.safe_load(text)["run"] == f"runs/{name}"

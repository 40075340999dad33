"""`tandem data show`: what the networks see of a batch, beside what is stored, and the same again."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests import starts
from tests.runs import write_config
from tests.tools.pictures import Pixels, holds, leaves, write_set
from tools.shards.sheet import CELL, fit
from trainer import config as configuration
from trainer.data import Feed, Stream, Transform, to_uint8


@pytest.fixture(scope="module")
def made(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("show") / "small.yaml", "vae", data=few)


def show(tmp_path: Path, config: Path, *words: str) -> Pixels:
    out = tmp_path / f"{len(list(tmp_path.glob('*.png')))}.png"
    said = starts.tandem(tmp_path / "logs", "data", "show", str(config), *words, "--out", str(out)).ok()
    assert said.out.startswith(f"{out}: ")
    return np.asarray(Image.open(out).convert("RGB"))


def given(path: Path, overrides: list[str], *, start: int, count: int) -> tuple[Pixels, Pixels]:
    """What the loop's own calls give the networks, and what is stored, of the first images from `start` on."""
    config = configuration.load(path, overrides)
    stream = Stream(config.data, split="train", batch=config.batch, rank=0, world=1, seed=config.seed)
    transform = Transform.training(config.data, seed=config.seed)
    feed = Feed(stream.batches(start), device=torch.device("cpu"), transform=transform)
    feed.fetch()
    image = to_uint8(feed.take().image[:count]).numpy()
    stored = next(stream.batches(start)).data[:count].numpy()
    stream.close()
    return image, stored


def test_the_sheet_holds_what_the_networks_see_and_what_is_stored(made: Path, tmp_path: Path) -> None:
    words = ["data.flip=true", "data.fit=random", "data.size=20"]
    sheet = show(tmp_path, made, *words, "--images", "6", "--start", "128")
    seen, stored = given(made, words, start=128, count=6)
    for image, original in zip(seen, stored, strict=True):
        assert image.shape == (20, 20, 1) and original.shape == (28, 28, 1)
        assert holds(sheet, fit(image, CELL)) and holds(sheet, fit(original, CELL))
    assert any(not np.array_equal(image, original[4:24, 4:24]) for image, original in zip(seen, stored, strict=True))


def test_the_same_command_draws_the_same_sheet_and_another_seed_another(made: Path, tmp_path: Path) -> None:
    one, again, other = (
        show(tmp_path, made, f"seed={seed}", "data.flip=true", "--updates", "2", "--images", "3") for seed in (1, 1, 2)
    )
    assert np.array_equal(one, again)
    assert one.shape != other.shape or not np.array_equal(one, other)


def test_images_of_mixed_sizes_are_shown_as_they_are_stored_and_scaled(made: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(2)
    images = [picture[: 30 + number % 3] for number, picture in enumerate(leaves(generator, 40, 12))]
    folder = write_set(tmp_path / "set", images, labels=[0] * 12)
    write_set(folder, images[:2], labels=[0] * 2, split="test")
    words = [f"data.path={folder}", "data.channels=3", "data.size=24", "data.fit=resize", "batch=12"]
    sheet = show(tmp_path, made, *words, "--images", "12")
    assert all(holds(sheet, fit(image, CELL)) for image in images)


def test_the_default_place_and_what_is_refused(made: Path, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    said = starts.tandem(logs, "data", "show", str(made), "--images", "2", cwd=tmp_path).ok()
    assert said.out.startswith("data_small.png: 2 images") and (tmp_path / "data_small.png").exists()
    starts.tandem(logs, "data", "show", str(made), "data.flop=true").refused("flip")
    for start in ("-1", "9" * 30):
        starts.tandem(logs, "data", "show", str(made), "--start", start).refused("--start")
    starts.tandem(logs, "data", "show", str(made), "--out", "sheet.gif").refused("end it in .png")
    starts.tandem(logs, "data", "show", str(made), f"data.path={tmp_path / 'none'}").refused("does not exist")

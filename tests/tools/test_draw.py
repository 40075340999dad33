"""`tandem sample | reconstruct | interpolate`: real pictures of the right size, by averaged weights (F5-2, F5-7)."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests import starts
from tests.runs import write_config
from trainer.durable import manifest_text, sha256
from trainer.generate import load

ZOOMED, PADDING = 3 * 28, 2  # how `trainer.pictures` shows 28 pixels


@pytest.fixture(scope="module")
def run_of(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """run_of(method, world): the folder of a short finished run; made once."""
    folder, made = tmp_path_factory.mktemp("draw"), {}

    def run(method: str, world: int = 1) -> Path:
        if (method, world) not in made:
            config = write_config(folder / f"{method}-{world}.yaml", method, data=few)
            starts.train(folder / "logs", str(config), world=world).wait().ok()
            made[method, world] = config.with_suffix("")
        return made[method, world]

    return run


def draw(tmp_path: Path, *words: str) -> npt.NDArray[np.uint8]:
    """The picture that a verb writes, and checks that it is a real PNG and is named in the answer."""
    out = tmp_path / f"{len(list(tmp_path.glob('*.png')))}.png"
    said = starts.tandem(tmp_path / "logs", *words, "--out", str(out)).ok()
    assert said.out.startswith(f"{out}: ")
    assert out.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    with Image.open(out) as picture:
        assert (picture.format, picture.mode) == ("PNG", "L")
        return np.asarray(picture)


def tiles(sheet: npt.NDArray[np.uint8], rows: int, columns: int) -> npt.NDArray[np.uint8]:
    """(rows, columns, 28, 28) of a sheet, whose size and white lines are checked."""
    step = ZOOMED + PADDING
    assert sheet.shape == (rows * step + PADDING, columns * step + PADDING)
    found = np.empty((rows, columns, 28, 28), np.uint8)
    rest = sheet.copy()
    for row in range(rows):
        for column in range(columns):
            place = np.s_[
                row * step + PADDING : row * step + PADDING + ZOOMED,
                column * step + PADDING : column * step + PADDING + ZOOMED,
            ]
            found[row, column] = sheet[place][::3, ::3]
            assert np.array_equal(found[row, column].repeat(3, 0).repeat(3, 1), sheet[place])
            rest[place] = 255
    assert (rest == 255).all()
    return found


def close(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]) -> bool:
    """Equal, but that float32 sums in another order may round a pixel to the neighbouring level."""
    return a.shape == b.shape and int(np.abs(a.astype(int) - b.astype(int)).max()) <= 1


def scaled(run: Path, to: Path, name: str) -> Path:
    """A copy of a run whose newest checkpoint has other tensors under `name`, and the digests of these."""
    shutil.copytree(run, to)
    path = max((to / "checkpoints").iterdir())
    file = path / f"{name}.safetensors"
    save_file({key: 2 * value for key, value in load_file(file).items()}, file)
    files = {
        part.name: {"bytes": part.stat().st_size, "sha256": sha256(part)}
        for part in sorted(path.iterdir())
        if part.name != "manifest.json"
    }
    (path / "manifest.json").write_text(manifest_text(images=int(path.name), files=files))
    return to


@pytest.mark.parametrize("method", ["vae", "gan", "vaegan", "vaegan_larsen"])
def test_every_method_draws_samples_and_walks_of_the_size_asked_for(
    method: str, run_of: Callable[..., Path], tmp_path: Path
) -> None:
    run = str(run_of(method))
    found = tiles(draw(tmp_path, "sample", run, "--count", "10", "--columns", "4"), 3, 4)
    assert (found[2, 2:] == 255).all()  # places without an image are white
    assert len(np.unique(found.reshape(12, -1)[:10], axis=0)) == 10
    walks = tiles(draw(tmp_path, "interpolate", run, "--rows", "2", "--steps", "5"), 2, 5)
    assert len(np.unique(walks.reshape(10, -1), axis=0)) == 10


@pytest.mark.parametrize("method", ["vae", "vaegan", "vaegan_larsen"])
def test_reconstructions_stand_below_the_images_that_they_are_of(
    method: str, run_of: Callable[..., Path], few: Path, tmp_path: Path
) -> None:
    found = tiles(draw(tmp_path, "reconstruct", str(run_of(method)), "--count", "6", "--columns", "3"), 4, 3)
    real, rebuilt = found[[0, 2]].reshape(6, 28, 28), found[[1, 3]].reshape(6, 28, 28)
    images = sorted((few.parent / "images" / "test").rglob("*.png"))
    known = {np.asarray(Image.open(path)).tobytes() for path in images}
    assert all(np.ascontiguousarray(image).tobytes() in known for image in real)
    assert not np.array_equal(real, rebuilt)
    split = tiles(draw(tmp_path, "reconstruct", str(run_of(method)), "--count", "3", "--split", "train"), 2, 12)
    assert not np.array_equal(split[0, :3], real[:3])


def test_a_gan_reconstructs_nothing_and_says_so(run_of: Callable[..., Path], tmp_path: Path) -> None:
    starts.tandem(tmp_path / "logs", "reconstruct", str(run_of("gan"))).refused("a gan has no encoder")


def test_pictures_are_by_the_averaged_weights_and_not_by_the_last(run_of: Callable[..., Path], tmp_path: Path) -> None:
    run = run_of("vae")
    other_ema, other_raw = (scaled(run, tmp_path / name, name) for name in ("autoencoder.ema", "autoencoder"))
    for words in (("sample", "--count", "6"), ("reconstruct", "--count", "6"), ("interpolate", "--rows", "1")):
        picture = draw(tmp_path, words[0], str(run), *words[1:])
        assert np.array_equal(draw(tmp_path, words[0], str(other_raw), *words[1:]), picture)
        assert not np.array_equal(draw(tmp_path, words[0], str(other_ema), *words[1:]), picture)


def test_an_image_depends_on_its_number_and_the_seed_alone(run_of: Callable[..., Path], tmp_path: Path) -> None:
    run = str(run_of("vaegan"))
    many = tiles(draw(tmp_path, "sample", run, "--count", "8", "--columns", "4"), 2, 4).reshape(8, 28, 28)
    few_ = tiles(draw(tmp_path, "sample", run, "--count", "3", "--columns", "3"), 1, 3).reshape(3, 28, 28)
    assert close(many[:3], few_)
    other = tiles(draw(tmp_path, "sample", run, "--count", "3", "--columns", "3", "--seed", "1"), 1, 3)
    assert not np.array_equal(other[0], few_)


def test_the_grid_is_the_same_for_any_number_of_processes(run_of: Callable[..., Path], tmp_path: Path) -> None:
    sheets = {}
    for world in (1, 2):
        run = run_of("vaegan", world)
        sheets[world] = draw(tmp_path, "sample", str(run))
        with Image.open(run / "pictures" / "samples.png") as own:  # what the run itself drew at its end
            assert np.array_equal(np.asarray(own), sheets[world])
    assert close(sheets[1], sheets[2])


def test_walks_are_spherical_and_end_at_prior_draws(run_of: Callable[..., Path], tmp_path: Path) -> None:
    run = run_of("vae")
    walk = tiles(draw(tmp_path, "interpolate", str(run), "--rows", "2", "--steps", "3"), 2, 3)
    samples = tiles(draw(tmp_path, "sample", str(run), "--count", "4", "--columns", "4"), 1, 4)[0]
    ends = np.stack([walk[0, 0], walk[0, 2], walk[1, 0], walk[1, 2]])
    assert close(ends, samples)
    said = starts.tandem(tmp_path / "logs", "interpolate", str(run), "--out", str(tmp_path / "walk.png")).ok()
    assert "spherical" in said.out


def test_a_checkpoint_can_be_named_and_the_default_place_is_the_runs_pictures(
    run_of: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(run_of("vae"), tmp_path / "run")
    older = tmp_path / "run" / "checkpoints" / "000000000192"
    said = starts.tandem(tmp_path / "logs", "sample", str(older)).ok()
    assert said.out.startswith(f"{tmp_path / 'run' / 'pictures' / 'sample.png'}: 96 samples, seed 0, by {older} (192 ")
    assert load(older).images == 192
    newest = draw(tmp_path, "sample", str(tmp_path / "run"))
    with Image.open(tmp_path / "run" / "pictures" / "sample.png") as picture:
        assert not np.array_equal(np.asarray(picture), newest)


def test_pictures_and_files_hold_the_same_pixels_as_the_tensors(run_of: Callable[..., Path], tmp_path: Path) -> None:
    run = load(run_of("vae"), device=torch.device("cpu"))
    tensors = torch.cat(list(run.sample(5, batch=2))).numpy()[..., 0]
    sheet = draw(tmp_path, "sample", str(run.path), "--count", "5", "--columns", "5")
    assert close(tiles(sheet, 1, 5)[0], tensors)

"""Bad input to the real command: one clear line that names the thing, exit code 2, nothing written over."""

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import starts
from tests.runs import saved, write_config


@pytest.fixture(scope="session")
def trained(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a VAE."""
    folder = tmp_path_factory.mktemp("trained")
    config = write_config(folder / "vae.yaml", "vae", data=few)
    starts.train(folder / "logs", str(config)).wait().ok()
    return folder / "vae"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(folder)], capture_output=True).returncode:
        pytest.skip("only root can mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder that nobody can write, root neither."""
    folder = tmp_path / "runs"
    folder.mkdir()
    if os.getuid() != 0:
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)
        return
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(folder)], capture_output=True).returncode:
        pytest.skip("root cannot mount here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def picture(path: Path, level: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8), level, np.uint8)).save(path)


# ---------------------------------------------------------------- making data
def test_an_empty_folder_makes_no_shards(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    said = starts.tandem(tmp_path / "logs", "data", "make", "folder", str(tmp_path / "empty"), str(tmp_path / "out"))
    said.refused(str(tmp_path / "empty"), "image")
    assert not (tmp_path / "out").exists()


def test_a_missing_folder_makes_no_shards(tmp_path: Path) -> None:
    said = starts.tandem(tmp_path / "logs", "data", "make", "folder", str(tmp_path / "none"), str(tmp_path / "out"))
    said.refused(str(tmp_path / "none"))


def test_a_text_file_named_png_is_named(tmp_path: Path) -> None:
    for number in range(3):
        picture(tmp_path / "in" / f"{number}.png", number)
    (tmp_path / "in" / "notes.png").write_text("buy milk\n")
    said = starts.tandem(tmp_path / "logs", "data", "make", "folder", str(tmp_path / "in"), str(tmp_path / "out"))
    said.refused("notes.png", "max-bad")


def test_shards_are_not_made_over_other_shards(few: Path, tmp_path: Path) -> None:
    shutil.copytree(few, tmp_path / "out")
    for number in range(20):
        picture(tmp_path / "in" / f"{number}.png", number)
    with starts.nothing_changes(tmp_path / "out"):
        said = starts.tandem(tmp_path / "logs", "data", "make", "folder", str(tmp_path / "in"), str(tmp_path / "out"))
        said.refused(str(tmp_path / "out"))


# ---------------------------------------------------------------- training data
def test_a_missing_data_folder_is_named(tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", "vae", data=tmp_path / "nowhere")
    for verb in ("train", "check"):
        words = (str(config),)
        ended = starts.train(tmp_path / "logs", *words).wait() if verb == "train" else None
        (ended or starts.tandem(tmp_path / "logs", verb, *words)).refused("data.path", str(tmp_path / "nowhere"))


def test_an_empty_data_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    config = write_config(tmp_path / "run.yaml", "vae", data=tmp_path / "empty")
    starts.train(tmp_path / "logs", str(config)).wait().refused("data.path", str(tmp_path / "empty"))


def test_a_shard_cut_short_is_named(few: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(few, data)
    shard = data / "train" / "train-00001.tar"
    os.truncate(shard, shard.stat().st_size // 2)
    config = write_config(tmp_path / "run.yaml", "vae", data=data)
    with starts.nothing_changes(data):
        starts.train(tmp_path / "logs", str(config)).wait().refused(shard.name)
        starts.tandem(tmp_path / "logs", "data", "check", str(data)).refused(shard.name)


def test_a_shard_that_is_gone_is_named(few: Path, tmp_path: Path) -> None:
    shutil.copytree(few, tmp_path / "data")
    (tmp_path / "data" / "train" / "train-00000.tar").unlink()
    config = write_config(tmp_path / "run.yaml", "vae", data=tmp_path / "data")
    starts.train(tmp_path / "logs", str(config)).wait().refused("train-00000.tar")


def test_shards_that_hold_text_for_images_are_refused_by_sample(tmp_path: Path) -> None:
    import io

    for split in ("train", "test"):
        (tmp_path / "data" / split).mkdir(parents=True)
        with tarfile.open(tmp_path / "data" / split / "0.tar", "w") as file:
            for number in range(4):
                info = tarfile.TarInfo(f"{number}.png")
                info.size = 4
                file.addfile(info, io.BytesIO(b"text"))
    config = write_config(tmp_path / "run.yaml", "vae", data=tmp_path / "data")
    starts.train(tmp_path / "logs", str(config)).wait().refused("data.path", "no image")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.size=32", ("data.size", "32 x 32", "28 x 28", "set data.size to 28")),
        ("data.channels=3", ("data.channels", "set data.channels to 1")),
    ],
)
def test_an_image_size_that_the_data_does_not_have_is_named_with_the_one_that_it_has(
    override: str, said: tuple[str, ...], few: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "run.yaml", "vae", data=few)
    starts.train(tmp_path / "logs", str(config), override).wait().refused(*said)
    starts.tandem(tmp_path / "logs", "check", str(config), override).refused(*said)


def test_a_batch_that_ranks_do_not_divide_is_refused_with_the_nearest(few: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", "vae", data=few)
    said = ("batch: 17", "2 ranks", "nearest: 16")
    ended = starts.train(tmp_path / "logs", str(config), "batch=17", world=2).wait()
    assert set(ended.codes) == {2}
    assert all(word in line for word in said for line in ended.err.splitlines()), ended.err
    starts.tandem(tmp_path / "logs", "train", str(config), "batch=17", "--processes", "2").refused(*said)  # once
    starts.tandem(tmp_path / "logs", "check", str(config), "batch=17", "--processes", "2").refused(*said)
    ended = starts.train(tmp_path / "logs", str(config), "micro_batch=5").wait()
    ended.refused("micro_batch: 5", "share of 16")


# ---------------------------------------------------------------- configs
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("run: [\n", ("run.yaml:2:1",)),
        ("run: a\nrun: b\n", ("run.yaml", "run")),
        ("- 1\n", ("run.yaml",)),
        ("", ("run.yaml",)),
        ("run: !!python/object/apply:os.system ['touch owned']\n", ("run.yaml",)),
        ("\x00", ("run.yaml",)),
        ("run: r\nimages: 1\nbatch: 1\ndata: {path: d, size: 28}\nmethod: {kind: vea}\n", ("did you mean vae?",)),
        ("run: r\nimages: 1\nbatch: 1\ndata: {path: d, size: 28}\nmethod: {}\n", ("method.kind", "'vaegan_larsen'")),
        ("run: r\nimages: -1\nbatch: 1\ndata: {path: d, size: 28}\nmethod: {kind: vae}\n", ("images: -1",)),
    ],
)
def test_a_config_that_is_none_is_refused_by_name(text: str, said: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    starts.train(tmp_path / "logs", str(tmp_path / "run.yaml")).wait().refused(*said)
    assert not (tmp_path / "owned").exists() and not (starts.ROOT / "owned").exists()


def test_a_config_that_is_not_there_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        starts.train(tmp_path / "logs", str(path)).wait().refused(str(path))
    starts.train(tmp_path / "logs", "images=3").wait().refused("a config file comes first")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.learning_rate=1", ("command line", "optim.learning_rate", "did you mean optim.lr?")),
        ("optim.lr=fast", ("command line", "optim.lr")),
        ("images", ("command line", "images")),
        ("method.autoencoder.multipliers=[1,2,2,2]", ("28", "nearest")),
        ("method.likelihood.kind=gausian", ("did you mean gaussian?",)),
    ],
)
def test_an_override_that_fits_nothing_is_refused_by_key(
    override: str, said: tuple[str, ...], few: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "run.yaml", "vae", data=few)
    starts.train(tmp_path / "logs", str(config), override).wait().refused(*said)


# ---------------------------------------------------------------- checkpoints
def test_a_checkpoint_of_another_model_is_refused(trained: Path, few: Path, tmp_path: Path) -> None:
    other = write_config(tmp_path / "gan.yaml", "gan", data=few)
    with starts.nothing_changes(trained):
        ended = starts.train(tmp_path / "logs", str(other), f"run={trained}").wait()
        ended.refused("resume", "method.kind: vae -> gan")
        ended = starts.train(tmp_path / "logs", str(other), f"checkpoint.resume={trained}").wait()
        ended.refused("method.kind: vae -> gan")
        ended = starts.train(tmp_path / "logs", str(other), f"checkpoint.init_from={trained}").wait()
        ended.refused("checkpoint.init_from", "another model")


def test_two_runs_do_not_share_a_folder(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    words = [str(tmp_path / "run" / "config.yaml"), f"run={tmp_path / 'run'}", "images=1_000_000"]
    first = starts.train(tmp_path / "logs", *words)
    while first.running() and len(saved(tmp_path / "run")) < 9:
        time.sleep(0.01)
    starts.train(tmp_path / "logs", *words).wait().refused(str(tmp_path / "run"), str(first.ranks[0].pid))
    first.kill(signal.SIGTERM)
    assert first.wait().code == 143


# ---------------------------------------------------------------- disks and folders
def test_a_disk_without_room_is_refused_before_the_first_step_with_both_numbers(
    small_disk: Path, few: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "run.yaml", "vae", data=few)
    said = starts.train(tmp_path / "logs", str(config), f"run={small_disk / 'run'}").wait()
    line = said.refused("room for", "22 checkpoints (keep_last 20 + the best", "MB", "lower keep_last")
    assert "3.1 MB" in line  # 3 MiB
    assert saved(small_disk / "run") == []


def test_a_disk_that_fills_up_ends_the_run_and_leaves_what_was_saved(
    small_disk: Path, few: Path, tmp_path: Path
) -> None:
    config, run = write_config(tmp_path / "run.yaml", "vae", data=few), small_disk / "run"
    words = (f"run={run}", "checkpoint.keep_last=1", "checkpoint.keep_best=false", "images=1_000_000")
    subprocess.run(["mount", "-o", "remount,size=14m", str(small_disk)], check=True)
    started = starts.train(tmp_path / "logs", str(config), *words)
    while started.running() and not saved(run):
        time.sleep(0.005)
    with (small_disk / "somebody.else").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            pass
    line = started.wait().refused("No space left on device", str(run))
    assert "older ones are intact" in line or "board" in line
    (small_disk / "somebody.else").unlink()
    images = saved(run)[-1]
    again = starts.train(tmp_path / "logs", str(config), *words[:3], f"images={images + 16}").wait().ok()
    assert f"at {images:,} images" in again.out


def test_a_runs_folder_that_cannot_be_written_is_named(
    read_only: Path, few: Path, trained: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "run.yaml", "vae", data=few)
    run = read_only / "mine"
    starts.train(tmp_path / "logs", str(config), f"run={run}").wait().refused(str(run))
    starts.tandem(tmp_path / "logs", "check", str(config), f"run={run}").refused(str(read_only))
    starts.tandem(tmp_path / "logs", "sample", str(trained), "--out", str(run / "a.png")).refused(str(run))


def test_a_file_in_the_way_of_the_runs_folder_is_named(few: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    config = write_config(tmp_path / "run.yaml", "vae", data=few)
    with starts.nothing_changes(tmp_path):
        for run in (tmp_path / "taken", tmp_path / "taken" / "below"):
            starts.train(tmp_path / "logs", str(config), f"run={run}").wait().refused(str(run))


# ---------------------------------------------------------------- pictures
@pytest.mark.parametrize("verb", ["sample", "reconstruct", "interpolate"])
def test_a_picture_of_nothing_is_refused(verb: str, trained: Path, tmp_path: Path) -> None:
    starts.tandem(tmp_path / "logs", verb, str(tmp_path / "none")).refused(str(tmp_path / "none"), "no such run")
    (tmp_path / "run").mkdir()
    starts.tandem(tmp_path / "logs", verb, str(tmp_path / "run")).refused(str(tmp_path / "run"), "no checkpoint")
    shutil.copytree(trained, tmp_path / "damaged")
    for path in (tmp_path / "damaged" / "checkpoints").iterdir():
        (path / "autoencoder.ema.safetensors").write_bytes(b"")
    with starts.nothing_changes(tmp_path / "damaged"):
        starts.tandem(tmp_path / "logs", verb, str(tmp_path / "damaged")).refused("none can be loaded")
    (tmp_path / "mine.png").write_text("mine")
    with starts.nothing_changes(tmp_path):
        said = starts.tandem(tmp_path / "logs", verb, str(trained), "--out", str(tmp_path / "mine.png"))
        said.refused(str(tmp_path / "mine.png"), "exists")
    count = {"interpolate": "--rows"}.get(verb, "--count")
    starts.tandem(tmp_path / "logs", verb, str(trained), count, "0").refused(count)


# ---------------------------------------------------------------- Ctrl-C
def test_an_interrupt_at_any_moment_ends_without_a_traceback(few: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", "vaegan", data=few)
    for number, delay in enumerate((0.05, 0.2, 0.4, 0.8)):  # while it imports, builds, restores, trains
        started = starts.train(tmp_path / "logs", str(config), f"run={tmp_path / str(number)}", "images=1_000_000")
        while not started.logs[0].with_suffix(".ready").exists():
            time.sleep(0.001)
        time.sleep(delay)
        started.kill(signal.SIGINT)
        ended = started.wait()
        assert (ended.code, ended.err) == (130, ""), delay


def test_an_interrupt_of_the_command_while_it_imports_ends_without_a_traceback(few: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", "vaegan", data=few)
    for processes in ("1", "2"):
        command = [sys.executable, "-m", "launch.cli", "train", str(config), "--processes", processes]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            time.sleep(0.8)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (130, "")

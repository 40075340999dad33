"""A run that is killed, stopped, moved or damaged goes on as if nothing had happened (cases F4-1, F4-2, F4-4, F4-6)."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests import starts
from tests.runs import BATCH, IMAGES, METHODS, curves, losses, same, saved, tensors, write_config
from trainer import checkpoint

SEED = int(os.environ.get("TANDEM_KILL_SEED", "0"))
Straight = Callable[[str, int], Path]


@pytest.fixture(scope="session")
def straight(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """straight(method, world): the folder of a run that nobody disturbed; made once."""
    folder, made = tmp_path_factory.mktemp("straight"), {}

    def run(method: str, world: int) -> Path:
        if (method, world) not in made:
            config = write_config(folder / f"{method}-{world}.yaml", method, data=few)
            starts.train(folder / "logs", str(config), world=world).wait().ok()
            made[method, world] = config.with_suffix("")
            assert checkpoint.load(folder / f"{method}-{world}/checkpoints/{IMAGES:012d}").state["world"] == world
        return made[method, world]

    return run


def copy_at(run: Path, images: int, to: Path) -> list[str]:
    """A copy of `run` as it was when it had saved at `images` and was killed some updates later; the words to go on."""
    shutil.copytree(run, to)
    for path in (to / "checkpoints").iterdir():
        if int(path.name) > images:
            shutil.rmtree(path)
    return [str(to / "config.yaml"), f"run={to}"]


# ---------------------------------------------------------------- kill -9
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_killed_at_random_moments_ends_as_if_it_never_was(
    method: str, world: int, straight: Straight, few: Path, tmp_path: Path
) -> None:
    draw = random.Random(f"{SEED} {method} {world}")
    wanted = straight(method, world)
    config = write_config(tmp_path / "run.yaml", method, data=few)
    run, kills, moments = tmp_path / "run", 0, []
    while True:
        started, before = starts.train(tmp_path / "logs", str(config), world=world), saved(run)
        if len(moments) < 4:
            if not moments:  # while it builds, reads, saves or trains for the first time
                time.sleep(draw.uniform(0.0, 0.3))
            else:  # after at least one further checkpoint, so that the run ends some day
                while started.running() and saved(run) == before:
                    time.sleep(0.001)
                time.sleep(draw.uniform(0.0, 0.03))
            kills += started.running()
            started.kill(only=draw.randrange(world))
            time.sleep(draw.uniform(0.0, 0.05))  # the other rank sees a peer that is gone
            started.kill()
            moments.append(saved(run)[-1:])
        ended = started.wait()
        if set(ended.codes) == {0}:
            break
        assert len(moments) < 20, ended.err
    print(f"seed {SEED}: {kills} kills, checkpoints at them {moments}")
    assert kills >= 2, "it was too fast to be killed: nothing was tested"
    assert "goes on from" in ended.out
    assert curves(run) == curves(wanted)
    assert same(tensors(run), tensors(wanted))


def test_the_board_of_a_resumed_run_has_every_update_once(straight: Straight, tmp_path: Path) -> None:
    words = copy_at(straight("vaegan", 1), 192, tmp_path / "run")
    starts.train(tmp_path / "logs", *words).wait().ok()
    found = curves(tmp_path / "run")
    assert list(found["loss/autoencoder/nll"]) == list(range(BATCH, IMAGES + 1, BATCH))
    assert list(found["samples"]) == [192, 384]
    assert found == curves(straight("vaegan", 1))


# ---------------------------------------------------------------- another number of processes (F4-4)
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_with_another_number_of_processes(
    method: str, before: int, after: int, straight: Straight, tmp_path: Path
) -> None:
    words = copy_at(straight(method, before), 192, tmp_path / "run")
    ended = starts.train(tmp_path / "logs", *words, world=after).wait().ok()
    told = [line for line in ended.out.splitlines() if "processes" in line]
    assert told == [f"changed since then: {before} -> {after} processes; the batch stays"]
    found, wanted = losses(tmp_path / "run"), losses(straight(method, before))
    assert found.keys() == wanted.keys()
    worst = 0.0
    for tag, values in wanted.items():
        assert found[tag].keys() == values.keys()
        scale = max(abs(value) for value in values.values())
        for images, value in values.items():
            difference = abs(found[tag][images] - value) / scale
            worst = max(worst, difference)
    print(method, before, after, worst)
    assert 0 < worst < 1e-5


# ---------------------------------------------------------------- damaged checkpoints (F4-1)
DAMAGES: dict[str, Callable[[Path], None]] = {
    "half": lambda path: os.truncate(path / "autoencoder.safetensors", 1000),
    "empty": lambda path: os.truncate(path / "autoencoder.optimizer.safetensors", 0),
    "gone": lambda path: (path / "autoencoder.ema.safetensors").unlink(),
    "flipped": lambda path: _flip(path / "autoencoder.safetensors"),
}


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_named_and_the_older_used(
    damage: str, straight: Straight, tmp_path: Path
) -> None:
    words = copy_at(straight("vae", 1), 192, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    DAMAGES[damage](folder / "000000000192")
    (folder / ".saving-000000000240-1").mkdir()  # what a kill while saving leaves
    ended = starts.tandem(tmp_path / "logs", "train", *words) if damage == "half" else None  # the real command, once
    ended = ended or starts.train(tmp_path / "logs", *words).wait()
    assert ended.code == 0, ended.err
    assert f"checkpoint {folder / '000000000192'} is damaged" in ended.out
    assert f"goes on from {folder / '000000000144'} at 144 images" in ended.out
    assert (folder / "000000000192.damaged").is_dir()
    assert not list(folder.glob(".saving-*"))
    assert curves(tmp_path / "run") == curves(straight("vae", 1))


def test_a_run_whose_checkpoints_are_all_damaged_never_begins_again_at_0(straight: Straight, tmp_path: Path) -> None:
    words = copy_at(straight("vae", 1), 96, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        _flip(path / "autoencoder.safetensors")
    with starts.nothing_changes(tmp_path / "run"):
        starts.train(tmp_path / "logs", *words).wait().refused("none can be loaded", "000000000048", "000000000096")


# ---------------------------------------------------------------- a changed config (F4-2)
def test_a_new_rate_takes_effect_with_one_line_that_says_old_and_new(straight: Straight, tmp_path: Path) -> None:
    words = copy_at(straight("vaegan", 1), 192, tmp_path / "run")
    ended = starts.train(tmp_path / "logs", *words, "optim.lr=5e-4").wait().ok()
    assert [line for line in ended.out.splitlines() if "changed" in line and " run: " not in line] == [
        "changed since then: optim.lr: 0.002 -> 0.0005"
    ]
    found, old = curves(tmp_path / "run"), curves(straight("vaegan", 1))
    for name in ("autoencoder", "discriminator"):  # the discriminator's rate is the same key unless it has its own
        rates, before = found[f"lr/{name}"], old[f"lr/{name}"]
        assert all(rates[images] == before[images] for images in range(BATCH, 193, BATCH))
        for images in range(192 + BATCH, IMAGES + 1, BATCH):
            assert rates[images] == pytest.approx(before[images] / 4, rel=1e-6)  # stored as float32
    assert found["loss/autoencoder/nll"][208] == old["loss/autoencoder/nll"][208]  # taken before the first update
    assert found["loss/autoencoder/nll"][224] != old["loss/autoencoder/nll"][224]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("method.kl.weight=2.0", "method.kl.weight: 1.0 -> 2.0"),
        ("batch=32", "batch: 16 -> 32"),
        ("seed=1", "seed: 0 -> 1"),
        ("optim.ema_half_life=100", "optim.ema_half_life: 200 -> 100"),
    ],
)
def test_a_change_that_would_make_it_another_run_is_refused_by_name(
    override: str, said: str, straight: Straight, tmp_path: Path
) -> None:
    words = copy_at(straight("vae", 1), 192, tmp_path / "run")
    with starts.nothing_changes(tmp_path / "run"):
        starts.train(tmp_path / "logs", *words, override).wait().refused(said, "init_from")


def test_a_larger_budget_goes_on_where_the_run_ended(straight: Straight, tmp_path: Path) -> None:
    words = copy_at(straight("vae", 1), IMAGES, tmp_path / "run")
    ended = starts.train(tmp_path / "logs", *words, f"images={IMAGES + 32}").wait().ok()
    assert f"changed since then: images: {IMAGES} -> {IMAGES + 32}" in ended.out
    assert list(curves(tmp_path / "run")["loss/autoencoder/nll"]) == list(range(BATCH, IMAGES + 33, BATCH))


def test_a_finished_run_started_again_says_so_and_changes_no_curve(straight: Straight, tmp_path: Path) -> None:
    words = copy_at(straight("vae", 1), IMAGES, tmp_path / "run")
    ended = starts.train(tmp_path / "logs", *words).wait().ok()
    assert f"goes on from {tmp_path / 'run' / 'checkpoints' / '000000000384'}" in ended.out
    assert curves(tmp_path / "run") == curves(straight("vae", 1))


# ---------------------------------------------------------------- resume and init_from
def test_resume_must_and_never_and_a_path_do_what_they_say(straight: Straight, few: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "new.yaml", "vae", data=few)
    starts.train(tmp_path / "logs", str(config), "checkpoint.resume=must").wait().refused(
        "resume: must", "no checkpoint"
    )
    words = copy_at(straight("vae", 1), 192, tmp_path / "run")
    with starts.nothing_changes(tmp_path / "run"):
        starts.train(tmp_path / "logs", *words, "checkpoint.resume=never").wait().refused("resume: never")
    older = tmp_path / "run" / "checkpoints" / "000000000096"
    ended = starts.train(tmp_path / "logs", *words, f"checkpoint.resume={older}").wait().ok()
    assert f"goes on from {older} at 96 images" in ended.out
    assert "000000000192.superseded" in {path.name for path in older.parent.iterdir()}
    assert curves(tmp_path / "run") == curves(straight("vae", 1))


def test_init_from_begins_with_the_averaged_weights_of_another_run(
    straight: Straight, few: Path, tmp_path: Path
) -> None:
    source = straight("vae", 1)
    config = write_config(tmp_path / "run.yaml", "vae", data=few)
    words = (f"checkpoint.init_from={source}", "images=16", "optim.lr=1e-12")  # an update that changes next to nothing
    ended = starts.train(tmp_path / "logs", str(config), *words).wait().ok()
    assert f"begins with the weights of {source / 'checkpoints' / '000000000384'}" in ended.out
    assert saved(tmp_path / "run") == [16]  # the clock starts afresh
    given, found = tensors(source), tensors(tmp_path / "run")
    keys = [key for key in given if key.startswith("autoencoder.ema/")]
    assert keys
    for key in keys:
        plain = key.replace(".ema", "")
        torch.testing.assert_close(found[plain], given[key], rtol=0, atol=1e-11)
        assert not torch.equal(given[plain], given[key])  # else the test could not tell them apart


def test_init_from_another_model_is_refused_by_the_names_that_differ(
    straight: Straight, few: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "run.yaml", "vae", data=few)
    words = (f"checkpoint.init_from={straight('vae', 1)}", "method.autoencoder.width=8")
    starts.train(tmp_path / "logs", str(config), *words).wait().refused("init_from", "autoencoder", "of another shape")
    starts.train(tmp_path / "logs", str(config), f"checkpoint.init_from={tmp_path / 'no'}").wait().refused(
        "no such run"
    )


# ---------------------------------------------------------------- signals
def wait_for(started: starts.Started, run: Path) -> None:
    """Until a run trains: its first checkpoint is there."""
    while started.running() and not saved(run):
        time.sleep(0.01)
    assert started.running(), started.wait()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_one_signal_saves_and_stops_and_the_same_command_goes_on(
    number: int, code: int, straight: Straight, few: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "run.yaml", "vaegan", data=few)
    started = starts.train(tmp_path / "logs", str(config))
    wait_for(started, tmp_path / "run")
    started.kill(number)
    ended = started.wait()
    assert (ended.code, ended.err) == (code, "")
    images = saved(tmp_path / "run")[-1]
    assert images < IMAGES
    path = tmp_path / "run" / "checkpoints" / f"{images:012d}"
    assert ended.out.splitlines()[-1] == (
        f"stopped at {images:,} images; saved {path}; the same command goes on from there"
    )
    starts.train(tmp_path / "logs", str(config)).wait().ok()
    assert curves(tmp_path / "run") == curves(straight("vaegan", 1))
    assert same(tensors(tmp_path / "run"), tensors(straight("vaegan", 1)))


def test_a_second_interrupt_stops_at_once_without_a_save(few: Path, tmp_path: Path) -> None:
    slow = {"method.autoencoder.width": 96, "batch": 512, "log.every": 512, "checkpoint.every": 100_000}
    words = [f"{key}={value}" for key, value in slow.items()]
    words += ["log.evaluate_every=0", "log.pictures_every=0"]  # after which a first one is heard at once
    config = write_config(tmp_path / "run.yaml", "vae", data=few)
    started = starts.train(tmp_path / "logs", str(config), *words, "images=100_000")
    out = started.logs[0].with_suffix(".out")
    while started.running() and "of 100,352 images" not in out.read_text():  # the first update is done
        time.sleep(0.01)
    started.kill(signal.SIGINT)
    time.sleep(0.3)  # an update takes seconds, so the first is still waiting for its end
    started.kill(signal.SIGINT)
    ended = started.wait()
    assert (ended.code, ended.err) == (130, "")
    assert "stopped at" not in ended.out
    assert saved(tmp_path / "run") == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_on_two_processes_saves_stops_and_goes_on(
    number: int, code: int, straight: Straight, few: Path, tmp_path: Path
) -> None:
    config, run = write_config(tmp_path / "run.yaml", "vaegan", data=few), tmp_path / "run"
    command = [sys.executable, "-m", "launch.cli", "train", str(config), "--processes", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not saved(run):
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (code, ""), out
    assert "stopped at" in out.splitlines()[-1]
    images = saved(run)[-1]
    assert images < IMAGES
    state = json.loads((run / "checkpoints" / f"{images:012d}" / "state.json").read_text())
    assert state["world"] == 2  # two came up
    starts.train(tmp_path / "logs", str(config), world=2).wait().ok()
    assert curves(run) == curves(straight("vaegan", 2))


def test_a_killed_rank_ends_the_command_and_the_same_command_goes_on(
    straight: Straight, few: Path, tmp_path: Path
) -> None:
    config, run = write_config(tmp_path / "run.yaml", "vae", data=few), tmp_path / "run"
    command = [sys.executable, "-m", "launch.cli", "train", str(config), "--processes", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not saved(run):
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 2
        os.kill(int(children[1]), signal.SIGKILL)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 137
    assert err.startswith("tandem: error: rank 1 was killed by SIGKILL")
    starts.train(tmp_path / "logs", str(config), world=2).wait().ok()
    assert curves(run) == curves(straight("vae", 2))

"""Checkpoints from outside: what is saved comes back, what is damaged is found, nothing good is lost."""

import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer import checkpoint
from trainer.durable import exact, manifest_text, sha256

FILES = ("generator.safetensors", "generator.optimizer.safetensors", "state.json", "config.yaml", "manifest.json")


def save(folder: Path, images: int, *, loss: float = 0.5, numbers: int = 64) -> Path:
    tensors = {
        "generator": {"first.weight": torch.full((numbers, 2), float(images)), "step": torch.tensor(images)},
        "generator.optimizer": {"exp_avg.first.weight": torch.arange(numbers, dtype=torch.float64)},
    }
    state = {"images": images, "metrics": {"loss": loss}}
    return checkpoint.save(folder, images=images, tensors=tensors, state=state, config_text=f"images: {images}\n")


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


# ---------------------------------------------------------------- save and load


def test_tensors_state_and_config_come_back_exactly(tmp_path: Path) -> None:
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    given_tensors: dict[str, dict[str, Tensor]] = {
        "generator": {"conv.weight": noise.to(memory_format=torch.channels_last), "scalar": torch.tensor(1.5)},
        "generator.ema": {"half": noise.bfloat16(), "empty": torch.zeros(0, 3), "flag": torch.tensor([True, False])},
        "generator.optimizer": {},
    }
    state = {"a": 0.1 + 0.2, "b": [1, None, True, "ü"], "c": {"d": -0.0, "e": 5e-324}, "big": 2**80}
    path = checkpoint.save(tmp_path, images=4096, tensors=given_tensors, state=state, config_text="a: ü\n")
    found = checkpoint.load(path)
    assert path == tmp_path / "checkpoints" / "000000004096"
    assert (found.images, found.state, found.config_text) == (4096, state, "a: ü\n")
    assert math.copysign(1.0, found.state["c"]["d"]) == -1.0  # type: ignore[call-overload,index,arg-type]
    assert found.tensors.keys() == given_tensors.keys()
    for name, group in given_tensors.items():
        assert found.tensors[name].keys() == group.keys()
        for key, tensor in group.items():
            assert found.tensors[name][key].dtype == tensor.dtype
            assert torch.equal(found.tensors[name][key], tensor)


@settings(deadline=None)  # cores are shared
@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_every_finite_float_of_the_state_round_trips(value: float) -> None:
    assert json.loads(json.dumps(exact({"x": value}, "state")))["x"] == value


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ({"balance": {"nll": float("nan")}}, "state.balance.nll: nan"),
        ({"x": [1.0, float("inf")]}, r"state.x\[1\]: inf"),
        ({"x": {3: 1}}, "state.x: key 3 is not text"),
        ({"x": (1, 2)}, "state.x: tuple is not JSON"),
    ],
)
def test_a_state_that_json_would_change_is_refused_by_its_key(
    tmp_path: Path, state: dict[str, object], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        checkpoint.save(tmp_path, images=1, tensors={}, state=state, config_text="")  # type: ignore[arg-type]
    assert not (tmp_path / "checkpoints").exists()


def test_views_and_tied_weights_are_saved_as_whole_tensors(tmp_path: Path) -> None:
    flat = torch.arange(12.0)
    group = {"a": flat[:6].view(2, 3), "b": flat[6:], "c": flat, "transposed": flat.view(3, 4).T}
    found = checkpoint.load(
        checkpoint.save(tmp_path, images=1, tensors={"net": group}, state={}, config_text="")
    ).tensors["net"]
    assert all(torch.equal(found[name], tensor) for name, tensor in group.items())


@pytest.mark.parametrize("name", ["module.first.weight", "_orig_mod.first.weight", "first._orig_mod.weight"])
def test_names_of_wrappers_never_reach_a_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(AssertionError, match="name of a wrapper"):
        checkpoint.save(tmp_path, images=1, tensors={"net": {name: torch.ones(1)}}, state={}, config_text="")


def test_only_the_tensors_that_were_asked_for_are_read(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    assert checkpoint.load(path, only=["generator"]).tensors.keys() == {"generator"}
    with pytest.raises(ValueError, match=r"holds no generator.ema; it has generator, generator.optimizer"):
        checkpoint.load(path, only=["generator.ema"])


def test_saving_what_is_there_already_leaves_it_as_it_is(tmp_path: Path) -> None:
    path = save(tmp_path, 64)
    before = listing(tmp_path)
    assert save(tmp_path, 64, loss=9.0) == path
    assert listing(tmp_path) == before


def test_saving_over_a_damaged_one_keeps_it_aside(tmp_path: Path) -> None:
    path = save(tmp_path, 64)
    (path / "state.json").write_text("")
    assert checkpoint.damage(save(tmp_path, 64)) is None
    assert names(tmp_path) == ["000000000064", "000000000064.damaged"]


# ---------------------------------------------------------------- damage (F4-1)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def delete(path: Path) -> None:
    path.unlink()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("harm", [truncate, empty, delete, flip])
def test_a_damaged_newest_one_is_named_and_kept_and_the_older_is_used(
    tmp_path: Path, harm: Callable[[Path], None], file: str
) -> None:
    older, newest = save(tmp_path, 64), save(tmp_path, 128)
    harm(newest / file)
    harmed = listing(newest)
    with pytest.raises(ValueError, match="000000000128"):
        checkpoint.load(newest)
    lines: list[str] = []
    assert checkpoint.choose(tmp_path, "auto", log=lines.append) == older
    assert len(lines) == 1 and str(newest) in lines[0] and str(older) in lines[0] and file in lines[0]
    assert listing(newest.with_name("000000000128.damaged")) == harmed
    assert checkpoint.load(older).images == 64


@settings(deadline=None)  # cores are shared
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_flipped_bit_of_the_manifest_changes_what_is_loaded(
    tmp_path_factory: pytest.TempPathFactory, position: float, bit: int
) -> None:
    path = save(tmp_path_factory.mktemp("run"), 64, numbers=2)
    manifest = path / "manifest.json"
    content = bytearray(manifest.read_bytes())
    content[int(position * len(content))] ^= 1 << bit
    manifest.write_bytes(bytes(content))
    if checkpoint.damage(path) is None:  # it was white space
        assert checkpoint.load(path).images == 64


def test_names_count_and_not_times_of_files(tmp_path: Path) -> None:
    newest, older = save(tmp_path, 1_000_000_000_000), save(tmp_path, 999_999_999_999)
    os.utime(newest, (0, 0))
    assert checkpoint.choose(tmp_path, "auto") == newest
    assert older.exists()


def test_temporary_folders_are_ignored_and_removed(tmp_path: Path) -> None:
    good = save(tmp_path, 64)
    for name in (".saving-000000000128-77", ".removing-000000000032-77"):
        (good.parent / name).mkdir()
        (good.parent / name / "generator.safetensors").write_bytes(b"half")
    assert checkpoint.choose(tmp_path, "auto") == good
    assert names(tmp_path) == [good.name]


def test_a_temporary_folder_alone_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".saving-000000000064-77").mkdir(parents=True)
    assert checkpoint.choose(tmp_path, "auto") is None


def test_a_run_whose_checkpoints_are_all_damaged_never_starts_again_at_0(tmp_path: Path) -> None:
    for images in (64, 128):
        truncate(save(tmp_path, images) / "generator.safetensors")
    before = listing(tmp_path)
    for _ in range(2):  # the second start too
        with pytest.raises(ValueError, match=r"none can be loaded \(000000000128: generator.safetensors has"):
            checkpoint.choose(tmp_path, "auto")
    assert listing(tmp_path) == before


def test_a_run_that_holds_nothing_but_what_was_set_aside_does_not_start_again_at_0(tmp_path: Path) -> None:
    path = save(tmp_path, 64)
    path.rename(path.with_name("000000000064.damaged"))
    for resume in ("auto", "must"):
        with pytest.raises(ValueError, match=r"none can be loaded \(000000000064.damaged\)"):
            checkpoint.choose(tmp_path, resume)


def test_a_manifest_that_names_a_file_outside_is_damaged(tmp_path: Path) -> None:
    path = save(tmp_path, 64)
    outside = tmp_path / "secret"
    outside.write_text("x")
    files = {"../../secret": {"bytes": 1, "sha256": sha256(outside)}}
    (path / "manifest.json").write_text(manifest_text(images=64, files=files))
    assert checkpoint.damage(path) is not None


# ---------------------------------------------------------------- resume: never, must, PATH


def test_a_new_folder_starts_at_0_unless_resume_is_must(tmp_path: Path) -> None:
    assert checkpoint.choose(tmp_path, "auto") is None
    assert checkpoint.choose(tmp_path / "new", "never") is None
    with pytest.raises(ValueError, match="resume: must"):
        checkpoint.choose(tmp_path, "must")


@pytest.mark.parametrize("suffix", ["", ".damaged", ".superseded"])
def test_never_refuses_a_folder_with_checkpoints_and_touches_nothing(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path, 64)
    path.rename(path.with_name(path.name + suffix))
    before = listing(tmp_path)
    with pytest.raises(ValueError, match=r"resume: never, but .* holds 1 checkpoints"):
        checkpoint.choose(tmp_path, "never")
    assert listing(tmp_path) == before


def test_a_path_is_a_checkpoint_or_a_run(tmp_path: Path) -> None:
    first, second = save(tmp_path / "a", 64), save(tmp_path / "a", 128)
    assert checkpoint.choose(tmp_path / "b", str(first)) == first
    assert checkpoint.choose(tmp_path / "b", tmp_path / "a") == second
    assert checkpoint.choose(tmp_path / "a", "must") == second
    with pytest.raises(ValueError, match="neither a checkpoint nor a run folder"):
        checkpoint.choose(tmp_path / "b", tmp_path / "c")


def test_going_back_to_an_older_checkpoint_keeps_the_newer_ones_aside(tmp_path: Path) -> None:
    older, newest = save(tmp_path, 64), save(tmp_path, 128)
    lines: list[str] = []
    assert checkpoint.choose(tmp_path, older, log=lines.append) == older
    assert names(tmp_path) == [older.name, f"{newest.name}.superseded"]
    assert len(lines) == 1 and str(newest) in lines[0]
    assert checkpoint.choose(tmp_path, "auto") == older


def test_a_path_of_another_run_is_refused_where_own_checkpoints_exist(tmp_path: Path) -> None:
    other = save(tmp_path / "a", 64)
    save(tmp_path / "b", 32)
    with pytest.raises(ValueError, match="belongs to another run"):
        checkpoint.choose(tmp_path / "b", other)


def test_a_damaged_path_is_refused_and_another_run_is_left_alone(tmp_path: Path) -> None:
    older, newest = save(tmp_path / "a", 64), save(tmp_path / "a", 128)
    truncate(newest / "state.json")
    with pytest.raises(ValueError, match=r"000000000128 is damaged \(state.json"):
        checkpoint.choose(tmp_path / "b", newest)
    lines: list[str] = []
    assert checkpoint.choose(tmp_path / "b", tmp_path / "a", log=lines.append) == older
    assert "left alone" in lines[0] and newest.exists()


# ---------------------------------------------------------------- retention and room (F4-10)


def test_retention_keeps_the_last_the_best_and_the_marked(tmp_path: Path) -> None:
    losses = {1: 0.9, 2: 0.1, 3: 0.8, 4: 0.7, 5: 0.6, 6: 0.5}
    paths = {images: save(tmp_path, images, loss=loss) for images, loss in losses.items()}
    (paths[1] / "KEEP").touch()
    removed = checkpoint.retain(tmp_path, keep_last=2, best="metrics.loss")
    assert removed == [paths[4], paths[3]]
    assert names(tmp_path) == [paths[i].name for i in (1, 2, 5, 6)]
    assert checkpoint.retain(tmp_path, keep_last=1, best="metrics.loss", higher_is_better=True) == [paths[5], paths[2]]
    (paths[1] / "KEEP").unlink()
    assert checkpoint.retain(tmp_path, keep_last=1, best="metrics.absent") == [paths[1]]


def test_a_kill_while_an_old_one_is_removed_leaves_no_half_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = save(tmp_path, 1), save(tmp_path, 2)

    def killed(path: Path) -> None:
        next(path.iterdir()).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("trainer.checkpoint.shutil.rmtree", killed)
        checkpoint.retain(tmp_path, keep_last=1)
    assert not old.exists()
    assert checkpoint.choose(tmp_path, "auto") == new
    assert names(tmp_path) == [new.name]


def test_a_damaged_one_does_not_count_among_the_last(tmp_path: Path) -> None:
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    truncate(bad / "generator.safetensors")
    assert checkpoint.retain(tmp_path, keep_last=1) == []
    assert good.exists() and bad.exists()


def test_too_little_room_is_told_with_both_numbers(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path)
    size = free.f_bavail * free.f_frsize
    with pytest.raises(ValueError, match=r"room for [\d.]+ MB, but 3 checkpoints .* need [\d.]+ MB"):
        checkpoint.room_for(tmp_path, size, keep_last=2, keep_best=False)
    with pytest.raises(ValueError, match=r"but 4 checkpoints \(keep_last 2 \+ the best \+ the one being written\)"):
        checkpoint.room_for(tmp_path, size, keep_last=2, keep_best=True)
    checkpoint.room_for(tmp_path, size // 100, keep_last=2, keep_best=True)
    assert names(tmp_path) == []


def test_the_expected_size_is_at_least_the_true_one_and_close(tmp_path: Path) -> None:
    tensors = {"net": {f"layer{i}.weight": torch.zeros(1000, 100) for i in range(20)}}
    path = checkpoint.save(tmp_path, images=1, tensors=tensors, state={}, config_text="")
    true = sum(file.stat().st_size for file in path.iterdir())
    assert true <= checkpoint.size_bytes(tensors) <= true + 1_100_000


def test_a_folder_that_cannot_be_written_is_told_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="the run's folder cannot be written") as caught:
        checkpoint.room_for(tmp_path / "file" / "run", 1, keep_last=1, keep_best=True)
    assert caught.value.filename == str(tmp_path / "file" / "run" / "checkpoints")


# ---------------------------------------------------------------- a full disk, a kill


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_leaves_the_older_checkpoint_and_nothing_else(small_disk: Path) -> None:
    good = save(small_disk, 64, numbers=20_000)  # 320 kB
    before = listing(small_disk)
    with pytest.raises(OSError, match=r"the older ones are intact \(No space left on device\)") as caught:
        save(small_disk, 128, numbers=50_000)
    assert caught.value.filename == str(small_disk / "checkpoints" / "000000000128")
    assert listing(small_disk) == before and names(small_disk) == [good.name]
    assert checkpoint.choose(small_disk, "auto") == good
    checkpoint.room_for(
        small_disk, 400_000, keep_last=1, keep_best=False
    )  # what the run's own checkpoint holds will be free
    (good / "KEEP").touch()
    with pytest.raises(ValueError, match=r"room for 0\.7 MB, but 2 checkpoints .* of 0\.4 MB need 0\.8 MB"):
        checkpoint.room_for(small_disk, 400_000, keep_last=1, keep_best=False)


def test_a_file_limit_leaves_the_older_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    good = save(tmp_path, 64)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="the older ones are intact"):
            save(tmp_path, 128, numbers=50_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == [good.name]


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from trainer import checkpoint

folder, draw, last, inside = Path(sys.argv[1]), random.Random(7), 0, 0
weights = torch.zeros(200_000)
for _ in range(25):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        images = last
        while True:
            images += 64
            tensors = {"net": {"weight": weights.fill_(images)}, "net.ema": {"weight": weights[:1000]}}
            checkpoint.save(folder, images=images, tensors=tensors, state={"images": images}, config_text="")
            os.write(writer, b"%d\\n" % images)
            checkpoint.retain(folder, keep_last=2)
    os.close(writer)
    time.sleep(draw.uniform(0.0, 0.06))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    promised = [int(line) for line in os.read(reader, 1 << 16).split()]
    os.close(reader)
    inside += any(path.name.startswith(".") for path in (folder / "checkpoints").glob("*"))
    path = checkpoint.choose(folder, "auto", log=lambda line: sys.exit(line))
    if path is None:
        assert last == 0 and not promised
        continue
    found = checkpoint.load(path)
    assert found.images >= max([last, *promised]), (found.images, last, promised)
    assert found.state["images"] == found.images
    assert (found.tensors["net"]["weight"] == found.images).all()
    last = found.images
print(inside, last)
"""


def test_a_kill_at_any_moment_of_saving_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, env=env, timeout=120
    )
    assert done.returncode == 0, done.stderr
    inside, last = map(int, done.stdout.split())
    assert inside > 0, "no kill fell into a save: the test proves nothing"
    assert last > 0

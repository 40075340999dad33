"""What a maker does about what is there already: it goes on from what it made, and never over anything else."""

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools.shards import folder, pack, reshard
from tools.shards.make import main
from trainer.data.part import UNFINISHED

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ("--val-fraction", "0.2", "--shard-size", "10KB", "--workers", "2", "--max-bad", "0.2")
Tree = dict[str, bytes]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """24 images in two classes, and one that is none."""
    for number in range(24):
        path = tmp_path / "in" / "ab"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    (tmp_path / "in" / "a" / "bad.png").write_text("no")
    return tmp_path / "in"


def make(source: Path, dest: Path) -> int:
    return main(["folder", str(source), str(dest), *OPTIONS])


def every_byte(folder: Path) -> Tree:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def whole(source: Path, tmp_path: Path) -> Tree:
    make(source, tmp_path / "whole")
    return every_byte(tmp_path / "whole")


@pytest.fixture
def begun(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A set of which three shards and more are made, interrupted."""
    real, count = folder.Encode._pack, iter(range(1, 1000))

    def interrupted(self: folder.Encode, key: str, data: bytes, found: folder.Found) -> pack.Packed:
        if next(count) == 19:
            raise KeyboardInterrupt
        return real(self, key, data, found)

    with monkeypatch.context() as patch:
        patch.setattr(folder.Encode, "_pack", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(source, tmp_path / "out")
    assert len(list((tmp_path / "out").rglob("*.tar"))) >= 3
    return tmp_path / "out"


def first(begun: Path) -> Path:
    return min(path for path in begun.rglob("*.tar") if path.parent.name != UNFINISHED)


# ------------------------------------------------------------------ going on
def test_shards_that_were_lost_since_are_made_again(source: Path, begun: Path, whole: Tree) -> None:
    first(begun).unlink()
    assert make(source, begun) == 0
    assert every_byte(begun) == whole


@pytest.mark.parametrize("cut", [True, False])
def test_a_shard_that_is_another_one_by_now_is_named_and_made_again_when_it_is_gone(
    source: Path, begun: Path, whole: Tree, *, cut: bool
) -> None:
    path = first(begun)
    data = path.read_bytes()
    other = data[:-512] if cut else data[:700] + b"?" + data[701:]
    path.write_bytes(other)
    with pytest.raises(ValueError, match=rf"^{path}: is not the shard that was made there.*take it away"):
        make(source, begun)
    assert path.read_bytes() == other
    path.unlink()
    assert make(source, begun) == 0
    assert every_byte(begun) == whole


def test_a_shard_of_somebody_else_in_the_way_is_named_and_kept(source: Path, begun: Path, whole: Tree) -> None:
    made = {path.name for path in begun.rglob("*.tar")}
    name = next(name for name in sorted(whole) if name.endswith(".tar") and Path(name).name not in made)
    (begun / name).parent.mkdir(exist_ok=True)
    (begun / name).write_text("years of work")
    with pytest.raises(ValueError, match=rf"^{begun / name}: is there already and not of this set; take it away"):
        make(source, begun)
    assert (begun / name).read_text() == "years of work"
    (begun / name).unlink()
    assert make(source, begun) == 0
    assert every_byte(begun) == whole


@pytest.mark.parametrize("calls", range(1, 12, 2))
def test_a_maker_that_stops_at_any_change_of_the_folder_goes_on_to_the_same_bytes(
    source: Path, tmp_path: Path, whole: Tree, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    real, count = Path.replace, iter(range(1, 1000))

    def stopping(self: Path, target: Path) -> Path:
        if next(count) == 3 * calls:
            raise KeyboardInterrupt
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stopping)
        with pytest.raises(KeyboardInterrupt):
            make(source, tmp_path / "out")
    assert make(source, tmp_path / "out") == 0
    assert every_byte(tmp_path / "out") == whole


def test_a_folder_in_use_is_not_taken_for_one_of_ours(source: Path, tmp_path: Path) -> None:
    (tmp_path / "mine" / UNFINISHED).mkdir(parents=True)
    (tmp_path / "mine" / "train").mkdir()
    (tmp_path / "mine" / "train" / "train-00000.tar").write_text("years of work")
    with pytest.raises(ValueError, match=r"is not empty and not a set of shards.*nothing is overwritten"):
        make(source, tmp_path / "mine")
    assert (tmp_path / "mine" / "train" / "train-00000.tar").read_text() == "years of work"


@pytest.mark.parametrize("text", ["", "{\n\x01", "[]", "{}", '{"options": 1, "steps": {"train": [{"made": 3}]}}'])
def test_a_damaged_note_of_what_was_made_is_named(source: Path, begun: Path, text: str) -> None:
    path = begun / UNFINISHED / "state.json"
    path.write_text(text)
    with pytest.raises(
        ValueError, match=rf"^{path}: is not readable \(.*remove {begun} and make the set again"
    ) as told:
        make(source, begun)
    assert "\n" not in str(told.value)


# ------------------------------------------------------------------ a finished set
def damaged(dest: Path) -> dict[str, Callable[[], object]]:
    shard = dest / "train" / "train-00000.tar"
    return {
        r"train-00000\.tar: is missing": shard.unlink,
        r"train-00000\.tar: expected": lambda: shard.write_bytes(shard.read_bytes()[:-512]),
        r"index\.json: is not readable": lambda: (dest / "test" / "index.json").write_text("{\n\x01"),
    }


@pytest.mark.parametrize("what", sorted(damaged(Path())))
def test_a_finished_set_that_is_damaged_is_not_called_complete(source: Path, tmp_path: Path, what: str) -> None:
    make(source, tmp_path / "out")
    damaged(tmp_path / "out")[what]()
    with pytest.raises(ValueError, match=rf"{what}(.*\n)+.*remove {tmp_path / 'out'}, and the same command makes it"):
        make(source, tmp_path / "out")


# ------------------------------------------------------------------ a full disk
def limited(words: list[str]) -> "subprocess.CompletedProcess[str]":
    """A command under a limit of bytes a file, which fails as a full disk does."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    command = [sys.executable, "-m", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=limit, check=False)


def test_a_disk_that_takes_no_more_is_told_with_the_folder(source: Path, tmp_path: Path) -> None:
    make(source, tmp_path / "out")
    out, again, large = str(tmp_path / "out"), str(tmp_path / "again"), ("--shard-size", "1MB")
    for words in (
        ["tools.shards.make", "folder", str(source), again, "--max-bad", "0.2", *large],
        ["tools.shards.reshard", out, again, *large],
    ):
        ran = limited(words)
        assert (ran.returncode, ran.stderr.strip()) == (2, f"tandem: error: File too large: {again}")
        subprocess.run(["rm", "-r", again], check=True)


def test_a_source_that_cannot_be_read_is_told_with_its_name(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    make(source, tmp_path / "out")
    monkeypatch.setattr(reshard.os, "pread", failing)
    with pytest.raises(OSError, match=r"Input/output error: '.*/out/train/train-0000\d\.tar'"):
        reshard.main([str(tmp_path / "out"), str(tmp_path / "again"), "--workers", "1"])
    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(OSError, match=r"Input/output error: '.*/in/[ab]/\w+\.png'"):
        make(source, tmp_path / "third")

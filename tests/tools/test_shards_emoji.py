"""`tandem data make emoji`, on packages of the same layout with few pictures."""

import base64
import gc
import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from webdataset import tariterators

from tools.shards import emoji, npm
from tools.shards.make import main
from trainer.data import ShardsConfig, Stream

TONES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")


def entry(unified: str, name: str, category: str, *, tones: bool = False) -> dict[str, object]:
    found: dict[str, object] = {
        "unified": unified, "image": f"{unified.lower()}.png", "name": name, "short_name": name.lower(),
        "category": category, "subcategory": "some",
    }  # fmt: skip
    if tones:
        variations = {tone: {"image": f"{unified}-{tone}.png".lower()} for tone in TONES}
        if unified == "1F91D":  # as in the package: two hands, each of its own tone
            variations["1F3FB-1F3FC"] = {"image": "1faf1-1f3fb-200d-1faf2-1f3fc.png"}
        found["skin_variations"] = variations
    return found


PEOPLE = [
    entry("1F3C3", "RUNNER", "People & Body", tones=True),
    entry("1F3C3-200D-2640-FE0F", "WOMAN RUNNING", "People & Body", tones=True),
    entry("1F91D", "HANDSHAKE", "People & Body", tones=True),
    entry("1F468-200D-1F33E", "MAN FARMER", "People & Body", tones=True),
    entry("1F469-200D-1F33E", "WOMAN FARMER", "People & Body", tones=True),
]
THINGS = [entry(f"1F4{number:02X}", f"THING {number}", "Objects") for number in range(60)]
TABLE = [*PEOPLE, *THINGS]


def names(table: list[dict[str, object]]) -> list[str]:
    found = []
    for row in table:
        variations: dict[str, dict[str, str]] = row.get("skin_variations", {})  # type: ignore[assignment]
        found += [str(row["image"]), *(variation["image"] for variation in variations.values())]
    return found


def drawing(number: int) -> bytes:
    """A disc of a colour of its own; what lies around it is transparent, with a loud colour underneath."""
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[:] = (255, 0, 255, 0)
    rows, columns = np.mgrid[:64, :64]
    disc = (rows - 32) ** 2 + (columns - 32) ** 2 < 500
    pixels[disc] = (number % 256, number // 256, 90, 255)
    file = io.BytesIO()
    Image.fromarray(pixels).quantize(16).save(file, "PNG")  # a palette with alpha, as the packages have them
    return file.getvalue()


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "packages"
    folder.mkdir()
    for start, style in enumerate(("google", "twitter")):
        content = {"emoji.json": json.dumps(TABLE).encode(), "img/../../evil.png": b"", "README.md": b"#"}
        for number, name in enumerate(names(TABLE)):
            content[f"img/{style}/64/{name}"] = drawing(number + 300 * start)
            content[f"img/{style}/32/{name}"] = b"another size"
        content[f"img/{style}/64/1f401.png"] = content[f"img/{style}/64/1f3c3-1f3fb.png"]
        path = folder / f"emoji-datasource-{style}-16.0.0.tgz"
        with tarfile.open(path, "w:gz") as archive:
            for name, data in content.items():
                info = tarfile.TarInfo(f"package/{name}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
        package = emoji.PACKAGES[style]._replace(integrity=f"sha512-{digest}")
        monkeypatch.setitem(emoji.PACKAGES, style, package)
    return folder


def make(dest: Path, packages: Path, *options: str) -> Path:
    assert main(["emoji", str(dest), "--from", str(packages), *options]) == 0
    return dest


def samples(folder: Path) -> list[dict[str, bytes]]:
    found = []
    for path in sorted(folder.glob("*.tar")):
        with path.open("rb") as file:
            members = tariterators.tar_file_expander([{"url": str(path), "stream": file}])
            found += list(tariterators.group_by_keys(members))
    return found


def test_a_set_has_every_emoji_with_name_category_and_tone_on_white(tmp_path: Path, packages: Path) -> None:
    out = make(tmp_path / "out", packages)
    found = {s["__key__"]: s for split in ("train", "test") for s in samples(out / split)}
    assert sorted(f"{key}.png" for key in found) == sorted(names(TABLE))
    runner = found["1f3c3-1f3ff"]
    assert json.loads(runner["json"]) == {
        "name": "runner", "short_name": "runner", "category": "People & Body", "subcategory": "some",
        "skin_tones": ["dark"],
    }  # fmt: skip
    assert (runner["cls"], found["1f40f"]["cls"]) == (b"1", b"0")  # Objects, People & Body
    pixels = np.load(io.BytesIO(runner["npy"]))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[32, 32].tolist() == [5, 0, 90]
    index = json.loads((out / "train" / "index.json").read_text())
    assert "Apache-2.0" in index["report"]["licence"] and "16.0.0" in index["report"]["source"]


def test_pairs_hold_both_drawings_and_the_trainer_reads_the_left_one(tmp_path: Path, packages: Path) -> None:
    out = make(tmp_path / "out", packages, "--style", "pairs")
    (sample,) = (s for s in samples(out / "train") + samples(out / "test") if s["__key__"] == "1f40f")
    number = names(TABLE).index("1f40f.png")
    for side, start in (("left", 0), ("right", 300)):
        pixels = np.load(io.BytesIO(sample[f"{side}.npy"]))
        assert pixels[32, 32].tolist() == [(number + start) % 256, (number + start) // 256, 90]
    config = ShardsConfig(path=out, size=64, channels=3)
    stream = Stream(config, split="train", batch=4, rank=0, world=1, seed=0)
    assert stream.first(4).data.shape == (4, 64, 64, 3)
    assert stream.classes == ("Objects", "People & Body")


@pytest.mark.parametrize("seed", range(6))
def test_all_drawings_of_one_thing_are_on_one_side(tmp_path: Path, packages: Path, seed: int) -> None:
    out = make(tmp_path / "out", packages, "--val-fraction", "0.4", "--seed", str(seed))
    side = {s["__key__"]: split for split in ("train", "test") for s in samples(out / split)}
    runners = {side[key] for key in side if key.startswith("1f3c3")} | {side["1f401"]}
    hands = {side[key] for key in side if key.startswith(("1f91d", "1faf1"))}
    farmers = {side[key] for key in side if key.endswith("1f33e")}
    assert [len(group) for group in (runners, hands, farmers)] == [1, 1, 1]
    assert 10 < sum(split == "test" for split in side.values()) < 80


def test_no_byte_depends_on_the_workers(tmp_path: Path, packages: Path) -> None:
    sets = [make(tmp_path / name, packages, "--workers", name, "--shard-size", "300KB") for name in ("1", "4")]
    files = [sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file()) for out in sets]
    assert files[0] == files[1] and len(files[0]) > 5
    assert all((sets[0] / name).read_bytes() == (sets[1] / name).read_bytes() for name in files[0])


def test_another_file_is_refused_and_nothing_is_made(tmp_path: Path, packages: Path) -> None:
    path = packages / "emoji-datasource-google-16.0.0.tgz"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ValueError, match=r"google-16\.0\.0\.tgz: is not the published file.*npm pack emoji-data"):
        main(["emoji", str(tmp_path / "out"), "--from", str(packages)])
    path.unlink()
    with pytest.raises(ValueError, match=r"google-16\.0\.0\.tgz: is missing.*npm pack emoji-data"):
        main(["emoji", str(tmp_path / "out"), "--from", str(packages)])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_published_packages_give_3786_pairs(tmp_path: Path) -> None:
    assert main(["emoji", str(tmp_path / "out"), "--style", "pairs"]) == 0
    found = [s for split in ("train", "test") for s in samples(tmp_path / "out" / split)]
    assert len(found) == 3786
    assert len({json.loads(s["json"])["category"] for s in found}) == 10
    assert all({"left.npy", "right.npy", "cls", "json"} < set(s) for s in found)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("form", ["jpg", "png", "webp", "npy"])
def test_webdatasets_own_pipeline_reads_every_format(tmp_path: Path, packages: Path, form: str) -> None:
    out = make(tmp_path / "out", packages, "--format", form, "--size", "32")
    shards = sorted(str(path) for path in (out / "train").glob("*.tar"))
    with webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8") as found:
        for sample in found:
            assert sample[form].shape == (32, 32, 3) and sample[form].dtype == np.uint8
            assert sample["cls"] in (0, 1) and sample["json"]["name"]
    gc.collect()  # webdataset leaves its files to the collector, which complains


def test_npm_is_named_where_a_package_cannot_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    package = emoji.PACKAGES["google"]
    with pytest.raises(ValueError, match=r"this machine has no npm; .*bring emoji-datasource-google-16\.0\.0\.tgz"):
        npm.archives([package], given=None, cache=tmp_path, say=len, registry="http://127.0.0.1:9/")

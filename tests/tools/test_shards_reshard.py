"""`tandem data reshard`: any maker's shards become ours, with nothing lost."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from webdataset import tariterators

from tools.shards import reshard
from tools.shards.make import main as make
from trainer.data import ShardsConfig, Stream
from trainer.data.decode import decode

SPECIES = ("crow", "owl", "wren")


def encoded(seed: int, form: str, size: tuple[int, int] = (20, 24)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """24 + 8 samples as webdataset's writer packs them: sorted by class, keys with folders, further members."""
    for split, count in (("train", 24), ("test", 8)):
        folder = tmp_path / "foreign" / split
        folder.mkdir(parents=True)
        for shard in range(2):
            with webdataset.TarWriter(str(folder / f"birds-{shard}.tar"), mtime=0) as writer:
                for number in range(shard * count // 2, (shard + 1) * count // 2):
                    writer.write({
                        "__key__": f"{split}.v1/{number:03d}",
                        "jpg": encoded(number, "JPEG"),
                        "json": json.dumps({"species": SPECIES[number * 3 // count], "number": number}).encode(),
                        "txt": f"bird {number}".encode(),
                        "features.npy": np.full(5, number, np.float32),
                    })  # fmt: skip
    return tmp_path / "foreign"


def samples(folder: Path) -> dict[str, dict[str, bytes]]:
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with path.open("rb") as file:
            members = tariterators.tar_file_expander([{"url": "", "stream": file}])
            found.update({sample["__key__"]: sample for sample in tariterators.group_by_keys(members)})
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def run(source: Path, dest: Path, *options: str) -> Path:
    assert reshard.main([str(source), str(dest), "--image", "jpg", "--label", "json:species", *options]) == 0
    return dest


def test_every_member_is_kept_and_the_classes_get_numbers(tmp_path: Path, foreign: Path) -> None:
    out = run(foreign, tmp_path / "out", "--shard-size", "20KB")
    for split, count in (("train", 24), ("test", 8)):
        before, after = samples(foreign / split), samples(out / split)
        assert sorted(after) == sorted(before) and list(after) != list(before)
        for key, sample in after.items():
            label = SPECIES.index(json.loads(sample["json"])["species"])
            assert sample == {**before[key], "cls": str(label).encode()}
        assert len(after) == count
        assert json.loads((out / split / "index.json").read_text())["classes"] == list(SPECIES)
    assert len(list((out / "train").glob("*.tar"))) > 3
    stream = Stream(ShardsConfig(path=out, size=(20, 24)), split="train", batch=8, rank=0, world=1, seed=0)
    assert stream.first(8).data.shape == (8, 20, 24, 3)
    assert stream.classes == SPECIES


def test_the_order_of_the_source_can_be_kept(tmp_path: Path, foreign: Path) -> None:
    out = run(foreign, tmp_path / "out", "--no-shuffle")
    assert list(samples(out / "train")) == list(samples(foreign / "train"))


@pytest.mark.parametrize(("form", "field"), [("keep", "jpg"), ("png", "png"), ("webp", "webp"), ("auto", "npy")])
def test_images_are_resized_and_encoded_where_asked(tmp_path: Path, foreign: Path, form: str, field: str) -> None:
    out = run(foreign, tmp_path / "out", "--size", "12", "--format", form)
    before, after = samples(foreign / "train"), samples(out / "train")
    for key, sample in after.items():
        assert decode(sample[field], field, channels=3, max_pixels=10**6).shape == (12, 12, 3)
        assert sample["features.npy"] == before[key]["features.npy"]  # no image: as it is
    image = json.loads((out / "train" / "index.json").read_text())["image"]
    assert (image["height"], image["fields"]) == ([12, 12], [field])


def test_both_images_of_a_pair_are_changed(tmp_path: Path) -> None:
    folder = tmp_path / "pairs" / "train"
    folder.mkdir(parents=True)
    with webdataset.TarWriter(str(folder / "a.tar")) as writer:
        for number in range(3):
            sides = {f"{side}.png": encoded(number, "PNG") for side in ("left", "right")}
            writer.write({"__key__": f"{number}", "cls": b"1", **sides})
    arguments = [str(tmp_path / "pairs"), str(tmp_path / "out"), "--image", "left.png", "--size", "8"]
    assert reshard.main([*arguments, "--format", "npy"]) == 0
    for sample in samples(tmp_path / "out" / "train").values():
        assert set(sample) - {"__key__", "__url__", "__local_path__"} == {"left.npy", "right.npy", "cls"}
        assert np.load(io.BytesIO(sample["right.npy"])).shape == (8, 8, 3)


def test_a_set_of_ours_keeps_its_classes_and_its_report(tmp_path: Path) -> None:
    for number in range(20):
        path = tmp_path / "in" / f"class {number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(number, "PNG"))
    assert make(["folder", str(tmp_path / "in"), str(tmp_path / "made")]) == 0
    assert reshard.main([str(tmp_path / "made"), str(tmp_path / "out"), "--seed", "3"]) == 0
    for split in ("train", "test"):
        before, after = samples(tmp_path / "made" / split), samples(tmp_path / "out" / split)
        assert {key: sample["json"] for key, sample in before.items()} == {k: s["json"] for k, s in after.items()}
        assert {key: sample["npy"] for key, sample in before.items()} == {k: s["npy"] for k, s in after.items()}
    index = json.loads((tmp_path / "out" / "train" / "index.json").read_text())
    assert index["classes"] == ["class 0", "class 1"]
    assert index["report"]["not_images"] == 0 and index["report"]["resharded_from"] == str(tmp_path / "made")


def test_keys_that_several_shards_have_are_told_apart(tmp_path: Path) -> None:
    folder = tmp_path / "twice" / "train"
    folder.mkdir(parents=True)
    for shard in range(3):
        with webdataset.TarWriter(str(folder / f"{shard}.tar")) as writer:
            for number in range(4):
                writer.write({"__key__": f"{number}", "png": encoded(10 * shard + number, "PNG")})
    assert reshard.main([str(tmp_path / "twice"), str(tmp_path / "out")]) == 0
    after = samples(tmp_path / "out" / "train")
    assert sorted(after) == [f"{shard:05d}/{number}" for shard in range(3) for number in range(4)]
    assert len({sample["png"] for sample in after.values()}) == 12


def test_names_beyond_plain_tar_headers_stay_readable(tmp_path: Path) -> None:
    folder = tmp_path / "long" / "train"
    folder.mkdir(parents=True)
    key = "ü" * 120
    with tarfile.open(folder / "a.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        for number in range(3):
            data = encoded(number, "PNG")
            info = tarfile.TarInfo(f"{key}{number}.png")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    assert reshard.main([str(tmp_path / "long"), str(tmp_path / "out"), "--no-shuffle"]) == 0
    assert list(samples(tmp_path / "out" / "train")) == [f"{key}{number}" for number in range(3)]
    stream = Stream(ShardsConfig(path=tmp_path / "out", size=(20, 24)), split="train", batch=3, rank=0, world=1, seed=0)
    expected = {np.asarray(Image.open(io.BytesIO(encoded(number, "PNG")))).tobytes() for number in range(3)}
    assert {image.tobytes() for image in stream.first(3).data.numpy()} == expected


def test_no_byte_depends_on_the_workers(tmp_path: Path, foreign: Path) -> None:
    one, four = (run(foreign, tmp_path / n, "--workers", n, "--size", "16", "--shard-size", "20KB") for n in ("1", "4"))
    assert files(one) == files(four)


@pytest.mark.parametrize("calls", [1, 9, 30])
def test_an_interrupted_copy_goes_on_to_the_same_bytes(
    tmp_path: Path, foreign: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    options = ("--shard-size", "20KB", "--workers", "1")
    whole = run(foreign, tmp_path / "whole", *options)
    real, count = reshard.Copy._image, iter(range(1, 1000))

    def interrupted(self: reshard.Copy, field: str, data: bytes) -> object:
        if field == "jpg" and next(count) == calls:
            raise KeyboardInterrupt
        return real(self, field, data)

    monkeypatch.setattr(reshard.Copy, "_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(foreign, tmp_path / "out", *options)
    monkeypatch.setattr(reshard.Copy, "_image", real)
    assert files(run(foreign, tmp_path / "out", *options)) == files(whole)


def test_a_finished_copy_is_left_alone_and_a_changed_source_is_seen(
    tmp_path: Path, foreign: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(foreign, tmp_path / "out")
    run(foreign, out)
    assert "already complete" in capsys.readouterr().out
    with pytest.raises(ValueError, match="nothing is overwritten"):
        run(foreign, out, "--size", "8")


def test_an_image_that_cannot_be_decoded_is_left_out_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bad" / "train"
    folder.mkdir(parents=True)
    with webdataset.TarWriter(str(folder / "a.tar")) as writer:
        for number in range(4):
            data = encoded(number, "PNG")
            writer.write({"__key__": f"{number}", "png": data[: len(data) // 2] if number == 2 else data})
    arguments = [str(tmp_path / "bad"), str(tmp_path / "out"), "--size", "8"]
    with pytest.raises(ValueError, match=r"1 of 4 images \(25\.0%\) is bad.*a\.tar: 2"):
        reshard.main(arguments)
    assert reshard.main([*arguments, "--max-bad", "0.3"]) == 0
    said = capsys.readouterr().out
    assert "left out: train: " in said and "packed 3 train samples, 1 left out;" in said
    assert sorted(samples(tmp_path / "out" / "train")) == ["0", "1", "3"]


@pytest.mark.parametrize(
    ("source", "dest", "said"),
    [
        ("gone", "out", "gone: does not exist"),
        ("foreign", "foreign/out", "lies inside"),
        ("empty", "out", r"holds no train/\*\.tar"),
    ],
)
def test_what_cannot_be_copied_is_said(tmp_path: Path, foreign: Path, source: str, dest: str, said: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=said):
        run(tmp_path / source, tmp_path / dest)
    assert not (tmp_path / dest).exists()


def test_the_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        reshard.main(["--help"])
    assert left.value.code == 0
    assert "tandem data reshard data/faces data/faces64 --size 64" in capsys.readouterr().out

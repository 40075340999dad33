"""`tandem data index`: builds an index, or renews one and keeps what a maker said."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.data.conftest import npy, numbered, write_tar
from tools.shards.index import main
from trainer.data import ShardsConfig
from trainer.data import index as indices

IMAGE = npy(numbered(7, (2, 3, 1)))


def shard(path: Path, samples: Sequence[dict[str, bytes]]) -> Path:
    return write_tar(
        path, [(f"k{n}.{field}", data) for n, sample in enumerate(samples) for field, data in sample.items()]
    )


def content(path: Path, split: str = "train") -> dict[str, object]:
    return json.loads((path / split / "index.json").read_text())


def labels(path: Path, split: str = "train", **options: object) -> list[str]:
    index = indices.load(ShardsConfig(path=path, size=2, **options), split)  # type: ignore[arg-type]
    return [index.classes[number] for number in index.rows(np.arange(index.samples))["label"].tolist()]


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    """Two splits; samples have two images, a class number and a species."""
    for split, species in (("train", ["owl", "emu", "owl"]), ("test", ["tit"])):
        shard(tmp_path / split / "a.tar", [
            {"left.npy": IMAGE, "right.npy": IMAGE, "cls": b"%d" % n, "json": json.dumps({"species": name}).encode()}
            for n, name in enumerate(species)
        ])  # fmt: skip
    return tmp_path


def test_fields_are_chosen_and_classes_are_of_both_splits(birds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(birds), "--image", "left.npy", "--label", "json:species"]) == 0
    said = capsys.readouterr().out
    assert f"{birds}/test/index.json: 1 sample in 1 shard, 3 classes" in said
    assert f"{birds}/train/index.json: 3 samples in 1 shard, 3 classes" in said
    assert content(birds)["reading"] == {"image": "left.npy", "label": "json:species", "ignore": []}
    assert content(birds)["classes"] == content(birds, "test")["classes"] == ["emu", "owl", "tit"]
    assert (labels(birds), labels(birds, "test")) == (["owl", "emu", "owl"], ["tit"])


def test_an_image_must_be_chosen_where_there_are_several(birds: Path) -> None:
    with pytest.raises(ValueError, match=r"key k0 has several image fields \(found: left\.npy, right\.npy"):
        main([str(birds)])
    assert not list(birds.rglob("index.json"))


def test_renewing_keeps_the_choice_of_fields_unless_another_is_made(birds: Path) -> None:
    assert main([str(birds), "--image", "left.npy", "--label", "json:species"]) == 0
    shard(birds / "train" / "b.tar", [{"left.npy": IMAGE, "cls": b"7", "json": b'{"species": "jay"}'}])
    assert main([str(birds)]) == 0
    assert labels(birds) == ["owl", "emu", "owl", "jay"]
    assert main([str(birds), "--label", "cls"]) == 0
    assert labels(birds) == ["0", "1", "2", "7"]
    assert content(birds)["reading"] == {"image": "left.npy", "label": "cls", "ignore": []}


def test_refused_kinds_are_passed_over_where_they_are_named(tmp_path: Path) -> None:
    shard(tmp_path / "train" / "a.tar", [{"npy": IMAGE, "pyd": b"x", "cls": b"0", "meta.gz": b"x"}])
    with pytest.raises(ValueError, match="key k0 holds pyd"):
        main([str(tmp_path)])
    assert main([str(tmp_path), "--ignore", "pyd,meta.gz"]) == 0
    assert main([str(tmp_path)]) == 0
    assert content(tmp_path)["reading"] == {"image": "auto", "label": "auto", "ignore": ["meta.gz", "pyd"]}


def test_an_index_of_format_1_is_renewed_with_its_names_options_and_report(tmp_path: Path) -> None:
    shard(tmp_path / "train" / "train-00000.tar", [{"npy": IMAGE, "cls": b"1"}, {"npy": IMAGE, "cls": b"0"}])
    old = {
        "format": 1, "samples": 2, "classes": ["Coat", "Bag", "Boot"], "options": {"kind": "folder"},
        "report": {"licence": "MIT"}, "image": {}, "offsets": {"name": "index.npz", "sha256": ""}, "shards": [],
    }  # fmt: skip
    (tmp_path / "train" / "index.json").write_text(json.dumps(old))
    (tmp_path / "train" / "index.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=rf"is of format 1, this version reads 2; run `tandem data index {tmp_path}`"):
        labels(tmp_path)
    assert main([str(tmp_path)]) == 0
    assert labels(tmp_path) == ["Bag", "Coat"]
    found = content(tmp_path)
    assert (found["classes"], found["options"], found["report"]) == (old["classes"], old["options"], old["report"])
    assert not (tmp_path / "train" / "index.npz").exists()


def test_names_that_are_too_few_for_the_class_numbers_are_dropped(tmp_path: Path) -> None:
    shard(tmp_path / "train" / "a.tar", [{"npy": IMAGE, "cls": b"1"}])
    assert main([str(tmp_path)]) == 0
    shard(tmp_path / "train" / "a.tar", [{"npy": IMAGE, "cls": b"3"}])
    assert main([str(tmp_path)]) == 0
    assert content(tmp_path)["classes"] == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"classes": 3, "options": 4, "reading": {"image": 5}}', "[" * 100_000]
)
def test_an_index_that_is_damaged_is_renewed(tmp_path: Path, text: str) -> None:
    shard(tmp_path / "train" / "a.tar", [{"npy": IMAGE, "cls": b"1"}])
    (tmp_path / "train" / "index.json").write_text(text)
    assert main([str(tmp_path)]) == 0
    assert labels(tmp_path) == ["1"]


def test_shards_that_changed_are_taken_as_they_are(tmp_path: Path) -> None:
    shard(tmp_path / "train" / "a.tar", [{"npy": IMAGE, "cls": b"1"}])
    assert main([str(tmp_path)]) == 0
    shard(tmp_path / "train" / "a.tar", [{"npy": IMAGE, "cls": b"0"}] * 3)
    with pytest.raises(ValueError, match=r"a\.tar: .*`tandem data index`"):
        labels(tmp_path)
    assert main([str(tmp_path)]) == 0
    assert labels(tmp_path) == ["0", "0", "0"]


def test_a_folder_without_shards_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for path in (tmp_path, tmp_path / "gone"):
        with pytest.raises(ValueError, match=rf"^{path}: .*`tandem data make`"):
            main([str(path)])


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--image", "pyd"], r"^data\.image: pyd is of a kind that is never read"),
        (["--label", "cls:x"], r"^data\.label: cls:x is none of auto, FIELD, json:KEY"),
        (["--label", "json:x"], r"^data\.label: no sample of \S+ has json:x"),
        (["--image", "jpg"], r"a\.tar: key k0 has no field jpg \(found: npy, cls\)"),
    ],
)
def test_a_bad_choice_is_named(tmp_path: Path, options: list[str], what: str) -> None:
    shard(tmp_path / "train" / "a.tar", [{"npy": IMAGE, "cls": b"1"}])
    with pytest.raises(ValueError, match=what):
        main([str(tmp_path), *options])


def test_a_bar_is_shown_on_a_terminal_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shard(tmp_path / "train" / "a.tar", [{"npy": IMAGE, "cls": b"1"}] * 3)
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    assert main([str(tmp_path)]) == 0
    assert "indexing 1 of 1 shard " in capsys.readouterr().err

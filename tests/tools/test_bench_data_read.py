"""The read benchmark compares the same images, says what it measured, and counts every way's work. No figure is held to
anything: the machine is shared."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tools.bench import turns
from tools.bench.data import loaders, others, peer, read
from tools.bench.data.sets import KINDS, Made, files_of, make
from trainer.data.decode import decode

SHORT = ["--samples", "96", "--batch", "8", "--seconds", "0.01", "--rounds", "2"]
WAYS = {"bare", "tandem", "tandem, 2 readers", "tandem, in memory", "webdataset", "folder, Pillow"}


@pytest.fixture(autouse=True)
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "TURN", 0.002)


@pytest.fixture(scope="module", params=list(KINDS))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(KINDS[request.param], 48, tmp_path_factory.mktemp(request.param) / "set")


def test_a_short_run_prints_a_table_and_writes_figures_machine_and_versions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "read.json"
    argv = ["--kinds", "jpeg,npy", *SHORT, "--out", str(out)]
    assert read.main(argv) == 0
    found = json.loads(out.read_text())
    assert found["command"] == "python -m tools.bench.data read " + " ".join(argv)
    assert found["versions"]["torch"] == torch.__version__
    assert {"webdataset", "simplejpeg", "pillow"} <= set(found["versions"])
    printed = capsys.readouterr().out
    for kind in ("jpeg", "npy"):
        rows = {row["way"]: row for row in found["rows"] if row["kind"] == kind}
        assert set(rows) == WAYS
        assert rows["bare"]["ratio_to_bare"] == {"median": 1.0, "least": 1.0, "most": 1.0}
        assert rows["webdataset"]["ratio_to_webdataset"] == {"median": 1.0, "least": 1.0, "most": 1.0}
        for name, row in rows.items():
            assert name in printed
            assert row["us_per_sample"] > 0
            for spread in (row["ratio_to_bare"], row["ratio_to_webdataset"]):
                assert 0 < spread["least"] <= spread["median"] <= spread["most"]


def test_resuming_is_timed_from_a_config_to_the_first_batch(tmp_path: Path) -> None:
    out = tmp_path / "read.json"
    assert read.main(["--kinds", "png", "--resume", *SHORT, "--out", str(out)]) == 0
    found = json.loads(out.read_text())["resume"]["png"]
    assert found["samples"] == 96
    assert set(found["ms"]) == {"at 0 %", "at 95 %"}
    assert found["ratio"]["median"] > 0


def test_a_machine_without_a_gpu_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"^--device: this machine has no GPU that torch can use"):
        read.main(["--device", "cuda"])


def test_the_images_weigh_what_real_ones_weigh() -> None:
    sizes = {}
    for name, kind in KINDS.items():
        files = list(files_of(kind, 20))
        for data in files[:3]:
            image = decode(data, kind.field, channels=kind.channels, max_pixels=1 << 20)
            assert image.shape == (kind.side, kind.side, kind.channels)
        sizes[name] = sum(map(len, files)) / len(files)
    assert 11_000 < sizes["jpeg"] < 16_000  # photographs of 256 x 256 at quality 90: 13.4 kB
    assert 400 < sizes["png"] < 700  # Fashion-MNIST: 0.58 kB


def test_every_way_gives_the_same_images(made: Made) -> None:
    expected = {
        decode(data, made.kind.field, channels=made.kind.channels, max_pixels=1 << 20).tobytes() for data in made.files
    }
    stream = loaders.stream_of(made, 8, readers=2)
    found = [image.numpy().tobytes() for raw in stream.evaluation(8) for image in raw.data]
    assert set(found) == expected
    assert len(found) == 48
    stream.close()
    decoder = loaders.bare_decoder(made.kind)
    assert {np.asarray(decoder(data)).tobytes() for data in made.files} == expected
    if made.kind.field == "png":  # Pillow's JPEG rounds otherwise
        assert {loaders.pillow(data, made.kind).tobytes() for data in made.files} == expected
        assert {image.numpy().tobytes() for image, _ in loaders.Files(made.folder, made.kind)} == expected


def test_reading_ahead_pays_for_what_it_took(monkeypatch: pytest.MonkeyPatch, made: Made) -> None:
    stream = loaders.stream_of(made, 8, readers=2)
    turn = loaders.ahead(stream)
    read_so_far: list[int] = []
    real = stream._reader._fill.__class__.__call__

    def counted(self: object, samples: np.ndarray, *rest: object) -> object:
        read_so_far.append(len(samples))
        return real(self, samples, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(stream._reader._fill.__class__, "__call__", counted)
    for count in (1, 5, 3):
        read_so_far.clear()
        assert turn(count) > 0
        assert sum(read_so_far) == 8 * count
    stream.close()


# ------------------------------------------------------------------ peers in processes of their own
def test_a_peer_that_is_not_installed_is_left_out_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not others.installed("mosaicml")
    assert capsys.readouterr().out == "mosaicml: not installed, left out\n"


def test_a_peer_that_ends_says_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Made) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho some noise >&2; echo it is broken >&2; exit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    other = others.Other("litdata", made, 8, tmp_path / "work", decoder="bare")
    with other, pytest.raises(ValueError, match="litdata: its process ended: it is broken"):
        other.turn(1)


@pytest.mark.parametrize("name", list(peer.PEERS))
def test_a_peer_takes_its_turns(tmp_path: Path, made: Made, name: str) -> None:
    if importlib.util.find_spec(peer.MODULES[name]) is None:
        pytest.skip(f"{name} is not installed")
    with others.Other(name, made, 8, tmp_path / "work", decoder="bare") as other:
        assert other.turn(1) > 0
        assert other.turn(7) > 0

"""`tandem data make fashion-mnist`: the published files, whatever the way they came."""

import gzip
import hashlib
import http.server
import shutil
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import webdataset
from webdataset import tariterators

from tests.tools.debs import package
from tools.shards import fashion
from tools.shards.make import main
from trainer.data import ShardsConfig, Stream


def idx(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return gzip.compress(head + array.tobytes(), mtime=0)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The four files with 30 + 20 images; their digests stand in for the published ones."""
    folder = tmp_path / "files"
    folder.mkdir()
    digests = {}
    for prefix, count in (("train", 30), ("t10k", 20)):
        images = np.random.default_rng(count).integers(0, 256, (count, 28, 28), np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", np.arange(count).astype(np.uint8) % 10)):
            path = folder / f"{prefix}-{name}-ubyte.gz"
            path.write_bytes(idx(array))
            digests[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(fashion, "FILES", digests)
    monkeypatch.setattr(fashion, "INSTALLED", tmp_path / "not installed")
    return folder


def test_every_image_is_packed_with_its_label_and_its_number(small: Path, tmp_path: Path) -> None:
    assert main(["fashion-mnist", str(tmp_path / "out"), "--from", str(small)]) == 0
    original = fashion.read(small)
    for split, (images, labels) in original.items():
        found = []
        for path in sorted((tmp_path / "out" / split).glob("*.tar")):
            with path.open("rb") as file:
                members = tariterators.tar_file_expander([{"url": str(path), "stream": file}])
                found += list(webdataset.decode()(tariterators.group_by_keys(members)))
        keys = [int(sample["__key__"]) for sample in found]
        assert sorted(keys) == list(range(len(labels))) != keys  # all, shuffled
        for sample, key in zip(found, keys, strict=True):
            assert np.array_equal(sample["npy"][..., 0], images[key])
            assert sample["cls"] == labels[key]
    config = ShardsConfig(path=tmp_path / "out", size=28, channels=1)
    stream = Stream(config, split="test", batch=4, rank=0, world=1, seed=0)
    assert (stream.samples, stream.classes[9]) == (20, "Ankle boot")


def test_a_changed_file_is_refused_whatever_the_source(small: Path, tmp_path: Path) -> None:
    (small / "t10k-labels-idx1-ubyte.gz").write_bytes(idx(np.zeros(20, np.uint8)))
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte\.gz is not the published file"):
        main(["fashion-mnist", str(tmp_path / "out"), "--from", str(small)])
    assert not (tmp_path / "out").exists()


def test_a_missing_file_is_named(small: Path, tmp_path: Path) -> None:
    (small / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is missing"):
        main(["fashion-mnist", str(tmp_path / "out"), "--from", str(small)])


@pytest.fixture
def site(small: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(small))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def test_the_site_is_the_last_way_and_what_it_gave_is_kept(
    site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)  # a machine without apt
    monkeypatch.setattr(fashion, "SITE", site)
    with fashion.files(None, cache=tmp_path / "cache") as folder:
        assert len(fashion.read(folder)["train"][1]) == 30
    monkeypatch.setattr(fashion, "SITE", f"{site}gone/")
    with fashion.files(None, cache=tmp_path / "cache") as folder:
        assert len(fashion.read(folder)["train"][1]) == 30


def test_when_no_way_works_each_is_named_with_its_reason(
    small: Path, site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(fashion, "SITE", f"{site}gone/")
    pattern = r"from debian: this machine has no dpkg-deb.*; from site: HTTP Error 404.*--from"
    with pytest.raises(ValueError, match=pattern), fashion.files(None, cache=tmp_path / "cache"):
        pass


def test_the_installed_package_is_the_first_way(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion, "INSTALLED", small)
    with fashion.files(None, cache=tmp_path / "cache") as folder:
        assert folder == small
    assert not (tmp_path / "cache").exists()


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb")
def test_a_debian_package_in_a_folder_is_taken_without_network(small: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(small, tree / "usr/share/datasets/fashion-mnist")
    debs = package(tree, fashion.PACKAGE, tmp_path / "debs")
    fashion.INSTALLED = Path("/usr/share/datasets/fashion-mnist")  # the fixture puts it back
    with fashion.files(debs, cache=tmp_path / "cache") as folder:
        assert len(fashion.read(folder)["test"][1]) == 20


def test_size_format_and_order_can_be_chosen(small: Path, tmp_path: Path) -> None:
    options = ["--size", "32", "--format", "png", "--no-shuffle", "--shard-size", "10KB"]
    assert main(["fashion-mnist", str(tmp_path / "out"), "--from", str(small), *options]) == 0
    config = ShardsConfig(path=tmp_path / "out", size=32, channels=1)
    stream = Stream(config, split="test", batch=4, rank=0, world=1, seed=0)
    assert stream.first(2).data.shape == (2, 32, 32, 1)
    with tarfile.open(tmp_path / "out" / "test" / "test-00000.tar") as shard:
        names = shard.getnames()
    assert names[:4] == ["00000.png", "00000.cls", "00001.png", "00001.cls"]
    assert len(list((tmp_path / "out" / "train").glob("*.tar"))) > 5

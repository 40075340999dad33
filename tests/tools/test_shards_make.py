"""What all makers share: words of the command line, files from the network, formats that webdataset reads."""

import argparse
import base64
import gc
import hashlib
import http.server
import importlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from tools.shards import fetch, npm, options
from tools.shards.make import KINDS, main

ROOT = Path(__file__).resolve().parents[2]


# ------------------------------------------------------------------ the command line
@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1B", 1),
        ("100KB", 100_000),
        ("100kB", 100_000),
        ("64MB", 64_000_000),
        ("0.5GB", 500_000_000),
        ("1MiB", 1 << 20),
        ("2 KiB", 2048),
    ],
)
def test_a_size_is_a_number_with_a_unit(text: str, size: int) -> None:
    assert options.size_in_bytes(text) == size


def test_a_size_beyond_every_disk_is_a_number_too() -> None:
    assert options.size_in_bytes("9" * 400 + "MB") > 10**400


@pytest.mark.parametrize("text", ["64", "MB", "-1MB", "0MB", "0.1B", "64mb", "1TB", "nan MB", "64MB/s"])
def test_a_size_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="64MB"):
        options.size_in_bytes(text)


@pytest.mark.parametrize("text", ["train", "train,", ",val", "a,a", "a,b,c", "/,val"])
def test_splits_are_two_folders(text: str) -> None:
    assert options.splits("train/,val") == ("train", "val")
    with pytest.raises(argparse.ArgumentTypeError, match="train,val"):
        options.splits(text)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_a_maker_and_a_help_with_an_example(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(importlib.import_module(KINDS[kind].module).make)
    with pytest.raises(SystemExit) as left:
        main([kind, "--help"])
    said = capsys.readouterr().out
    assert left.value.code == 0
    assert f"  tandem data make {kind} " in said
    for option in ("--size", "--format", "--shard-size", "--no-shuffle", "--seed", "--workers"):
        assert option in said


VERBS = {verb: f"tools.shards.{verb}" for verb in ("make", "index", "reshard", "stats", "show")}
HELPS = [*VERBS, "verify", *(f"make {kind}" for kind in KINDS)]


@pytest.mark.parametrize("words", HELPS)
def test_every_help_fits_a_terminal(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    verb, *kind = words.split()
    module = importlib.import_module(VERBS.get(verb, "tools.shards.check"))
    with pytest.raises(SystemExit):
        module.main([*kind, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > 80] == []
    assert f"usage: tandem data {words} " in lines[0]


def test_what_a_verb_says_goes_through_one_piece() -> None:
    """Names of files and classes may hold what steers a terminal."""
    files = (ROOT / "tools" / "shards").glob("*.py")
    prints = {path.name: path.read_text().count("print(") for path in files if "print(" in path.read_text()}
    assert prints == {"words.py": 1, "report.py": 1, "stats.py": 1}  # tables of shown names, and JSON, which is ASCII


def test_help_does_not_wait_for_numpy_or_torch() -> None:
    code = "import sys; from tools.shards import make, reshard; make.parse(['fashion-mnist', 'x']); "
    code += "reshard.parse(['a', 'b']); print({'numpy', 'torch', 'PIL'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"


# ------------------------------------------------------------------ shards for others
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("form", [form for form in options.FORMATS if form != "auto"])
def test_webdatasets_plain_reader_decodes_every_format(tmp_path: Path, form: str) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (10, 24, 30, 3), np.uint8)
    for number, pixels in enumerate(pictures):
        path = tmp_path / "in" / f"{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    arguments = ["folder", str(tmp_path / "in"), str(tmp_path / "out"), "--val-fraction", "0", "--shard-size", "10KB"]
    assert main([*arguments, "--format", form]) == 0
    shards = sorted(str(path) for path in (tmp_path / "out" / "train").glob("*.tar"))
    assert len(shards) > 1
    found = list(webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8"))
    assert len(found) == 10
    for sample in found:
        number = int(Path(sample["json"]["path"]).stem)
        assert sample["cls"] == number % 2
        far = np.abs(sample[form].astype(int) - pictures[number]).mean()
        assert far < 20 if form == "jpg" else far == 0
    gc.collect()  # webdataset leaves its files to the collector, which complains


# ------------------------------------------------------------------ the network
class Site(http.server.ThreadingHTTPServer):
    """Serves DATA under any name; `cuts` answers end early, `fails` are errors, ranges may be understood or not."""

    data = np.random.default_rng(1).bytes(300_000)

    def __init__(self, *, cuts: int = 0, fails: int = 0, ranges: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.cuts, self.fails, self.ranges = cuts, fails, ranges
        self.asked: list[str] = []


class Answer(http.server.BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        site, said = self.server, self.headers.get("Range", "")
        site.asked.append(said)
        if site.fails:
            site.fails -= 1
            self.send_error(503)
            return
        start = int(said[6:-1]) if said and site.ranges else 0
        if start > len(site.data):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(site.data) - start))
        self.end_headers()
        end = start + 100_000 if site.cuts else len(site.data)
        site.cuts = max(0, site.cuts - 1)
        self.wfile.write(site.data[start:end])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    with Site(**getattr(request, "param", {})) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("site", "asked"),
    [
        ({}, [""]),
        ({"cuts": 2}, ["", "bytes=100000-", "bytes=200000-"]),
        ({"cuts": 1, "ranges": False}, ["", "bytes=100000-"]),
        ({"fails": 2}, ["", "", ""]),
    ],
    indirect=["site"],
)
def test_a_download_goes_on_where_it_broke_off(tmp_path: Path, site: Site, asked: list[str]) -> None:
    fetch.download(f"http://127.0.0.1:{site.server_port}/a.tgz", tmp_path / "a.tgz")
    assert (tmp_path / "a.tgz").read_bytes() == site.data
    assert site.asked == asked
    assert not (tmp_path / "a.tgz.part").exists()


@pytest.mark.parametrize("site", [{"fails": 99}, {"cuts": 99, "ranges": False}], indirect=True)
def test_a_download_that_never_succeeds_ends_and_leaves_no_whole_file(tmp_path: Path, site: Site) -> None:
    with pytest.raises(OSError, match=r"503|too early"):
        fetch.download(f"http://127.0.0.1:{site.server_port}/a.tgz", tmp_path / "a.tgz")
    assert len(site.asked) == fetch.TRIES
    assert not (tmp_path / "a.tgz").exists()


def test_a_part_of_another_file_is_thrown_away(tmp_path: Path, site: Site) -> None:
    (tmp_path / "a.tgz.part").write_bytes(bytes(400_000))
    fetch.download(f"http://127.0.0.1:{site.server_port}/a.tgz", tmp_path / "a.tgz")
    assert (tmp_path / "a.tgz").read_bytes() == site.data


def test_an_archive_is_fetched_once_and_again_where_it_was_damaged(
    tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)  # a machine without npm
    digest = base64.b64encode(hashlib.sha512(site.data).digest()).decode()
    package = npm.Package("@scope/thing", "1.2.3", f"sha512-{digest}", 1)
    registry = f"http://127.0.0.1:{site.server_port}/"

    def archive() -> Path:
        return npm.archives([package], given=None, cache=tmp_path / "cache", say=len, registry=registry)[0]

    assert archive().read_bytes() == site.data
    assert archive().read_bytes() == site.data
    assert len(site.asked) == 1
    archive().write_bytes(b"damaged")
    assert archive().read_bytes() == site.data
    assert len(site.asked) == 2


def test_a_package_that_is_another_is_refused_and_not_kept(
    tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    package = npm.Package("thing", "1.2.3", "sha512-of another", 1)
    registry = f"http://127.0.0.1:{site.server_port}/"
    with pytest.raises(ValueError, match=r"thing 1\.2\.3: cannot be fetched .*its sha512 differs.*--from"):
        npm.archives([package], given=None, cache=tmp_path, say=len, registry=registry)
    assert not (tmp_path / "thing-1.2.3.tgz").exists()


def test_the_lock_file_fixes_every_package_by_sha512() -> None:
    lock = json.loads((ROOT / "tools" / "shards" / "node" / "package-lock.json").read_text())
    packages = {name: entry for name, entry in lock["packages"].items() if name}
    assert len(packages) > 30
    assert all(entry["integrity"].startswith("sha512-") for entry in packages.values())
    wanted = json.loads((ROOT / "tools" / "shards" / "node" / "package.json").read_text())["dependencies"]
    assert all(packages[f"node_modules/{name}"]["version"] == version for name, version in wanted.items())

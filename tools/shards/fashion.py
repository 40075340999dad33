"""Fashion-MNIST (Xiao, Rasul and Vollgraf 2017; MIT licence): 60,000 + 10,000 grey images of 28 x 28, 10 classes."""

import contextlib
import gzip
import hashlib
import os
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tools.shards.encode import npy
from tools.shards.pack import Packed, Plan
from trainer.data.order import permutation

FILES = {  # sha256, the same from Debian's package and from the project's site
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
PREFIXES = {"train": "train", "test": "t10k"}
PACKAGE = "dataset-fashion-mnist"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
SITE = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"  # https is not offered: the digests guard it
SHARD_BYTES = 5_000 * 2_560  # 5,000 samples: a header and 912 bytes, a header and one digit, in blocks of 512
TIMEOUT = 60  # seconds without a byte


def plan(arrays: dict[str, tuple[NDArray[np.uint8], NDArray[np.uint8]]], *, seed: int) -> Plan[int]:
    counts = {split: len(labels) for split, (_, labels) in arrays.items()}
    splits = {split: permutation(count, seed, number) for number, (split, count) in enumerate(counts.items())}
    return Plan(
        splits={split: rows.tolist() for split, rows in splits.items()},
        classes=CLASSES,
        options={"kind": "fashion-mnist", "seed": seed},
        notes={"licence": "MIT (Zalando SE)", "source": "Xiao, Rasul and Vollgraf 2017, arXiv:1708.07747"},
    )


class Encode:
    """The key of a sample is its number in the original file."""

    def __init__(self, arrays: dict[str, tuple[NDArray[np.uint8], NDArray[np.uint8]]]) -> None:
        self.arrays = arrays

    def __call__(self, split: str, number: int, row: int) -> Packed:
        images, labels = self.arrays[split]
        return Packed(f"{row:05d}", "npy", npy(images[row][..., None]), int(labels[row]), None, (28, 28, 1))


def read(folder: Path) -> dict[str, tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """{split: (images (N, 28, 28), labels (N,))}. ValueError where a file is not the published one."""
    fault = damage(folder)
    if fault:
        raise ValueError(f"{folder}: {fault}")
    found = {}
    for split, prefix in PREFIXES.items():
        images = gzip.decompress((folder / f"{prefix}-images-idx3-ubyte.gz").read_bytes())
        labels = gzip.decompress((folder / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())
        found[split] = (  # idx files: 4 bytes of magic, then 4 bytes a dimension, then the data
            np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28),
            np.frombuffer(labels, np.uint8, offset=8),
        )
    return found


def damage(folder: Path) -> str | None:
    for name, digest in FILES.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            return f"{name} is not the published file (its sha256 differs)"
    return None


@contextlib.contextmanager
def files(given: Path | None) -> Iterator[Path]:
    """A folder with the four files: `given`, else the installed Debian package, else that package fetched without root,
    else from the project's site. ValueError says why each way failed."""
    if given is not None or damage(INSTALLED) is None:
        yield given or INSTALLED
        return
    tried = []
    with tempfile.TemporaryDirectory(prefix="tandem-fashion-mnist-") as name:
        for number, fetch in enumerate((from_debian, from_site)):
            folder = Path(name) / str(number)
            folder.mkdir()
            try:
                found = fetch(folder)
            except OSError as error:
                tried.append(f"{fetch.__name__.replace('_', ' ')}: {error}")
                continue
            fault = damage(found)
            if fault is None:
                yield found
                return
            tried.append(f"{fetch.__name__.replace('_', ' ')}: {fault}")
    raise ValueError(
        f"fashion-mnist: cannot be fetched ({'; '.join(tried)}); install the Debian package {PACKAGE}, "
        f"or give a folder that holds {', '.join(FILES)} with --from"
    )


def from_debian(folder: Path) -> Path:
    """Downloads and unpacks the package, with apt's state of its own where this machine's lists do not know it."""
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise OSError("this machine has no apt-get")
    private = []
    for part in ("state/lists/partial", "cache/archives/partial"):
        (folder / part).mkdir(parents=True)
    for key, value in {
        "Dir::State": folder / "state",
        "Dir::State::status": "/var/lib/dpkg/status",
        "Dir::Cache": folder / "cache",
        "APT::Sandbox::User": "root",  # the folder is ours alone, so apt's own user cannot write there
    }.items():
        private += ["-o", f"{key}={value}"]
    polite = ["-o", "Acquire::Retries=2", "-o", f"Acquire::http::Timeout={TIMEOUT}"]
    sandbox = ["-o", "APT::Sandbox::User=root"]
    try:
        _run(["apt-get", "-q", *polite, *sandbox, "download", PACKAGE], folder)
    except OSError:
        _run(["apt-get", "-q", *polite, *private, "update"], folder)
        _run(["apt-get", "-q", *polite, *private, "download", PACKAGE], folder)
    package = next(iter(sorted(folder.glob(f"{PACKAGE}_*.deb"))), None)
    if package is None:
        raise OSError("apt-get downloaded nothing")
    _run(["dpkg-deb", "-x", str(package), str(folder / "unpacked")], folder)
    return folder / "unpacked" / INSTALLED.relative_to("/")


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(
        command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise OSError(f"{command[0]} says: {lines[-1] if lines else f'exit code {done.returncode}'}")


def from_site(folder: Path, site: str = SITE) -> Path:
    for name in FILES:
        aside = folder / f"{name}.part"
        with urllib.request.urlopen(f"{site}{name}", timeout=TIMEOUT) as source, aside.open("wb") as file:  # noqa: S310
            shutil.copyfileobj(source, file)
        os.replace(aside, folder / name)  # noqa: PTH105
    return folder

"""Fashion-MNIST (Xiao, Rasul and Vollgraf 2017; MIT licence): 60,000 + 10,000 grey images of 28 x 28, 10 classes."""

import argparse
import contextlib
import gzip
import hashlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.shards import debian
from tools.shards.encode import encode
from tools.shards.fetch import download, kept
from tools.shards.pack import Bar, Packed, Plan, complete, pack
from trainer.data import convert
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
SIZE = (28, 28)
SHARD_BYTES = 12_800_000  # 5,000 samples: a header and 912 bytes, a header and one digit, in blocks of 512
Arrays = dict[str, tuple[NDArray[np.uint8], NDArray[np.uint8]]]
"""{split: (images (N, 28, 28), labels (N,))}."""


def make(options: argparse.Namespace, *, bar: Bar, say: Callable[[str], int]) -> int:
    """`tandem data make fashion-mnist`. The key of a sample is its number in the original file."""
    wanted: dict[str, Any] = {"kind": "fashion-mnist", "seed": options.seed}
    if options.size != SIZE:
        wanted["size"] = options.size
    if options.format not in ("auto", "npy"):
        wanted["format"] = options.format
    if not options.shuffle:
        wanted["shuffle"] = False
    if options.shard_size != SHARD_BYTES:
        wanted["shard_size"] = options.shard_size
    if complete(options.dest, ("train", "test"), wanted):
        return say(f"{options.dest}: already complete; nothing was written")
    with files(options.given, cache=options.cache) as folder:
        arrays = read(folder)
    form = "npy" if options.format == "auto" else options.format

    def encoded(split: str, number: int, row: int) -> Packed:
        images, labels = arrays[split]
        made = encode(convert.resize(images[row][..., None], options.size), form)
        return Packed(f"{row:05d}", *made[:2], int(labels[row]), None, made.shape)

    wanted_plan = plan(arrays, seed=options.seed, shuffle=options.shuffle, options=wanted)
    with bar(sum(map(len, wanted_plan.splits.values()))) as advance:
        pack(
            options.dest, wanted_plan, encoded, shard_bytes=options.shard_size, workers=options.workers, max_bad=0.0,
            advance=advance,
        )  # fmt: skip
    train, test = (len(wanted_plan.splits[split]) for split in ("train", "test"))
    size = " x ".join(map(str, options.size))
    return say(f"{options.dest}: {train:,} training and {test:,} test images, {size} grey, 10 classes")


def plan(arrays: Arrays, *, seed: int, shuffle: bool, options: dict[str, Any]) -> Plan[int]:
    counts = {split: len(labels) for split, (_, labels) in arrays.items()}
    splits = {
        split: permutation(count, seed, number).tolist() if shuffle else list(range(count))
        for number, (split, count) in enumerate(counts.items())
    }
    notes = {"licence": "MIT (Zalando SE)", "source": "Xiao, Rasul and Vollgraf 2017, arXiv:1708.07747"}
    return Plan(splits=splits, classes=CLASSES, options=options, notes=notes)


def read(folder: Path) -> Arrays:
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
def files(given: Path | None, *, cache: Path) -> Iterator[Path]:
    """A folder with the four files: `given`, else the installed Debian package, else that package fetched without root,
    else from the project's site. ValueError says why each way failed."""
    with tempfile.TemporaryDirectory(prefix="tandem-fashion-mnist-") as name:
        into = Path(name)
        if given is not None:
            yield from_debian(into, given=given, cache=cache) if debian.newest(given, PACKAGE) else given
        elif damage(INSTALLED) is None:
            yield INSTALLED
        else:
            yield _fetched(into, cache)


def _fetched(into: Path, cache: Path) -> Path:
    tried = []
    for way, fetch in (
        ("from debian", lambda: from_debian(into, given=None, cache=cache)),
        ("from site", lambda: from_site(cache)),
    ):
        try:
            found = fetch()
        except OSError as error:
            tried.append(f"{way}: {error}")
            continue
        fault = damage(found)
        if fault is None:
            return found
        tried.append(f"{way}: {fault}")
    raise ValueError(
        f"fashion-mnist: cannot be fetched ({'; '.join(tried)}); install the Debian package {PACKAGE}, "
        f"or give a folder that holds {', '.join(FILES)} with --from"
    )


def from_debian(into: Path, *, given: Path | None, cache: Path) -> Path:
    return debian.unpacked([PACKAGE], given=given, cache=cache, into=into) / INSTALLED.relative_to("/")


def from_site(cache: Path) -> Path:
    """The four files in the cache. OSError: the site does not give one."""
    with kept(cache) as folder:
        place = folder / "fashion-mnist"
        place.mkdir(exist_ok=True)
        for name in FILES:
            if not (place / name).exists():
                download(f"{SITE}{name}", place / name)
        return place

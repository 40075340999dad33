"""The code of a run, copied into its folder when it is submitted: what is edited later does not change it."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("trainer", "launch", "tools")  # as pyproject.toml has them


@dataclass(frozen=True)
class Snapshot:
    """What was copied, for job.json."""

    commit: str | None
    """Git's commit; None where the code is no checkout."""
    changed: tuple[str, ...] = ()
    """Files that differ from that commit, as they were copied; new ones too."""


def take(folder: Path, *, root: Path = ROOT) -> Snapshot:
    """Copies the code in `root` into the new folder `folder`.

    Of a checkout: every file that git tracks, as it lies in the working tree, and what is new in the packages and not
    ignored. Otherwise the packages. Contents are copied, so a link does not lead back to what is edited."""
    if not (root / ".git").exists():
        for package in PACKAGES:
            if (root / package).is_dir():
                shutil.copytree(root / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
        return Snapshot(commit=None)
    tracked = _git(root, "ls-files", "-z")
    new = _git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", *PACKAGES)
    for name in dict.fromkeys([*tracked, *new]):
        source, copy = root / name, folder / name
        if source.is_file():  # not one that was deleted, nor a submodule
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)
    changed = _git(root, "diff", "-z", "--name-only", "--no-ext-diff", "HEAD")
    commit = "".join(_git(root, "rev-parse", "HEAD")).strip()
    return Snapshot(commit=commit, changed=tuple(sorted({*changed, *new})))


def _git(root: Path, *words: str) -> list[str]:
    """Git's answer, cut at zero bytes. ValueError where it fails."""
    command = ["git", "-C", str(root), *words]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ValueError(f"git: not found, but {root} is a checkout, whose files it must list") from error
    if ran.returncode:
        raise ValueError(f"git {words[0]} in {root}: {' '.join(ran.stderr.split())}")
    return [part for part in ran.stdout.split("\0") if part]

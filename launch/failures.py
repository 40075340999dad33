"""How the ranks of a local run tell the launcher why they failed, so that the user reads the first failure only."""

import json
from pathlib import Path
from typing import NamedTuple


class Failure(NamedTuple):
    rank: int
    code: int  # the exit code
    text: str  # one line, or a traceback
    time: float  # seconds of the machine's monotonic clock, which all its processes share


def failure_file(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.json"


def write_failure(folder: Path, failure: Failure) -> None:
    file = failure_file(folder, failure.rank)
    aside = file.with_suffix(".part")
    aside.write_text(json.dumps(failure._asdict()))
    aside.replace(file)


def first_failure(folder: Path) -> Failure | None:
    """The earliest one; others are mostly its consequence: a peer that closed the connection."""
    failures = [Failure(**json.loads(file.read_text())) for file in folder.glob("*.json")]
    return min(failures, key=lambda failure: (failure.time, failure.rank), default=None)

"""How benchmarks compare: variants take short turns, forth and back, and a ratio compares within its round. So whoever
else uses the machine slows all of them alike."""

import argparse
import datetime
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

TURN = 0.1
"""CPU-seconds that a turn takes at least, so that caches are warm for most of it."""
Turn = Callable[[int], float]
"""Takes so many steps and returns the CPU-seconds that they took."""


def in_process(steps: Callable[[int], object]) -> Turn:
    """CPU-seconds of this process, all threads."""

    def turn(count: int) -> float:
        since = time.process_time()
        steps(count)
        return time.process_time() - since

    return turn


def measure(found: Mapping[str, Turn], *, unit: int, seconds: float, rounds: int) -> dict[str, list[float]]:
    """CPU-seconds a step of each variant, one figure a round. The first variant sets the length of a turn, in which all
    take as many steps, a multiple of `unit`; its own turns take about `seconds` a round."""
    for turn in found.values():
        turn(unit)  # first calls choose algorithms and allocate
    period = next(iter(found.values()))(unit)
    count = unit * max(1, round(TURN / period))
    turns = max(1, round(seconds / (2 * period * count / unit)))
    costs: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(rounds):
        spent = dict.fromkeys(found, 0.0)
        for _ in range(turns):
            for name in (*found, *reversed(found)):
                spent[name] += found[name](count)
        for name, cost in spent.items():
            costs[name].append(cost / (2 * turns * count))
    return costs


def ratios(base: Sequence[float], own: Sequence[float]) -> dict[str, float]:
    """How many times as fast as `base`: median and extremes over rounds."""
    return spread([b / o for b, o in zip(base, own, strict=True)])


def spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 4),
        "least": round(min(values), 4),
        "most": round(max(values), 4),
    }


def where(command: Sequence[str], versions: Sequence[str]) -> dict[str, Any]:
    """What a file of figures says of itself: the command, when, on which machine, with which versions of what is
    installed of `versions`."""
    cpu = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
    installed = {found.metadata["Name"].lower() for found in importlib.metadata.distributions()}
    return {
        "command": " ".join(command),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "cpu": names[0] if names else platform.processor(),
            "cores": os.cpu_count(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "load": [round(value, 2) for value in os.getloadavg()],
            "system": platform.platform(),
        },
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in versions if name in installed},
    }


def names(known: Sequence[str]) -> Callable[[str], list[str]]:
    """For argparse: A,B,C, each of `known`."""

    def parse(text: str) -> list[str]:
        wrong = [name for name in text.split(",") if name not in known]
        if wrong:
            raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of {', '.join(known)}")
        return text.split(",")

    return parse


def count(text: str) -> int:
    """For argparse: a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def positive(text: str) -> float:
    """For argparse: a number above 0."""
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return found


def new_file(text: str) -> Path:
    """For argparse: a file whose folder is there, before anything is measured."""
    if not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"{Path(text).parent} is no folder")
    return Path(text)


def device_of(asked: str | None) -> str:
    """cpu or cuda; ValueError for a GPU that is not there."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: torch sees no GPU here; take cpu")
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")

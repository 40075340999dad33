"""What the heartbeats of a run's ranks say to a person. Standard library only."""

import time
from collections.abc import Mapping
from typing import Any

QUIET = 60.0  # seconds without a sign of life after which a rank counts as stuck; it writes one every few seconds
RANKS_A_SECOND = 50.0  # as trainer/heartbeat.py: a large world writes less often
DOING = {
    "meet": "building and restoring",
    "data": "waiting for data",
    "step": "in an update",
    "evaluate": "in an evaluation",
    "pictures": "drawing pictures",
    "save": "saving",
    "end": "ending",
}


def slowest(told: list[dict[str, Any]]) -> str:
    """The rank that is behind, or silent."""
    if len(told) < 2:
        return ""
    silent = [one for one in told if age(one) > quiet(told)]
    if silent:
        one = max(silent, key=age)
        return f"rank {one['rank']} on {one.get('host')}: no sign of life for {duration(age(one))}"
    passed = [list(one.get("passed", [0, 0])) for one in told]
    least = min(passed)
    at = [one for one, count in zip(told, passed, strict=True) if count[0] == least[0]]
    if max(count[0] for count in passed) - least[0] < 2 or len(at) == len(told):
        return ""  # files of one moment may be an update apart
    one = max(at, key=lambda one: float(one["time"]) - float(one["since"]))
    seconds = time.time() - float(one["since"])
    return f"rank {one['rank']} on {one.get('host')}: {DOING.get(one['at'], one['at'])} for {duration(seconds)}"


def age(one: Mapping[str, Any]) -> float:
    return max(0.0, time.time() - float(one["time"]))


def quiet(told: list[dict[str, Any]]) -> float:
    """Seconds without a sign of life that are too many in a world of this size."""
    return QUIET + 3 * len(told) / RANKS_A_SECOND


def duration(seconds: float) -> str:
    """`40 s`, `3 min`, `2 h 5 min`, `3 d 4 h`: two places, for people."""
    whole = round(seconds)
    for unit, size, lower, below in (("d", 86_400, "h", 3_600), ("h", 3_600, "min", 60)):
        if whole >= size:
            rest = whole % size // below
            return f"{whole // size} {unit}" + (f" {rest} {lower}" if rest else "")
    return f"{whole // 60} min" if whole >= 120 else f"{whole} s"

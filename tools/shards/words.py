"""Counts in words, the same wherever a verb tells of a set."""

from collections.abc import Sequence
from typing import TextIO

from trainer.errors import shown


def say(line: str, *, to: TextIO | None = None) -> int:
    """A line on stdout, or `to`: the only way of a verb to the terminal, because names of files and classes may hold
    anything. Gives the exit code of a verb that has done its work."""
    print(shown(line), file=to)
    return 0


def counted(number: int, noun: str, plural: str = "") -> str:
    """counted(1, "shard"): 1 shard; counted(2_000, "class", "classes"): 2,000 classes."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def percent(share: float) -> str:
    """With a tenth; a share that is not 0 is not told as 0."""
    return "<0.1%" if 0 < share < 0.0005 else f"{share:.1%}"


def smallest_to_largest(sizes: Sequence[int]) -> str:
    """Of classes, by their samples."""
    low, high = min(sizes), max(sizes)
    if low == high:
        return f"{counted(low, 'sample')} each"
    return f"the smallest has {counted(low, 'sample')}, the largest {high:,}"

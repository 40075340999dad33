"""Counts in words, the same wherever a verb tells of a set."""


def counted(number: int, noun: str, plural: str = "") -> str:
    """counted(1, "shard"): 1 shard; counted(2_000, "class", "classes"): 2,000 classes."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"

"""What all ranks must have in common: code, packages and config at the start, the bits of the weights on the way."""

import functools
import hashlib
import importlib.metadata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.parallel.engine import Engine

if TYPE_CHECKING:
    from trainer.parallel.ranks import Ranks

PACKAGES = ("torch", "accelerate", "deepspeed")
SHOWN = 3  # keys of a config that are named before "and N more"


@functools.cache
def sources() -> str:
    """A digest of every source file of the package that runs."""
    root = Path(__file__).resolve().parents[1]
    found = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        found.update(f"{path.relative_to(root)}\0".encode())
        found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:12]


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def mine(config: Mapping[str, Any], *, device: str) -> dict[str, Any]:
    """What this rank runs. config: its flat keys, of which all must agree; device: cpu or cuda."""
    return {
        "code": f"{version('tandem')}, sources {sources()}",
        "device": device,
        **{package: version(package) for package in PACKAGES},
        "config": {key: str(value) for key, value in config.items()},
    }


def odd_ones(values: Sequence[Any]) -> tuple[int, list[int]]:
    """(the first rank of the majority, the ranks that have another value); where it is even, rank 0 is right."""
    texts = [repr(value) for value in values]
    counts = Counter(texts)
    most = max(counts, key=lambda text: (counts[text], text == texts[0]))
    return texts.index(most), [rank for rank, text in enumerate(texts) if text != most]


def disagreement(told: Sequence[Mapping[str, Any]]) -> str | None:
    """What the first rank that differs from the others differs in; told: what each rank said by `mine`."""
    for key in told[0]:
        right, odd = odd_ones([one[key] for one in told])
        if odd:
            who = _names(odd, total=len(told))
            if key == "config":
                return f"{who} has another config than rank {right}: {_keys(told[odd[0]][key], told[right][key])}"
            return (
                f"{who} differs from rank {right} in {key}: {told[odd[0]][key]} instead of {told[right][key]}; "
                "start the same on every machine"
            )
    return None


def same_weights(engines: Mapping[str, Engine], ranks: "Ranks", *, images: int) -> None:
    """A collective. ValueError on all ranks, naming the one whose weights are not the others' bit for bit."""
    if ranks.world == 1:
        return
    everyones = ranks.gather({name: engine.checksum() for name, engine in engines.items()})
    for name in engines:
        right, odd = odd_ones([sums[name] for sums in everyones])
        if odd:
            raise ValueError(
                f"at {images:,} images {_names(odd, total=ranks.world)} no longer holds the weights of {name} that "
                f"rank {right} holds; nothing is saved of them: go on from the last checkpoint, and without that "
                "machine if it happens again"
            )


def _names(odd: Sequence[int], *, total: int) -> str:
    return f"rank {odd[0]}" + (f" (and {len(odd) - 1} more of {total})" if len(odd) > 1 else "")


def _keys(found: Mapping[str, str], right: Mapping[str, str]) -> str:
    keys = [key for key in {**right, **found} if found.get(key) != right.get(key)]
    texts = [f"{key} {found.get(key, 'absent')} instead of {right.get(key, 'absent')}" for key in keys[:SHOWN]]
    return ", ".join(texts) + (f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else "")

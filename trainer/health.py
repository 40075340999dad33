"""Watches over a run's numbers: updates that were skipped for a gradient that is not finite, collapse, bad samples."""

import itertools
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from trainer.data import Stream
from trainer.data.quarantine import Bad
from trainer.parallel.ranks import Ranks


class NonFinite:
    """Counts skipped updates a network; the count is the same on all ranks, since the gradient was.

    fp16 looks for its loss scale by skipping: above the scale's floor a skip counts, but wears out no patience. The
    floor is 16 halvings down, so what is wrong with the run itself still ends it."""

    PREFIX = "skipped/"
    SCALE = "loss_scale/"

    def __init__(self, *, patience: int) -> None:
        self.patience = patience
        self.total: dict[str, int] = {}
        self._row: dict[str, int] = {}

    def look(self, kept: Mapping[str, list[Tensor]], *, images: int) -> None:
        """Takes the notes since the last look. ValueError after `patience` skipped updates of a network in a row."""
        for name, notes in kept.items():
            if not name.startswith(self.PREFIX):
                continue
            phase = name.removeprefix(self.PREFIX)
            values = _values(notes)
            scales = _values(kept[self.SCALE + phase]) if self.SCALE + phase in kept else [1.0] * len(values)
            for skipped, scale in zip(values, scales, strict=True):
                worn = 1 if scale <= 1.0 else 0
                self._row[phase] = self._row.get(phase, 0) + worn if skipped else 0
                self.total[phase] = self.total.get(phase, 0) + int(skipped)
                if self._row[phase] >= self.patience:
                    raise ValueError(
                        f"{phase}: the gradients of {self.patience} updates in a row were not finite, at {images} "
                        "images; lower optim.lr, set optim.clip or look at the data; the command then goes on from "
                        "the last checkpoint"
                    )

    def export(self) -> dict[str, int]:
        return dict(self.total)

    def load(self, total: Mapping[str, int]) -> None:
        self.total = dict(total)


def _values(notes: list[Tensor]) -> list[float]:
    found: list[float] = torch.cat([note.flatten() for note in notes]).tolist()
    return found


class Collapse:
    """Says once when the posterior has collapsed to the prior while the KL has its full weight (Bowman et al. 2016).

    During a warm-up the KL may be anything, and an untrained encoder is near the prior, so it takes `ROW` reports in a
    row (`log.every` images each) under the limit, at full weight, after the first `UPDATES` updates."""

    LIMIT = 0.5
    """Nats an image: a code that tells so little about its image cannot be told from noise by the decoder."""
    ROW = 3
    UPDATES = 100

    def __init__(self) -> None:
        self.said = False
        self._row = 0

    def look(self, scalars: Mapping[str, float], *, full_weight: bool, images: int, batch: int) -> str | None:
        """One line, or None."""
        nats = scalars.get("latent/kl", math.inf)
        under = full_weight and images >= self.UPDATES * batch and nats < self.LIMIT  # nan is another trouble
        self._row = self._row + 1 if under else 0
        if self._row < self.ROW or self.said:
            return None
        self.said = True
        return (
            f"posterior collapse at {images:,} images: the KL is {nats:.3g} nats an image, so the decoder ignores the "
            "latent; lower method.kl.weight, warm it up (method.kl.warmup) or grant method.kl.free_bits"
        )


def check_finite(metrics: Mapping[str, float], *, images: int) -> None:
    """ValueError naming the figures of an evaluation that are not finite: nothing that follows would mean anything."""
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        raise ValueError(
            f"the evaluation at {images} images is not finite ({', '.join(bad)}): the weights are beyond use; lower "
            "optim.lr or set optim.clip, then go on from the last checkpoint"
        )


class BadSamples:
    """Samples that could not be decoded, of all ranks: kept in RUN/quarantine/SPLIT.jsonl, and too many end the run.

    Each rank meets its own; what is known is exchanged when `look` is called, so that the limit holds for all of them
    together. A resumed run meets some again and writes them once."""

    NAMED = 20
    """Lines of one look."""

    def __init__(self, stream: Stream, *, folder: Path, ranks: Ranks) -> None:
        self.fault: str | None = None
        """Why the run must end: more are bad than data.max_bad_fraction allows. The same on all ranks."""
        self._stream, self._ranks = stream, ranks
        self._path = folder / f"{stream.split}.jsonl"
        self._known: set[int] = set()
        self._written: set[tuple[str, str]] = set()
        if ranks.rank == 0 and self._path.exists():
            whole, _, torn = self._path.read_text(encoding="utf-8").rpartition("\n")
            self._written = {(row["shard"], row["key"]) for row in map(json.loads, whole.splitlines())}
            if torn:  # the run was killed while it wrote
                os.truncate(self._path, len(f"{whole}\n".encode()) if whole else 0)

    def look(self) -> list[str]:
        """A collective. A line for each sample that is new to all ranks, NAMED at most."""
        met = [list(bad) for bad in self._stream.news()]
        if not self._ranks.largest(len(met)):
            return []
        new = {}
        for bad in itertools.starmap(Bad, itertools.chain.from_iterable(self._ranks.gather(met))):
            if bad.sample not in self._known:
                new[bad.sample] = bad
        self._known |= set(new)
        if self._ranks.rank == 0:
            self._write([bad for bad in new.values() if (bad.shard, bad.key) not in self._written])
        if len(self._known) > self._stream.allowed:
            last = list(new.values())[-1]
            many = self._stream.too_many(len(self._known))
            self.fault = f"{last.shard}: {last.key}: {last.reason}; {many}; all of them: {self._path}"
        lines = [str(bad) for bad in new.values()]
        more = len(lines) - self.NAMED
        return lines[: self.NAMED] + ([f"and {more:,} more bad samples: {self._path}"] if more > 0 else [])

    def _write(self, new: list[Bad]) -> None:
        if not new:
            return
        self._path.parent.mkdir(exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(bad._asdict()) + "\n" for bad in new)
        self._written |= {(bad.shard, bad.key) for bad in new}

"""Runs in bf16 and fp16, and how two of them are compared: for precision.py and scaling.py."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.parallel.cases import SIZE, Small, global_batch, make_config, small
from tests.parallel.zero import exported
from trainer.data import Batch
from trainer.losses.balance import Term
from trainer.parallel.ranks import Ranks
from trainer.phase import Run
from trainer.step import means

STAGES = (1, 2, 3)
FEW = 4  # updates
ADAM = "adam"
FP16 = "fp16"
Tensors = Mapping[str, Mapping[str, Tensor]]


def batch_of(update: int) -> Batch:
    """In memory as trainer/data has it: channels_last, by strides alone where there is one channel."""
    batch = global_batch(update)
    return dataclasses.replace(batch, image=batch.image.as_strided(batch.image.shape, (SIZE * SIZE, 1, SIZE, 1)))


def make(ranks: Ranks, method: str, algorithm: str, backend: str, *, accumulate: int = 1, **changes: Any) -> Small:
    """backend: ddp, or a stage with what weights are held in: 1/fp32. changes: file is parallel's, others top level."""
    parallel: dict[str, Any] = {"kind": "ddp"}
    if backend != "ddp":
        stage, weights = backend.split("/")
        parallel = {"kind": "deepspeed", "stage": int(stage), "weights": weights}
        parallel |= {"file": str(changes.pop("file"))} if "file" in changes else {}
        if weights != "fp32":
            changes["precision"] = weights
    return small(make_config(method, algorithm, accumulate, ranks.world, parallel=parallel, **changes), ranks)


def train(made: Small, count: int, first: int = 0) -> list[dict[str, float]]:
    losses = []
    for number in range(first, first + count):
        made.update(number, batch_of(number))
        losses.append(means(made.run.kept, made.ranks))
        made.run.kept.clear()
    return losses


@contextmanager
def changed(made: Small, phase: str, change: Callable[[Term, int], Term]) -> Iterator[None]:
    """Every term of a phase as `change(term, number of the term)` gives it."""
    own = getattr(made.method, phase)

    def other(batch: Batch, run: Run) -> dict[str, Term]:
        return {name: change(term, at) for at, (name, term) in enumerate(own(batch, run).items())}

    setattr(made.method, phase, other)
    yield
    delattr(made.method, phase)


def difference(one: Tensors, two: Tensors) -> dict[str, float]:
    """Of every tensor that differs, by how much of its largest value; on rank 0, which has them all."""
    if one.keys() != two.keys():
        return {"names": math.inf}
    pairs = [(f"{part}/{name}", tensor, two[part][name]) for part in one for name, tensor in one[part].items()]
    return {
        key: float((a - b).abs().max() / a.abs().max().clamp(min=1e-2)) for key, a, b in pairs if not torch.equal(a, b)
    }


def moved(made: Small, before: Tensors) -> dict[str, Tensor]:
    """How far each network's weights are from `before`, as one vector; on rank 0."""
    now = exported(made)
    return {
        name: torch.cat([(now[name][key] - tensor).flatten() for key, tensor in before[name].items()])
        for name in (made.engines if made.ranks.rank == 0 else ())
    }


def apart(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> dict[str, float]:
    """Of each network, |one - two| / |two|."""
    return {name: float((one[name] - vector).norm() / vector.norm()) for name, vector in two.items()}


def settings(out: Path, ranks: Ranks, **fp16: float) -> Path:
    """DeepSpeed's own JSON, one a rank."""
    path = out / f"fp16-{ranks.rank}-{'-'.join(f'{key}-{value}' for key, value in fp16.items())}.json"
    path.write_text(json.dumps({"fp16": fp16}))
    return path

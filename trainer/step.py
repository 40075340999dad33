"""The inner step: every phase of a method, over micro-batches, on any backend. No method's name in it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trainer.data import Batch
from trainer.methods import Method
from trainer.parallel.engine import Engine
from trainer.parallel.ranks import Ranks
from trainer.phase import Run


def train_step(
    method: Method,
    engines: Mapping[str, Engine],
    batches: Sequence[Batch],
    run: Run,
    *,
    images: int,
    batch: int,
    ranks: Ranks,
) -> None:
    """One update of each network whose phase is active at `images` images seen, from this rank's micro-batches.

    batch: the global batch. What happened is in `run.kept`: means are taken when somebody asks for them.
    """
    count = sum(len(micro.image) for micro in batches)
    for phase in method.phases(images):
        for index, micro in enumerate(batches):
            last = index + 1 == len(batches)
            run.begin(phase, micro, images=images, last=last, share=len(batches) == 1, count=count)
            with run.autocast():
                terms = getattr(method, phase)(micro, run)
            for name, term in terms.items():
                run.note(f"loss/{phase}/{name}", term.value)
            engines[phase].backward(*run.gradients(terms), last=last)
        run.balance.update(ranks.sum, world=ranks.world)
        engine = engines[phase]
        if engine.floor is not None:  # as a multiple of the least it may fall to, for health.NonFinite
            run.note(f"loss_scale/{phase}", torch.tensor(engine.scale / engine.floor, device=ranks.device))
        result = engine.step(images, batch=batch)
        run.note(f"gradient_norm/{phase}", result.norm)
        run.note(f"skipped/{phase}", 1.0 - result.applied)
    run.end()


def means(kept: Mapping[str, list[Tensor]], ranks: Ranks) -> dict[str, float]:
    """Mean of each note over its samples and over ranks, and forgets nothing: the caller clears. A collective."""
    names = sorted(kept)
    if not names:
        return {}
    local = torch.stack([torch.cat([values.float().flatten() for values in kept[name]]).mean() for name in names])
    return dict(zip(names, (ranks.sum(local) / ranks.world).tolist(), strict=True))

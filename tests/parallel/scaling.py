"""What fp16's loss scale does in updates of every network; a part of precision.py's start."""

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.parallel.cases import BATCH
from tests.parallel.halves import (
    ADAM,
    FEW,
    FP16,
    STAGES,
    Tensors,
    apart,
    batch_of,
    changed,
    difference,
    make,
    moved,
    settings,
    train,
)
from tests.parallel.probes import digest
from tests.parallel.zero import exported, take
from trainer import checkpoint
from trainer.health import NonFinite
from trainer.losses.balance import Term
from trainer.parallel import deepspeed
from trainer.parallel.ranks import Ranks

OVERFLOWS = (("gan", 1), ("gan", 2), ("gan", 3), ("vaegan_output", 1), ("vaegan_larsen", 2))
TINY = 1e-7  # of a loss: its gradient at an output, TINY over 8 images, is none of float16's numbers


def poisoned(term: Term, at: int, *, rank: int) -> Term:
    """One sample of rank 1 has an infinite loss."""
    factor = torch.ones_like(term.value)
    factor[-1] = math.inf if rank == 1 and at == 0 else 1.0
    return term._replace(value=term.value * factor)


def overflow(ranks: Ranks, out: Path) -> dict[str, Any]:
    """One network's gradient overflows in updates 1 and 2: what each network did in each of 4 updates."""
    found: dict[str, Any] = {}
    for method, stage in OVERFLOWS:
        options = {"file": settings(out, ranks, initial_scale_power=8)}
        for victim in make(ranks, method, ADAM, f"{stage}/{FP16}", **options).engines:
            made = make(ranks, method, ADAM, f"{stage}/{FP16}", **options)
            watch, rows = NonFinite(patience=2), []
            for number in range(4):
                before = {name: digest(engine.masters) for name, engine in made.engines.items()}  # type: ignore[attr-defined]
                if number in (1, 2):
                    with changed(made, victim, functools.partial(poisoned, rank=ranks.rank)):
                        made.update(number)
                else:
                    made.update(number)
                watch.look(made.run.kept, images=BATCH)
                rows.append(
                    {
                        name: {
                            "skipped": [float(x) for x in made.run.kept.get(f"skipped/{name}", [])],
                            "norm": [float(x) for x in made.run.kept.get(f"gradient_norm/{name}", [])],
                            "scale": engine.scale,
                            "stood": before[name] == digest(engine.masters),  # type: ignore[attr-defined]
                        }
                        for name, engine in made.engines.items()
                    }
                )
                made.run.kept.clear()
            tensors = exported(made)
            path = ranks.together(functools.partial(_save, out / f"{method}-{stage}-{victim}", tensors))
            again = make(ranks, method, ADAM, f"{stage}/{FP16}", **options)
            take(again, checkpoint.load(Path(path)).tensors)
            scalers = [
                {
                    name: [getattr(e.zero.loss_scaler, key) for key in deepspeed.SCALER]
                    for name, e in one.engines.items()
                }  # type: ignore[attr-defined]
                for one in (made, again)
            ]
            with changed(made, victim, functools.partial(poisoned, rank=ranks.rank)):
                straight = train(made, 1, first=4)
            with changed(again, victim, functools.partial(poisoned, rank=ranks.rank)):
                resumed = train(again, 1, first=4)
            found[f"{method}-{stage}-{victim}"] = {
                "rows": rows,
                "total": watch.export(),
                "scalers": scalers,
                "next": [[engine.scale for engine in one.engines.values()] for one in (made, again)],
                "resumed": repr(straight) == repr(resumed) and not difference(exported(made), exported(again)),
            }
    return found


def _save(folder: Path, tensors: Tensors) -> str:
    return str(checkpoint.save(folder, images=4 * BATCH, tensors=tensors, state={}, config_text=""))


def search(ranks: Ranks, out: Path) -> dict[str, Any]:
    """A scale that is far too high at first, and a run that is beyond help, with little patience."""
    made = make(ranks, "vae", ADAM, f"2/{FP16}", file=settings(out, ranks, initial_scale_power=20))
    watch, scales = NonFinite(patience=1), []
    for number in range(16):
        made.update(number)
        watch.look(made.run.kept, images=BATCH)
        made.run.kept.clear()
        scales.append(made.engines["autoencoder"].scale)
    found: dict[str, Any] = {"scales": scales, "skipped": watch.export()["autoencoder"]}
    made = make(ranks, "vae", ADAM, f"2/{FP16}", file=settings(out, ranks, initial_scale_power=3))
    watch, found["ended"] = NonFinite(patience=4), None
    for number in range(12):
        with changed(made, "autoencoder", functools.partial(poisoned, rank=ranks.rank)):
            made.update(number)
        try:
            watch.look(made.run.kept, images=BATCH)
        except ValueError as error:
            found["ended"] = [number, str(error)]
            break
        made.run.kept.clear()
    return found


def growth(ranks: Ranks, out: Path) -> dict[str, float]:
    """How far weights end from those of a scale that stays, where it doubles every other update: in our order, and in
    DeepSpeed's own, which doubles it between the gradient and the division by it."""
    found = {}
    for stage in STAGES:
        still = make(ranks, "vae", "sgd", f"{stage}/{FP16}", file=settings(out, ranks, loss_scale=16))
        before = exported(still)
        train(still, FEW)
        far = moved(still, before)
        for order in ("ours", "its"):
            file = settings(out, ranks, initial_scale_power=4, loss_scale_window=2)
            made = make(ranks, "vae", "sgd", f"{stage}/{FP16}", file=file)
            engine: Any = made.engines["autoencoder"]
            if order == "its":
                engine.zero._update_scale, engine._rescale = engine._rescale, lambda overflow: None
            train(made, FEW)
            assert engine.scale > 16
            found[f"{stage}-{order}"] = apart(moved(made, before), far).get("autoencoder", 0.0)
    return found


def vanishing(ranks: Ranks, out: Path) -> dict[str, dict[str, float]]:
    """One update by gradients below what float16 holds: how far from the one of float32, of its length. Then with
    gradients cast before they are scaled, and with a critic that is passed unscaled."""
    found = {}
    options: dict[str, Any] = {"optim": {"clip": None, "lr": 1e4}}
    far: dict[str, Tensor] = {}
    for case in ("ddp", *(f"{stage}/{FP16}" for stage in STAGES), "cast first", "unscaled"):
        with broken(case):
            made = make(ranks, "gan", "sgd", case if "/" in case or case == "ddp" else f"2/{FP16}", **options)
            before = exported(made)
            tiny = lambda term, at: term._replace(weight=term.weight * TINY)  # noqa: E731
            with changed(made, "generator", tiny), changed(made, "discriminator", tiny):
                made.update(1, batch_of(1))  # without a penalty
            if case == "ddp":
                far = moved(made, before)
            else:
                found[case] = apart(moved(made, before), far)
    return found


@contextmanager
def broken(case: str) -> Iterator[None]:
    """What must not be so."""
    hand, scale = deepspeed._HandOver.backward, deepspeed.DeepSpeedEngine.scale

    def cast_first(ctx: Any, factor: Tensor) -> Any:
        handed = ctx.saved_tensors
        found = [(g.half() * factor.half()).to(kind) for g, kind in zip(handed, ctx.kinds, strict=True)]
        return (None, *found, *[None] * len(handed))

    if case == "cast first":
        deepspeed._HandOver.backward = staticmethod(cast_first)
    if case == "unscaled":
        deepspeed.DeepSpeedEngine.scale = property(lambda self: 1.0)  # type: ignore[assignment, method-assign]
    yield
    deepspeed._HandOver.backward = staticmethod(hand)
    deepspeed.DeepSpeedEngine.scale = scale  # type: ignore[method-assign]

"""Updates of every method under every stage of ZeRO, on two processes; test_zero.py compares them with one process.

    torchrun --nproc-per-node 2 -m tests.parallel.zero OUT

Rank 0 writes CASE.json and CASE.safetensors for each case, each rank zero-RANK.json with what it found on the way.
"""

import copy
import itertools
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.parallel.cases import METHODS, UPDATES, Small, make_config, small
from tests.parallel.probes import digest
from trainer import checkpoint
from trainer.errors import leave
from trainer.parallel.config import DeepSpeedConfig
from trainer.parallel.ranks import Ranks, start
from trainer.step import means

STAGES = (1, 2, 3)
MIXED = ((2, 0), (2, 3), (3, 1))  # stage of the generator and of its discriminator
CHAIN = ("zero3", "alone", "zero1", "ddp", "zero2", "zero3", "alone")  # alone: one process
LEG = 3  # updates of each


class Case(NamedTuple):
    method: str
    stage: int
    discriminator: int | None
    optim: str
    accumulate: int

    @property
    def name(self) -> str:
        stage = f"{self.stage}" if self.discriminator is None else f"{self.stage}.{self.discriminator}"
        return f"{self.method}-{self.optim}-{self.accumulate}-zero{stage}"


def cases() -> Iterator[Case]:
    for method, stage in itertools.product(METHODS, STAGES):
        for optim, accumulate in (("adam", 1), ("adam", 2), ("clipped", 2)):
            yield Case(method, stage, None, optim, accumulate)
    for stage, discriminator in MIXED:
        yield Case("gan", stage, discriminator, "adam", 2)


def parallel(backend: str, discriminator: int | None = None, *, offload: str = "none") -> dict[str, Any]:
    """zero3: DeepSpeed's stage 3, and so on."""
    if not backend.startswith("zero"):
        return {"kind": "ddp"}
    return {"kind": "deepspeed", "stage": int(backend[-1]), "discriminator": discriminator, "offload": offload}


def exported(made: Small) -> dict[str, dict[str, Tensor]]:
    """As a checkpoint names them; on rank 0."""
    found = {
        f"{name}.{part}" if part else name: tensors
        for name, engine in made.engines.items()
        for part, tensors in engine.export().items()
        if tensors
    }
    return found | {"balance": balance} if (balance := made.run.balance.export()) else found


def train(made: Small, first: int, count: int) -> list[dict[str, float]]:
    losses = []
    for number in range(first, first + count):
        made.update(number)
        losses.append(means(made.run.kept, made.ranks))
        made.run.kept.clear()
    return losses


def parity(ranks: Ranks, out: Path) -> dict[str, Any]:
    """What each rank holds of the average, and whether what is evaluated is what is saved."""
    found = {}
    for case in cases():
        config = make_config(
            case.method,
            case.optim,
            case.accumulate,
            ranks.world,
            parallel=parallel(f"zero{case.stage}", case.discriminator),
        )
        made = small(config, ranks)
        losses = train(made, 0, UPDATES)
        tensors = exported(made)
        evaluated = {name: dict(engine.evaluated().state_dict()) for name, engine in made.engines.items()}
        if ranks.rank == 0:
            (out / f"{case.name}.json").write_text(json.dumps({"world": ranks.world, "losses": losses}))
            save_file(
                {
                    f"{name}/{key}": tensor.contiguous()
                    for name, part in tensors.items()
                    for key, tensor in part.items()
                },
                out / f"{case.name}.safetensors",
            )
        found[case.name] = {
            "averages": {
                name: sum(flat.numel() for flat in engine.averages)  # type: ignore[attr-defined]
                for name, engine in made.engines.items()
                if engine.averaged and hasattr(engine, "averages")
            },
            "whole": {name: sum(t.numel() for t in state.values()) for name, state in evaluated.items()},
            "evaluated": {name: digest(state[key] for key in sorted(state)) for name, state in evaluated.items()},
            "saved": {
                name: digest(part[key] for key in sorted(part))
                for name in made.engines
                if (part := tensors.get(f"{name}.ema", tensors.get(name)))
            },
        }
    return found


def take(made: Small, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    for name, engine in made.engines.items():
        parts = {key.removeprefix(name).removeprefix("."): part for key, part in tensors.items()}
        engine.load({part: parts[part] for part in ("", "ema", "optimizer", "scaler") if part in parts})
    made.run.balance.load(tensors.get("balance", {}), made.ranks.device)


def chain(ranks: Ranks, out: Path) -> dict[str, Any]:
    """A run handed on by checkpoints through all backends and both world sizes, beside the same run on one process."""
    alone = copy.copy(ranks)
    alone.world, alone.rank = 1, 0
    found = {}
    for method, optim in itertools.product(("gan", "vaegan_last_layer"), ("sgd", "adam")):
        whole = small(make_config(method, optim, 1, 1), alone)
        expected = train(whole, 0, LEG * len(CHAIN))
        losses, path = [], None
        for leg, backend in enumerate(CHAIN):
            mine = alone if backend == "alone" else ranks
            accumulate = 1 + leg % 2
            made = small(make_config(method, optim, accumulate, mine.world, parallel=parallel(backend)), mine)
            if path is not None:
                take(made, checkpoint.load(Path(path)).tensors)
            losses += train(made, leg * LEG, LEG)
            folder, tensors = out / f"chain-{method}-{optim}", exported(made)
            path = ranks.together(lambda: str(_save(folder, (leg + 1) * LEG, tensors)))  # noqa: B023  called at once
        final, last = exported(whole), checkpoint.load(Path(path)).tensors
        found[f"{method}-{optim}"] = {
            "losses": losses,
            "expected": expected,
            "names": sorted(last) == sorted(final) and all(last[name].keys() == final[name].keys() for name in final),
            "weights": {
                f"{name}/{key}": [float((last[name][key] - tensor).abs().max()), float(tensor.abs().max())]
                for name, part in final.items()
                for key, tensor in part.items()
                if not name.endswith((".optimizer", "balance"))
            },
        }
    return found


def _save(folder: Path, images: int, tensors: Mapping[str, Mapping[str, Tensor]]) -> Path:
    return checkpoint.save(folder, images=images, tensors=tensors, state={}, config_text="")


def again(ranks: Ranks, out: Path) -> dict[str, bool]:
    """Whether a run that is resumed where its layout does not change has the same bits as one that was not."""
    found = {}
    for stage, optim, offload in itertools.product(STAGES, ("sgd", "adam"), ("none", "cpu")):
        place = parallel(f"zero{stage}", offload=offload)
        config = make_config("gan", optim, 2, ranks.world, parallel=place)
        straight = small(config, ranks)
        train(straight, 0, LEG)
        tensors = exported(straight)
        path = ranks.together(lambda: str(_save(out / f"again-{stage}-{optim}-{offload}", LEG, tensors)))  # noqa: B023
        resumed = small(config, ranks)
        take(resumed, checkpoint.load(Path(path)).tensors)
        same = train(straight, LEG, LEG) == train(resumed, LEG, LEG)
        one, two = exported(straight), exported(resumed)
        same = same and all(torch.equal(one[name][key], two[name][key]) for name in one for key in one[name])
        found[f"{stage}-{optim}-{offload}"] = same
    return found


def forgetful(ranks: Ranks, out: Path) -> list[dict[str, float]]:
    """The losses of stage 3 where DeepSpeed is not told that a new micro-batch begins."""
    made = small(make_config("gan", "sgd", 2, ranks.world, parallel=parallel("zero3")), ranks)
    for engine in made.engines.values():
        engine.zero.clear_backward_seen_flag = lambda: None  # type: ignore[attr-defined]
    return train(made, 0, LEG)


def main(argv: list[str]) -> int:
    out = Path(argv[0])
    torch.set_num_threads(1)
    ranks = start(DeepSpeedConfig())
    found: dict[str, Any] = {"world": ranks.world, "rank": ranks.rank}
    found |= {"parity": parity(ranks, out), "chain": chain(ranks, out), "again": again(ranks, out)}
    found["forgetful"] = forgetful(ranks, out)
    (out / f"zero-{ranks.rank}.json").write_text(json.dumps(found))
    ranks.close()
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))

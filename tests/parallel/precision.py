"""Updates in bf16 and fp16 under every backend, on two processes; test_precision.py looks at what they wrote.

    torchrun --nproc-per-node 2 -m tests.parallel.precision OUT

Each rank writes precision-RANK.json.
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch

from tests.parallel.cases import METHODS
from tests.parallel.halves import ADAM, FEW, FP16, STAGES, apart, difference, make, moved, settings, train
from tests.parallel.scaling import growth, overflow, search, vanishing
from tests.parallel.zero import exported
from trainer.errors import leave
from trainer.parallel.config import DeepSpeedConfig
from trainer.parallel.ranks import Ranks, start

TWO = ("gan_r1", "vaegan_last_layer")
COVERED = {1: (("bf16", 1), (FP16, 2), (FP16, 3)), 2: ((FP16, 1), ("bf16", 2), ("bf16", 3))}
"""Of every accumulation: each method meets each stage in either precision."""


# ---------------------------------------------------------------- fp32 engine, bf16 autocast
def autocast(ranks: Ranks, out: Path) -> dict[str, Any]:
    """Where ZeRO under bf16 autocast has other bits than DDP."""
    found = {}
    cases = [(method, "sgd", 1, FEW) for method in METHODS]
    cases += [(method, *rest) for method in TWO for rest in (("sgd", 2, 1), (ADAM, 1, 3))]
    for method, optim, accumulate, count in cases:
        options: dict[str, Any] = {"accumulate": accumulate, "precision": "bf16", "optim": {"clip": None}}
        runs = {}
        for backend in ("ddp", *(f"{stage}/fp32" for stage in STAGES)):
            made = make(ranks, method, optim, backend, **options)
            train(made, count)
            runs[backend] = exported(made)
        for stage in STAGES:
            found[f"{method}-{optim}-{accumulate}-{stage}"] = difference(runs["ddp"], runs[f"{stage}/fp32"])
        if (optim, accumulate) == ("sgd", 1):
            made = make(ranks, method, optim, "ddp", optim={"clip": None})
            train(made, count)
            found[f"{method}-fp32"] = difference(runs["ddp"], exported(made))
    return found


# ---------------------------------------------------------------- bf16 and fp16 engines
def half(ranks: Ranks, out: Path) -> dict[str, Any]:
    """Every method, its losses beside those of float32, and what its tensors are held in."""
    found: dict[str, Any] = {}
    for method, accumulate in itertools.product(METHODS, COVERED):
        plain = make(ranks, method, ADAM, "ddp", accumulate=accumulate)
        before = exported(plain)
        expected, far = train(plain, FEW), moved(plain, before)
        for weights, stage in COVERED[accumulate]:
            options = {"file": settings(out, ranks, initial_scale_power=8)} if weights == FP16 else {}
            made = make(ranks, method, ADAM, f"{stage}/{weights}", accumulate=accumulate, **options)
            losses, tensors = train(made, FEW), exported(made)
            kept = {name: dict(engine.evaluated().state_dict()) for name, engine in made.engines.items()}
            saved = {name: tensors.get(f"{name}.ema", tensors.get(name, {})) for name in made.engines}
            found[f"{method}-{accumulate}-{weights}-{stage}"] = {
                "losses": losses,
                "expected": expected,
                "apart": apart(moved(made, before), far),
                "held": sorted({str(p.dtype) for e in made.engines.values() for p in e.network.parameters()}),
                "saved": sorted(
                    {str(t.dtype) for name, part in tensors.items() if "scaler" not in name for t in part.values()}
                ),
                "evaluated": sorted({str(t.dtype) for state in kept.values() for t in state.values()}),
                "same": all(torch.equal(kept[name][key], t) for name in saved for key, t in saved[name].items()),
                "finer": [
                    bool((t.to(getattr(torch, {"bf16": "bfloat16"}.get(weights, "float16"))).float() != t).any())
                    for part in saved.values()
                    for t in part.values()
                    if t.numel() > 100
                ],
            }
    return found


PROBES = (autocast, half, overflow, search, growth, vanishing)


def main(argv: list[str]) -> int:
    out, wanted = Path(argv[0]), argv[1:]
    torch.set_num_threads(1)
    ranks = start(DeepSpeedConfig())
    from deepspeed.accelerator import get_accelerator

    # asked of the CPU's vector units; torch computes in float16 without them, slowly
    get_accelerator().is_fp16_supported = lambda: True
    found = {probe.__name__: probe(ranks, out) for probe in PROBES if not wanted or probe.__name__ in wanted}
    (out / f"precision-{ranks.rank}.json").write_text(json.dumps({"world": ranks.world, **found}))
    ranks.close()
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))

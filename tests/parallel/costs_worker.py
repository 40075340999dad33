"""What two ranks exchange under each backend, beside what is predicted; and whether recomputed networks train alike.

torchrun --nproc-per-node 2 -m tests.parallel.costs_worker OUT      writes OUT/RANK.json
"""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch

from tests.parallel.cases import METHODS, Small, make_config, small
from tools.bench.memory_rank import Sent
from trainer.check_watch import WatchedRun
from trainer.errors import leave
from trainer.parallel import costs
from trainer.parallel.config import DeepSpeedConfig
from trainer.parallel.ranks import Ranks, start

BACKENDS: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    **{f"zero{stage}": {"kind": "deepspeed", "stage": stage} for stage in (1, 2, 3)},
}
SENT = (("vae", 2), ("gan", 1), ("vaegan_output", 2))
RECOMPUTED = ("gan", "gan_wasserstein", "vaegan_output", "vaegan_last_layer")
UPDATES = 4


def tree(method: str, *, recompute: bool) -> dict[str, Any]:
    """With blocks, in every network."""
    found = copy.deepcopy(METHODS[method])
    for name in ("autoencoder", "generator", "discriminator"):
        if name in found:
            found[name] = {**found[name], "recompute": recompute}
            if found[name]["kind"] != "patch":
                found[name]["blocks"] = 1
    return found


def exchanged(method: str, accumulate: int, parallel: dict[str, Any], ranks: Ranks) -> Any:
    """(predicted, counted) bytes of an update that comes late enough for every backend to know its way."""
    config = make_config(tree(method, recompute=False), "adam", accumulate, ranks.world, parallel=parallel)
    made = small(config, ranks)
    run = WatchedRun(made.engines, seed=0, balance=made.method.balance, precision="fp32")
    made.run = run
    first: dict[str, bool] = {}
    for number in range(UPDATES + 1):
        run.clear()
        with Sent() as counted:
            made.update(number)
        for name in made.engines:
            first.setdefault(name, run.passes(name, first=made.method.phases(0)).plain_first)
    whole = costs.summed({name: _whole(made, run, name, first[name], accumulate) for name in made.engines})
    found = {"reduced": 0, "gathered": 0}
    for name, size in counted.bytes.items():
        if "reduce" in name or "gather" in name:
            found["reduced" if "reduce" in name else "gathered"] += size
    return {"reduced": whole.all_reduce + whole.reduce_scatter, "gathered": whole.all_gather}, found


def _whole(made: Small, run: WatchedRun, name: str, plain_first: bool, accumulate: int) -> costs.Sent:
    engine, names = made.engines[name], {key for key, _ in made.engines[name].network.named_parameters()}
    passes = run.passes(name, first=())
    network = costs.Network(
        tuple(tensor.numel() for key, tensor in engine.state.items() if key in names),
        averaged=engine.averaged,
        moments=2,
        passes=costs.Passes(passes.graph, passes.plain, passes.exact, plain_first),
        micro_batches=accumulate,
    )
    return costs.whole(network, costs.backend(made.config.parallel, name, cpu=True))


def recomputed(method: str, parallel: dict[str, Any], ranks: Ranks) -> float:
    """Largest difference that recomputing makes in a loss or a weight."""
    taken = []
    for on in (False, True):
        made = small(make_config(tree(method, recompute=on), "sgd", 2, ranks.world, parallel=parallel), ranks)
        for number in range(UPDATES):
            made.update(number)
        weights = [t for engine in made.engines.values() for t in engine.export().get("", {}).values()]
        losses = [t for values in made.run.kept.values() for t in values]
        taken.append([*weights, *losses])
    return max(float((a.float() - b.float()).abs().max()) for a, b in zip(*taken, strict=True))


def main(argv: list[str]) -> int:
    torch.set_num_threads(1)
    ranks = start(DeepSpeedConfig())
    bare = Path(argv[0]) / f"zero-{ranks.rank}.json"
    bare.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    found: dict[str, Any] = {"world": ranks.world, "sent": {}, "recompute": {}}
    for backend, parallel in BACKENDS.items():
        whole = parallel | ({"file": str(bare)} if backend == "zero3" else {})
        for method, accumulate in SENT:
            found["sent"][f"{backend} {method} {accumulate}"] = exchanged(method, accumulate, whole, ranks)
        for method in RECOMPUTED:
            found["recompute"][f"{backend} {method}"] = recomputed(method, whole, ranks)
    (Path(argv[0]) / f"{ranks.rank}.json").write_text(json.dumps(found))
    ranks.close()
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))

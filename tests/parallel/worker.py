"""Updates of every method on whatever processes it was started on; the tests compare what different starts wrote.

    python -m tests.parallel.worker OUT      one process, or a rank of several (torchrun's environment variables)

Each rank writes METHOD-OPTIM-ACCUMULATION-WORLD-RANK.json and .safetensors, and probes-WORLD-RANK.json.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.parallel import probes
from tests.parallel.cases import METHODS, OPTIM, UPDATES, make_config, small
from trainer.config import Config
from trainer.errors import leave
from trainer.parallel.config import DDPConfig
from trainer.parallel.ranks import Ranks, start
from trainer.step import means


def updates(config: Config, ranks: Ranks) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """The losses of each update and every weight and average at the end."""
    made = small(config, ranks)
    losses = []
    for update in range(UPDATES):
        made.update(update)
        losses.append(means(made.run.kept, ranks))
        made.run.kept.clear()
    weights = {
        f"{name}/{part}/{key}": tensor
        for name, engine in made.engines.items()
        for part, tensors in engine.export().items()
        for key, tensor in tensors.items()
        if part != "optimizer"
    }
    return losses, weights


def main(argv: list[str]) -> int:
    out = Path(argv[0])
    torch.set_num_threads(1)
    ranks = start(DDPConfig())
    for method in METHODS:
        for optim in OPTIM:
            for accumulate in (1, 2):
                losses, weights = updates(make_config(method, optim, accumulate, ranks.world), ranks)
                stem = out / f"{method}-{optim}-{accumulate}-{ranks.world}-{ranks.rank}"
                stem.with_suffix(".json").write_text(json.dumps({"world": ranks.world, "losses": losses}))
                save_file(weights, stem.with_suffix(".safetensors"))
    found = {name: probe(ranks) for name, probe in probes.PROBES.items()}
    (out / f"probes-{ranks.world}-{ranks.rank}.json").write_text(json.dumps(found))
    ranks.close()
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))

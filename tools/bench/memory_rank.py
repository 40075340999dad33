"""One rank of the memory benchmark: takes updates of a pair of networks and writes down what it held and sent.

torchrun --nproc-per-node 2 -m tools.bench.memory_rank JOB.json OUT     writes OUT/RANK.json
"""

import gc
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from tools.bench.clock import allocated
from trainer import build
from trainer import config as configuration
from trainer.config import Config
from trainer.data import Batch
from trainer.errors import leave
from trainer.parallel.engine import Engine
from trainer.parallel.ranks import Ranks, start
from trainer.phase import Run
from trainer.step import train_step

WARM = 2
"""Updates before the one that is measured: moments, buckets and gathered weights are there from then on."""


WHOLE = {
    "allreduce_": 0,
    "allgather_": 0,
    "_allgather_base_": 0,
    "_reduce_scatter_base_": 1,
    "reduce_scatter_": 1,
    "broadcast_": 0,
    "reduce_": 0,
}
"""Collectives, and which argument holds what all ranks have together: the whole that is reduced, gathered or cut."""


class Sent(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the tensors given to each kind of collective, DistributedDataParallel's own too, which are C++."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func.name().split("::")
        name = name.partition(".")[0]
        if namespace == "c10d" and name in WHOLE:
            self.bytes[name] += _size(args[WHOLE[name]])
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def _size(given: Any) -> int:
    if isinstance(given, Tensor):
        return given.numel() * given.element_size()
    return sum(map(_size, given))


def live() -> int:
    """Bytes of the storages of all tensors that Python can see, each once."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if issubclass(type(found), Tensor) and found.device.type != "meta"]
    # gradients are attributes of C++: not among the objects
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def resident(key: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most since `forget`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def forget() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # see proc(5)


def batch_of(config: Config, device: torch.device, update: int, *, rank: int, world: int) -> Batch:
    """A rank's share of an update's noise."""
    share, size = config.share(world), build.image_shape(config)
    position = torch.arange(share) + update * config.batch + rank * share
    image = torch.rand(share, *size, generator=torch.Generator().manual_seed(update)) * 2 - 1
    columns = (image, torch.zeros_like(position), position, position, torch.ones(share))
    return Batch(*(column.to(device) for column in columns))


def measure(config: Config, ranks: Ranks) -> dict[str, Any]:
    """Figures of update WARM, which takes every phase and penalty."""
    before = resident("VmRSS")
    cpu = ranks.device.type == "cpu"
    # allocations are told from the start on: what was not seen to come is not seen to go
    with profile(activities=[ProfilerActivity.CPU], profile_memory=cpu) as found:
        method = build.build_method(config, device=ranks.device)
        engines = build.build_engines(config, method, build.build_networks(method, seed=config.seed), ranks)
        run = Run(engines, seed=config.seed, balance=method.balance, precision=config.precision)
        for update in range(WARM + 1):
            parts = build.split(
                batch_of(config, ranks.device, update, rank=ranks.rank, world=ranks.world),
                config.micro_batches(ranks.world),
            )
            sent = Sent()
            run.kept.clear()
            if update == WARM:
                forget()
                if not cpu:
                    torch.cuda.reset_peak_memory_stats()
            with record_function("measured" if update == WARM else "warm"), sent:
                images = update * config.batch
                train_step(method, engines, parts, run, images=images, batch=config.batch, ranks=ranks)
        figures: dict[str, Any] = {"resident": resident("VmRSS") - before, "resident_peak": resident("VmHWM") - before}
        with record_function("rest"):
            gc.collect()  # DeepSpeed's handles hold what they gathered in cycles
        figures["live"] = live()
    if cpu:
        figures |= allocated(found)
    else:
        figures |= {
            "allocated": torch.cuda.memory_allocated(),
            "allocated_peak": torch.cuda.max_memory_allocated(),
        }
    figures |= {"sent": dict(sent.bytes), "calls": dict(sent.calls)}
    figures["parameters"] = {name: _numel(engine) for name, engine in engines.items()}
    return figures


def _numel(engine: Engine) -> int:
    names = dict(engine.network.named_parameters())
    return sum(tensor.numel() for name, tensor in engine.state.items() if name in names)


def main(argv: list[str]) -> int:
    tree, out = json.loads(Path(argv[0]).read_text()), Path(argv[1])
    torch.set_num_threads(1)
    config = configuration.parse(tree, source=argv[0])
    ranks = start(config.parallel)
    figures = measure(config, ranks)
    (out / f"{ranks.rank}.json").write_text(json.dumps({"world": ranks.world, **figures}))
    ranks.close()
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))

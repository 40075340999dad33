"""Out of memory, said as such: on one line, where, and which keys to change, with the values that they have."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

from trainer.config import Config
from trainer.errors import OUT_OF_MEMORY, Ending
from trainer.parallel.config import DeepSpeedConfig
from trainer.parallel.ranks import Ranks

SAYS = (
    "out of memory",
    "not enough memory: you tried to allocate",
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""Of RuntimeErrors; torch's allocator of the CPU and CUDA's libraries have no class of their own."""
PLACE = re.compile(r"^\[enforce fail at [^]]*\] [^.]*\. ")  # in torch's source


def is_one(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in SAYS)


@contextlib.contextmanager
def explained(config: Config, ranks: Ranks, *, where: Callable[[], str]) -> Iterator[None]:
    """Within, an error of memory becomes an Ending. where: what the run is at."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_one(error):
            raise
        first = PLACE.sub("", (str(error).splitlines() or [""])[0]).removesuffix(".")
        what = "".join(f" ({first})" if first else "")
        rank = f" on rank {ranks.rank} of {ranks.world}" if ranks.world > 1 else ""
        text = f"out of memory {where()}{rank}{what}: {'; '.join(advice(config, ranks.world, cuda=_cuda(ranks)))}"
        raise Ending(text, OUT_OF_MEMORY) from error


def _cuda(ranks: Ranks) -> bool:
    return ranks.device.type == "cuda"


def advice(config: Config, world: int, *, cuda: bool) -> list[str]:
    """What to change, most effective for least harm first."""
    found = []
    share = config.batch // world
    size = config.micro_batch or share
    if size > 1:
        half = next(part for part in range(size // 2, 0, -1) if share % part == 0)
        today = "null, a rank's whole share of" if config.micro_batch is None else ""
        found.append(f"set micro_batch={half} (now {today} {size})".replace("  ", " "))
    off = [key for key, value in _recompute(config.method, "method") if not value]
    if off:
        found.append(f"{'=true '.join(off)}=true (now false)")
    if cuda and config.precision in ("fp32", "tf32"):
        found.append(f"precision=bf16 in a new run (now {config.precision})")
    parallel = config.parallel
    if world > 1 and not (isinstance(parallel, DeepSpeedConfig) and parallel.stage == 3):
        if isinstance(parallel, DeepSpeedConfig):
            found.append(f"parallel.stage={parallel.stage + 1} (now {parallel.stage})")
        else:
            found.append(f"parallel.kind=deepspeed parallel.stage=2 (now {parallel.kind})")
    if isinstance(parallel, DeepSpeedConfig) and parallel.offload == "none" and cuda:
        found.append("parallel.offload=cpu (now none)")
    if not cuda and config.data.cache_mb:
        found.append(f"data.cache_mb={config.data.cache_mb // 2} (now {config.data.cache_mb})")
    return found


def _recompute(part: Any, name: str) -> Iterator[tuple[str, bool]]:
    """(`method.autoencoder.recompute`, its value) of each network."""
    for field in dataclasses.fields(part):
        value, key = getattr(part, field.name), f"{name}.{field.name}"
        if field.name == "recompute":
            yield key, bool(value)
        elif dataclasses.is_dataclass(value):
            yield from _recompute(value, key)

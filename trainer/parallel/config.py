"""How ranks work together; a union by `kind`, one member a backend."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DDPConfig:
    """One process, or torch's DistributedDataParallel over as many as the launcher started."""

    kind: Literal["ddp"] = "ddp"
    processes: int | None = None
    """Processes that must come up, over all machines; null takes what the launcher asked for."""

    def __post_init__(self) -> None:
        if self.processes is not None and self.processes < 1:
            raise ValueError(f"processes: {self.processes} must be at least 1")


ParallelConfig = DDPConfig

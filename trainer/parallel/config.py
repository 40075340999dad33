"""How ranks work together; a union by `kind`, one member a backend."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from trainer import bounds

Stage = Literal[0, 1, 2, 3]


@dataclass(frozen=True)
class AutoConfig:
    """What the launcher asks for: DeepSpeed under `accelerate launch --use_deepspeed` or an accelerate config that
    names it (its stage, offload and file), else one process or DistributedDataParallel."""

    kind: Literal["auto"] = "auto"
    processes: int | None = None
    """Processes that must come up, over all machines; null takes what the launcher asked for."""
    timeout: float = 600.0
    """Seconds that a rank waits for the others at the start; then it says which did not come."""

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True)
class DDPConfig:
    """One process, or torch's DistributedDataParallel over as many as the launcher started."""

    kind: Literal["ddp"] = "ddp"
    processes: int | None = None
    """Processes that must come up, over all machines; null takes what the launcher asked for."""
    timeout: float = 600.0
    """Seconds that a rank waits for the others at the start; then it says which did not come."""

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True)
class DeepSpeedConfig:
    """ZeRO (Rajbhandari et al. 2020): ranks share out what DistributedDataParallel holds on each of them."""

    kind: Literal["deepspeed"] = "deepspeed"
    stage: Stage = 2
    """Shared out are: 1 the optimiser's state and the average, 2 gradients too, 3 weights too; 0 nothing, which is
    ddp and runs as that."""
    discriminator: Stage | None = None
    """Stage of the discriminator; null takes `stage`. One with penalties trains best below 3."""
    offload: Literal["none", "cpu"] = "none"
    """cpu: master weights, optimiser state and update lie on the CPU."""
    weights: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What weights and gradients are held and exchanged in; masters, moments and average stay float32. bf16 needs
    precision: bf16; fp16 brings a loss scale a network."""
    file: Path | None = None
    """DeepSpeed's own JSON, for what has no key here (bucket sizes, overlap); configs/deepspeed has one a stage."""
    processes: int | None = None
    """Processes that must come up, over all machines; null takes what the launcher asked for."""
    timeout: float = 600.0
    """Seconds that a rank waits for the others at the start; then it says which did not come."""

    def __post_init__(self) -> None:
        _check(self)
        for name, value, idle in (("weights", self.weights, "fp32"), ("offload", self.offload, "none")):
            if 0 in self.stages and value != idle:
                key = "stage" if self.stage == 0 else "discriminator"
                raise ValueError(f"{name}: {value} needs ZeRO for both networks; {key}: 0 is ddp, take 1, 2 or 3")

    @property
    def stages(self) -> set[int]:
        return {self.stage, self.stage_of("discriminator")}

    def stage_of(self, network: str) -> int:
        return self.discriminator if network == "discriminator" and self.discriminator is not None else self.stage


def _check(config: AutoConfig | DDPConfig | DeepSpeedConfig) -> None:
    if config.processes is not None and config.processes < 1:
        raise ValueError(f"processes: {config.processes} must be at least 1")
    bounds.above_zero(config, "timeout")
    bounds.at_most(86_400, config, "timeout")  # a day


ParallelConfig = Annotated[AutoConfig | DDPConfig | DeepSpeedConfig, Field(discriminator="kind")]

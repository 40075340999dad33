"""Which engine a network gets."""

from torch import nn

from trainer.optimizer import NetworkOptim
from trainer.parallel.config import DeepSpeedConfig, ParallelConfig
from trainer.parallel.ddp import DDPEngine
from trainer.parallel.engine import Engine
from trainer.parallel.ranks import Ranks


def engine(
    name: str,
    network: nn.Module,
    *,
    config: ParallelConfig,
    optim: NetworkOptim,
    ranks: Ranks,
    average: bool,
    compiled: bool,
) -> Engine:
    """The engine of one network."""
    if isinstance(config, DeepSpeedConfig) and config.stage_of(name) > 0:
        from trainer.parallel.deepspeed import DeepSpeedEngine  # here: its package is an extra

        return DeepSpeedEngine(
            name, network, config=config, optim=optim, ranks=ranks, average=average, compiled=compiled
        )
    return DDPEngine(network, optim=optim, ranks=ranks, average=average, compiled=compiled)

"""Engines: how a network's outputs' gradients become an update, on one process or many. See README.md.

The only importer of accelerate (and later deepspeed), and with launch/ the only reader of environment variables.
"""

from trainer.parallel.config import DDPConfig, ParallelConfig
from trainer.parallel.engine import Applied, Engine

__all__ = ["Applied", "DDPConfig", "Engine", "ParallelConfig"]

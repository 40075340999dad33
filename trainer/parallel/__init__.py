"""Engines: how a network's outputs' gradients become an update, on one process or many. See README.md.

The only importer of accelerate and deepspeed, and with launch/ the only reader of environment variables.
"""

from trainer.parallel.config import AutoConfig, DDPConfig, DeepSpeedConfig, ParallelConfig
from trainer.parallel.engine import Applied, Engine

__all__ = ["Applied", "AutoConfig", "DDPConfig", "DeepSpeedConfig", "Engine", "ParallelConfig"]

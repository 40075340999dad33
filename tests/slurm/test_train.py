"""The trainer itself as jobs of a real SLURM: the losses of one process, on two nodes and under DeepSpeed."""

import os
from pathlib import Path

import pytest

from launch.cli import main as tandem
from tests import starts
from tests.runs import losses
from tests.slurm.jobs import Submitted
from tools.slurm.cluster import Cluster

TINY = (*starts.SHORT, "images=256", "log.every=64", "checkpoint.every=0", "log.pictures_every=0")

"""What the fork server of `tests.starts` imports before it forks. Nothing here may start a thread or compute."""

import importlib
import os
from pathlib import Path

os.environ.update(
    dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
)  # numpy's BLAS starts its threads at import
HEAVY = (
    "torch._dynamo",  # torch and accelerate import these two late
    "torch.distributed.tensor",
    "tests.starts",
    "tools.draw",
    "tools.shards.make",
    "trainer.__main__",
    "trainer.check",
    "trainer.loop",
)
TASKS = Path("/proc/self/task")

for name in HEAVY:
    importlib.import_module(name)
# a thread would not come along into the forks
assert not TASKS.is_dir() or len(list(TASKS.iterdir())) == 1

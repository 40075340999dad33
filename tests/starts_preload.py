"""What the fork server of `tests.starts` imports before it forks. Nothing here may start a thread or compute."""

from pathlib import Path

import trainer.__main__
import trainer.check
import trainer.loop  # noqa: F401

TASKS = Path("/proc/self/task")
# a thread would not come along into the forks
assert not TASKS.is_dir() or len(list(TASKS.iterdir())) == 1

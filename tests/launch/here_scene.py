"""Stands in for `tandem train RUN/submit/config.yaml --processes N` in test_here.py.

RUN/scene: exit codes of the starts, one a line; "wait" saves and ends with 130 at Ctrl-C, "deaf" only at the second."""

import os
import signal
import sys
import time
from pathlib import Path

run = Path(sys.argv[2]).parent.parent
came: list[int] = []
signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
with (run / "starts").open("a") as file:
    file.write(f"{time.time()} {os.environ.get('CUDA_VISIBLE_DEVICES', '')} {os.environ.get('OMP_NUM_THREADS', '')}\n")
print("begins", flush=True)
scene = (run / "scene").read_text().split()
what = scene[min(len((run / "starts").read_text().splitlines()), len(scene)) - 1]
if what == "75":
    (run / "requeue").write_text("USR2 at 10 images\n")
if what in ("wait", "deaf"):
    while len(came) < (1 if what == "wait" else 2):
        time.sleep(0.02)
    (run / "checkpoints" / f"{10:012d}").mkdir(parents=True)
    sys.exit(130)
time.sleep(0.3)
if what == "9":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(what))

"""Stands in for the trainer where torch is not the point: counts, saves, and minds signals as the trainer does.

RUN/plan.json: {"images": budget, one each 50 ms, "rest": of later starts, "fail": {"rank", "after": images of a start,
"how": "kill" or an exit code}, "figures": of the last evaluation}."""

import json
import os
import signal
import sys
import time
from pathlib import Path

from trainer import signals
from trainer.errors import leave, to_stderr

VERSION = 1


def main(run: Path) -> int:
    plan = json.loads((run / "plan.json").read_text())
    rank, start = int(os.environ["SLURM_PROCID"]), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    saved = run / "checkpoints"
    saved.mkdir(exist_ok=True)
    images = max((int(path.name) for path in saved.iterdir()), default=0)
    print(f"stub {VERSION} begins at {images}", flush=True)
    if rank == 0:
        with (run / "attempts.jsonl").open("a") as file:
            file.write(json.dumps({"restart": start, "images": images, "pid": os.getpid()}) + "\n")
    fail, begin = plan.get("fail", {}), images
    budget = begin + plan["rest"] if start and "rest" in plan else plan["images"]
    with signals.taken() as asked:
        while images < budget:
            time.sleep(0.05)
            images += 1
            if (rank, images - begin) == (fail.get("rank"), fail.get("after")):
                if fail["how"] == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if fail["how"] == "72":
                    (run / "failed").write_text("3 starts in a row at 0 images\n")
                to_stderr("tandem: error: as planned")
                return int(fail["how"])
            if asked.request and rank == 0:
                (saved / f"{images:012d}").mkdir(exist_ok=True)
                if asked.request >= signals.AGAIN:
                    (run / "requeue").write_text(f"{signals.name(asked.request)} at {images} images\n")
            if asked.request:
                return signals.exit_code(asked.request)
    if rank == 0 and "figures" in plan:
        (run / "finished").write_text(json.dumps({"images": images, "figures": plan["figures"]}))
    return 0


if __name__ == "__main__":
    signals.install()
    leave(main(Path(sys.argv[1]).parent.parent))

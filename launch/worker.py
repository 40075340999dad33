"""What `launch.local` starts for each rank: `launch.worker MODULE [argument ...]` runs MODULE's main."""

import ctypes
import importlib
import os
import signal
import sys
import time
from pathlib import Path

from launch.failures import Failure, write_failure
from trainer import signals
from trainer.errors import TERMINATED, boundary, leave

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_launcher() -> None:
    """Asks Linux for a SIGTERM when the launcher is gone (kill -9), so that no rank stays behind and holds a GPU."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(os.environ["TANDEM_LAUNCHER"]):  # it was gone before we asked
        sys.exit(TERMINATED)


def serve_store() -> object:
    """On rank 0: the rendezvous, on the socket that the launcher has bound. It lives as long as the object."""
    if "TANDEM_STORE_FD" not in os.environ:
        return None
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in __all__

    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=int(os.environ["TANDEM_STORE_FD"]),
    )


def run(argv: list[str]) -> int:
    store = serve_store()
    module = importlib.import_module(argv[0])
    code = int(module.main(argv[1:]))
    del store
    return code


def main(argv: list[str]) -> int:
    signals.install()  # Ctrl-C ends the worker at once and without a word, until training takes it over
    die_with_launcher()
    said: list[str] = []
    code = boundary(run, argv, report=said.append)
    if said:
        failure = Failure(rank=int(os.environ["RANK"]), code=code, text="\n".join(said), time=time.monotonic())
        write_failure(Path(os.environ["TANDEM_FAILURES"]), failure)
    return code


if __name__ == "__main__":
    leave(main(sys.argv[1:]))  # nor does a process group that an exception left open wait for its peers for minutes

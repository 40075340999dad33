"""Stands in for the trainer in test_local.py: `main([name, argument ...])` plays one scene on each rank."""

import os
import signal
import time
from pathlib import Path


def group():
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    one = torch.ones(1)
    dist.all_reduce(one)
    return dist, int(one)


def main(argv):
    rank = int(os.environ["RANK"])
    return globals()[argv[0]](rank, *argv[1:])


def together(rank):
    dist, world = group()
    if rank == 0:
        print("world", world, "port", os.environ["MASTER_PORT"], flush=True)
    dist.barrier()
    dist.destroy_process_group()
    return 0


def accelerated(rank):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    if accelerator.is_main_process:
        print("world", accelerator.num_processes, accelerator.distributed_type.value, flush=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return 0


def mistake_everywhere(rank):
    raise ValueError("optim.lrr: no such key; nearest: lr")


def mistake_on_one(rank):
    dist, _ = group()
    if rank == 1:
        raise ValueError("shard 7 is cut short")
    dist.barrier()


def mistake_told_to_the_others(rank):
    group()
    if rank == 1:
        time.sleep(0.1)  # until rank 0 has left the collective too
        raise SystemExit(2)  # was told, and leaves the word to rank 0
    time.sleep(0.3)
    raise ValueError("runs/a: another run is in this folder")


def bug_while_others_sleep(rank):
    if rank == 1:
        raise KeyError("lost")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)


def killed(rank):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def exits_with_5(rank):
    os._exit(5 if rank == 1 else 0)


def saves_when_interrupted(rank, folder, seconds):
    came = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    print(f"ready {os.getpid()}", flush=True)
    while not came:
        time.sleep(0.01)
    if rank == 0:  # one rank saves, the other is done at once
        time.sleep(float(seconds))
        Path(folder, "saved").write_text(str(len(came)))
    return 130


def stops_at_the_second(rank):
    print(f"ready {os.getpid()}", flush=True)
    came = []

    def note(number, frame):
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    time.sleep(60)


def deaf(rank):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print(f"ready {os.getpid()}", flush=True)
    time.sleep(60)


def works(rank):
    print(f"ready {os.getpid()}", flush=True)
    time.sleep(60)

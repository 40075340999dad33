"""Two machines on one host: network namespaces joined by a cable, or two loopback addresses where root is missing."""

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CLONE_NEWNET = 0x40000000  # linux/sched.h


@dataclass(frozen=True)
class Machine:
    address: str
    """At which the other reaches it."""
    namespace: Path | None

    def command(self, *argv: str) -> list[str]:
        """The command line that runs on it."""
        return [*argv] if self.namespace is None else ["nsenter", f"--net={self.namespace}", *argv]

    def enter(self) -> None:
        """Moves this process, which must have one thread, onto it."""
        if self.namespace is not None:
            descriptor = os.open(self.namespace, os.O_RDONLY)
            if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
            os.close(descriptor)


@contextlib.contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    with contextlib.ExitStack() as stack:
        try:
            yield _namespaces(stack)
        except _NotAllowed:
            yield Machine("127.0.0.2", None), Machine("127.0.0.3", None)


class _NotAllowed(Exception):
    pass


def _namespaces(stack: contextlib.ExitStack) -> tuple[Machine, Machine]:
    if os.geteuid() or shutil.which("ip") is None or shutil.which("nsenter") is None:
        raise _NotAllowed
    names = [f"tandem{os.getpid()}{letter}" for letter in "ab"]
    cables = [f"td{os.getpid()}{letter}" for letter in "ab"]  # at most 15 characters
    for name in names:
        if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
            raise _NotAllowed
        stack.callback(subprocess.run, ["ip", "netns", "del", name], check=True)
    _ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
    for number, (name, cable) in enumerate(zip(names, cables, strict=True)):
        _ip("link", "set", cable, "netns", name)
        _ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", cable)
        _ip("-n", name, "link", "set", cable, "up")
        _ip("-n", name, "link", "set", "lo", "up")
    first, second = (Machine(f"10.77.0.{n + 1}", Path("/run/netns") / name) for n, name in enumerate(names))
    return first, second


def _ip(*words: str) -> None:
    if subprocess.run(["ip", *words], capture_output=True).returncode:
        raise _NotAllowed


def bend(machine: Machine, update: int) -> None:
    """Enters the machine, and lets the last bit of a weight turn there after an update, as in bad memory."""
    import torch

    from trainer import loop

    machine.enter()
    train_step, done = loop.train_step, [0]

    def bent(method: Any, engines: dict[str, Any], parts: Any, run: Any, **more: Any) -> None:
        train_step(method, engines, parts, run, **more)
        done[0] += 1
        if done[0] == update:
            next(engines["generator"].network.parameters()).data.view(torch.int32).view(-1)[0] ^= 1

    loop.train_step = bent

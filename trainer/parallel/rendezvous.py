"""Where ranks meet: each says who it is and what it runs, rank 0 calls the roll, and only then is a group formed.

torch's own start counts processes and nothing else: a rank that is missing, there twice or of another mind is a hang
that ends after many minutes in a traceback, on the machines that are innocent of it.
"""

import errno
import fcntl
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # public, but not in __all__

from trainer.errors import UNMET, Ending
from trainer.parallel import agreement
from trainer.parallel.launcher import number, start_port

NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
PAUSE = 0.05  # seconds between looks into the store
GLOO_TIMES = 5  # gloo waits so many times as long as it is told for a connection from the other side (torch 2.13)
FAREWELL = 5.0  # seconds that rank 0 waits, when it has refused, for the others to hear why
SIOCGIFADDR = 0x8915  # linux/sockios.h
COLLECTIVES = {"gloo": timedelta(minutes=30), "nccl": timedelta(minutes=10)}  # torch's own; a save may take minutes


class Place(NamedTuple):
    """Of this process, as the launcher says."""

    rank: int
    world: int
    address: str
    port: int


def join(config: Mapping[str, Any], *, timeout: float) -> object:
    """Forms the process group of the launcher's variables; returns what must live as long as it.

    config: flat keys that all ranks must have alike. ValueError within `timeout` seconds (of each of three waits: for
    rank 0, for the others, for the connections), on every rank that came, with the name of the rank that is to blame.
    """
    place = _place()
    if place is None or dist.is_initialized():
        return None
    _choose_interface(place)
    server, store = _connect(place, timeout=timeout)
    told = agreement.mine(config, device="cuda" if torch.cuda.is_available() else "cpu")
    _roll_call(store, place, told, timeout=timeout, serves=server is not None)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(
            backend,
            store=PrefixStore("group", store),
            rank=place.rank,
            world_size=place.world,
            timeout=connecting(timeout),
        )
    except RuntimeError as error:
        raise unconnected(error, timeout=timeout) from None
    assert dist.group.WORLD is not None
    patient(dist.group.WORLD, backend)
    store.set_timeout(COLLECTIVES["gloo"])
    return server, store


def connecting(timeout: float) -> timedelta:
    return timedelta(seconds=timeout / GLOO_TIMES)


def patient(group: dist.ProcessGroup, backend: str) -> None:
    """Once ranks are connected, what they wait for is each other's work."""
    device = torch.device("cuda" if backend == "nccl" else "cpu")
    group._get_backend(device)._set_default_timeout(COLLECTIVES[backend])


def unconnected(error: RuntimeError, *, timeout: float) -> ValueError:
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "that of the host's name")
    first = str(error).splitlines()[0][:200]
    return ValueError(
        f"all ranks came, but could not be connected within {timeout:g} s (parallel.timeout; network interface "
        f"{interface}): {first}; set GLOO_SOCKET_IFNAME to the interface by which this machine reaches the others"
    )


def _place() -> Place | None:
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return None
    missing = [name for name in NEEDED if not os.environ.get(name)]
    if missing:
        set_ = [name for name in ("RANK", "WORLD_SIZE") if name not in missing]
        raise ValueError(
            f"{', '.join(missing)}: not set, but {', '.join(set_)} {'is' if len(set_) == 1 else 'are'}; start with "
            "`tandem train`, torchrun or `accelerate launch`, which set all of them, or unset RANK and WORLD_SIZE"
        )
    rank, world = number("RANK"), number("WORLD_SIZE", least=1)
    number("LOCAL_RANK")  # Accelerate reads it
    if not 0 <= rank < world:
        raise ValueError(f"RANK: {rank} is no rank of WORLD_SIZE {world}; they count from 0 to {world - 1}")
    return Place(rank, world, os.environ["MASTER_ADDR"], number("MASTER_PORT", least=1, most=65_535))


# ---------------------------------------------------------------- the way to rank 0
def _choose_interface(place: Place) -> None:
    """Lets gloo take the interface that leads to rank 0. It would take that of the host's name, which on many machines
    is the loopback, where no other machine answers."""
    if sys.platform == "linux" and "GLOO_SOCKET_IFNAME" not in os.environ:
        name = _interface(place.address)
        if name is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = name


def _interface(address: str) -> str | None:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing
            mine = probe.getsockname()[0]
            if mine.startswith("127."):
                return "lo"
            for _, name in socket.if_nameindex():
                request = struct.pack("256s", name.encode()[:15])
                try:
                    found = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)[20:24]
                except OSError:  # an interface without an address
                    continue
                if socket.inet_ntoa(found) == mine:
                    return name
    except OSError:  # no route, or no such name: said by whoever connects
        return None
    return None


def _connect(place: Place, *, timeout: float) -> tuple[object, TCPStore]:
    """(the server where this rank serves, the store)."""
    wait = timedelta(seconds=timeout)
    server = None
    if place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # else the launcher serves it
        try:
            server = TCPStore("127.0.0.1", place.port, is_master=True, timeout=wait, wait_for_workers=False)
        except RuntimeError as error:
            reason = os.strerror(errno.EADDRINUSE) if "EADDRINUSE" in str(error) else str(error).splitlines()[0]
            if place.port == start_port():  # nobody chose it, and the next start has another
                raise Ending(f"rank 0 cannot listen on port {place.port}, this start's ({reason})", UNMET) from None
            raise ValueError(
                f"MASTER_PORT: rank 0 cannot listen on port {place.port} ({reason}): another run, or another rank 0, "
                "may have it; choose another port"
            ) from None
    _reach(place, timeout=timeout)
    try:
        return server, TCPStore(place.address, place.port, timeout=wait, wait_for_workers=False)
    except RuntimeError as error:
        first = str(error).splitlines()[0][:200]
        what = f"rank {place.rank}: no store at {place.address}:{place.port}: {first}"
        raise (Ending(what, UNMET) if place.port == start_port() else ValueError(what)) from None


def _reach(place: Place, *, timeout: float) -> None:
    """Waits until somebody listens at rank 0's address."""
    ends = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((place.address, place.port), timeout=min(5.0, timeout)).close()
            return
        except OSError as error:
            if time.monotonic() >= ends:
                raise ValueError(
                    f"rank {place.rank} of {place.world} found nobody at {place.address}:{place.port} within "
                    f"{timeout:g} s (parallel.timeout): {error.strerror or error}; MASTER_ADDR and MASTER_PORT must be "
                    "those of rank 0's machine, it must be up, and its firewall must let the port through"
                ) from None
        time.sleep(min(0.5, PAUSE * 4))


# ---------------------------------------------------------------- the roll
def _roll_call(store: TCPStore, place: Place, told: Mapping[str, Any], *, timeout: float, serves: bool) -> None:
    """ValueError on every rank that came, unless each rank came once and all told the same. serves: whether the store
    goes with this process."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    roll = PrefixStore(f"tandem/{attempt}", store)
    fault: str | None
    here = f"{socket.gethostname()}, process {os.getpid()}"
    try:
        if roll.add(f"came/{place.rank}", 1) > 1:
            other = _text(roll, f"host/{place.rank}", until=time.monotonic() + FAREWELL) or "elsewhere"
            fault = f"rank {place.rank} was started twice, on {other} and on {here}; {_numbers()}"
            roll.set("fault", fault)
            if serves:  # the other rank 0 judges, perhaps over the store of this one
                _text(roll, "verdict", until=time.monotonic() + FAREWELL)
                _until_heard(roll, place)
            raise ValueError(fault)
        roll.set(f"host/{place.rank}", here)
        ends = time.monotonic() + timeout
        if place.rank == 0:
            roll.set("world", str(place.world))
        world = _text(roll, "world", until=ends)
        if world not in (None, str(place.world)):  # it may be one that rank 0 does not wait for
            fault = f"rank {place.rank} is one of {place.world}, rank 0 one of {world}; {_numbers()}"
            roll.set("fault", fault)
            raise ValueError(fault)
        roll.set(f"told/{place.rank}", json.dumps(told))
        if place.rank == 0:
            fault = _judge(roll, place, ends=ends, timeout=timeout)
            roll.set("verdict", json.dumps(fault))
            if fault:
                _until_heard(roll, place)
        else:
            verdict = _text(roll, "verdict", until=ends + FAREWELL)
            roll.add("heard", 1)
            fault = f"rank 0 of {place.world} {_late(timeout)}" if verdict is None else json.loads(verdict)
    except RuntimeError as error:  # torch's, of a store whose server went away
        raise ValueError(f"rank 0 of {place.world} went away at the start: {str(error).splitlines()[0]}") from None
    if fault:
        raise ValueError(fault)


def _judge(roll: PrefixStore, place: Place, *, ends: float, timeout: float) -> str | None:
    """What is wrong with those who came, or with those who did not."""
    keys = [f"told/{rank}" for rank in range(place.world)]
    while not roll.check(keys):
        if roll.check(["fault"]):
            return str(roll.get("fault").decode())
        if time.monotonic() >= ends:
            missing = [rank for rank, key in enumerate(keys) if not roll.check([key])]
            names = ", ".join(map(str, missing[:8])) + (" ..." if len(missing) > 8 else "")
            return f"rank{'s'[: len(missing) > 1]} {names} of {place.world} {_late(timeout)}"
        time.sleep(PAUSE)
    return agreement.disagreement([json.loads(text) for text in roll.multi_get(keys)])


def _until_heard(roll: PrefixStore, place: Place) -> None:
    """The store goes with rank 0, so it stays until those who came know why."""
    ends = time.monotonic() + FAREWELL
    came = sum(roll.check([f"told/{rank}"]) for rank in range(1, place.world))
    while roll.add("heard", 0) < came and time.monotonic() < ends:
        time.sleep(PAUSE)
    time.sleep(10 * PAUSE)  # another rank 0 may look once more


def _text(roll: PrefixStore, key: str, *, until: float) -> str | None:
    while not roll.check([key]):
        if time.monotonic() >= until:
            return None
        time.sleep(PAUSE)
    return str(roll.get(key).decode())


def _late(timeout: float) -> str:
    return (
        f"did not come within {timeout:g} s (parallel.timeout); is its machine up, with the same number of machines "
        "and processes, and a machine rank of its own?"
    )


def _numbers() -> str:
    return "each machine must have a machine rank of its own, and all the same number of machines and processes"

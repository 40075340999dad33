"""What one call costs: time beside a copy of as many bytes, launches, memory, what autograd keeps.

On a CPU one thread and the process's own clock of the wall; variants take turns call by call, so whoever else uses the
machine slows all of them alike, and the minimum is what counts. On a GPU events around each call, after its caches were
flushed by a write larger than they are.
"""

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile, record_function

Call = Callable[[], object]
FLUSH = 256 << 20
"""Bytes written before each timed call on a GPU: several times the largest cache of one (50 MB in an H100)."""
SPANS = ("measured", "rest")
BLOCK = 1e-3
"""Seconds that a timed block of calls takes at least on a CPU, where one of 20 us is near the clock's noise."""


class Times(NamedTuple):
    """Milliseconds a call."""

    least: float
    median: float


def times(found: Mapping[str, Call], device: torch.device, *, rounds: int) -> dict[str, Times]:
    """Each variant `rounds` times, in turns."""
    turn = _cuda_turn(device) if device.type == "cuda" else _cpu_turn(found)
    samples: dict[str, list[float]] = {name: [] for name in found}
    for number in range(rounds):
        for name in found if number % 2 else reversed(found):
            samples[name].append(turn(name, found[name]))
    return {name: Times(min(some), statistics.median(some)) for name, some in samples.items()}


def _cpu_turn(found: Mapping[str, Call]) -> Callable[[str, Call], float]:
    counts = {}
    for name, call in found.items():
        call()  # first calls choose algorithms, compile and allocate
        since = time.perf_counter()
        call()
        counts[name] = max(1, round(BLOCK / max(time.perf_counter() - since, 1e-9)))

    def turn(name: str, call: Call) -> float:
        since = time.perf_counter()
        for _ in range(counts[name]):
            call()
        return 1e3 * (time.perf_counter() - since) / counts[name]

    return turn


def _cuda_turn(device: torch.device) -> Callable[[str, Call], float]:
    flushed = torch.empty(FLUSH, dtype=torch.uint8, device=device)
    warm: set[str] = set()

    def turn(name: str, call: Call) -> float:
        if name not in warm:
            for _ in range(3):
                call()
            warm.add(name)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flushed.zero_()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end))

    return turn


def copy_of(size: int, device: torch.device) -> Call:
    """A copy that reads and writes `size` bytes together."""
    source = torch.ones(max(1, size // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def profiled(call: Call, device: torch.device) -> tuple[int, int]:
    """Of one call: launches, and bytes allocated at once on top of what was there.

    Launches are kernels on a GPU, memory sets and copies too; on a CPU torch's operations called from outside torch."""
    call()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with _quiet(), profile(activities=kinds, profile_memory=not cuda) as found:
        with record_function(SPANS[0]):
            call()
            if cuda:
                torch.cuda.synchronize()
        with record_function(SPANS[1]):
            pass
    events = found.events() or []
    if cuda:
        kernels = [event for event in events if event.device_type == DeviceType.CUDA and event.name not in SPANS]
        return len(kernels), torch.cuda.max_memory_allocated() - before
    outer = [event for event in events if event.cpu_parent is not None and event.cpu_parent.name == SPANS[0]]
    threads = [event for event in events if event.cpu_parent is None and "::" in event.name]  # autograd's own, if any
    return sum("::" in event.name for event in outer) + len(threads), allocated(found)["allocated_peak"]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the profiler prints when it starts and stops, in some builds of torch."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def allocated(found: Any) -> dict[str, int]:
    """What torch's allocator on the CPU had given out, from the profiler's records: at the peak of the measured update
    and after it, once Python has collected."""
    events = found.profiler.kineto_results.events()
    spans = {e.name(): (e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() in SPANS}
    begin, end = spans["measured"]
    now, figures = 0, {"allocated": 0, "allocated_peak": 0}
    for when, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        now += size
        if begin <= when <= end:
            figures["allocated_peak"] = max(figures["allocated_peak"], now)
        if when <= spans["rest"][1]:
            figures["allocated"] = now
    return figures


def saved(call: Call, *, besides: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward of `call`, each storage once. besides: tensors that are there anyway,
    such as weights."""
    known = {tensor.untyped_storage().data_ptr() for tensor in besides}
    sizes: dict[int, int] = {}
    held: list[Any] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held.append(storage)
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        held.append(call())
    return sum(sizes.values())

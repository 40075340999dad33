"""The way of a batch to the GPU: from pinned memory or not, one batch ahead of the work or not."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tools.bench.turns import ratios, spread
from trainer.data import Feed, RawBatch, Transform, to_device

SIDE = 256
BATCHES = 50  # of a turn
ROUNDS = 7
WORK = 3e-3  # seconds of the step that a batch feeds


def measure(batch: int) -> dict[str, Any]:
    """Milliseconds a batch of uint8 (batch, 256, 256, 3), to floats on the device, with a step of WORK seconds on each.
    ValueError where there is no GPU."""
    if not torch.cuda.is_available():
        raise ValueError("--device: this machine has no GPU that torch can use; leave it out, or run on one that has")
    device = torch.device("cuda", torch.cuda.current_device())
    transform = Transform(height=SIDE, width=SIDE, fit="exact", flip=False, seed=0)
    step = _step(device)
    plain, pinned = (_raw(batch, pin=pin) for pin in (False, True))
    found: dict[str, Callable[[int], float]] = {
        "step alone": lambda count: _timed(device, lambda: [step() for _ in range(count)]),
        "pageable": lambda count: _timed(device, lambda: _now(plain, count, device, transform, step)),
        "pinned": lambda count: _timed(device, lambda: _now(pinned, count, device, transform, step)),
        "pageable, one ahead": lambda count: _timed(device, lambda: _ahead(plain, count, device, transform, step)),
        "pinned, one ahead": lambda count: _timed(device, lambda: _ahead(pinned, count, device, transform, step)),
    }
    costs: dict[str, list[float]] = {name: [] for name in found}
    for name in found:
        found[name](BATCHES)
    for _ in range(ROUNDS):
        for name in (*found, *reversed(found)):
            costs[name].append(1e3 * found[name](BATCHES) / BATCHES)
    return {
        "device": torch.cuda.get_device_name(device),
        "batch": [batch, SIDE, SIDE, 3],
        "rows": [
            {"way": name, "ms_per_batch": spread(ms), "ratio_to_step_alone": ratios(costs["step alone"], ms)}
            for name, ms in costs.items()
        ],
    }


def describe(found: dict[str, Any]) -> None:
    print(f"\n{found['device']}, uint8 {tuple(found['batch'])}")
    for row in found["rows"]:
        ms, ratio = row["ms_per_batch"], row["ratio_to_step_alone"]
        line = f"  {row['way']:24} {ms['median']:8.3f} ms ({ms['least']:.3f} to {ms['most']:.3f})"
        print(f"{line}   {ratio['median']:.3f} of the step alone")


def _raw(batch: int, *, pin: bool) -> RawBatch:
    data = torch.randint(0, 256, (batch, SIDE, SIDE, 3), dtype=torch.uint8)
    number = torch.arange(batch)
    columns = (data, number, number.clone(), number.clone(), torch.ones(batch))
    return RawBatch(*(column.pin_memory() if pin else column for column in columns))


def _step(device: torch.device) -> Callable[[], object]:
    """Work of about WORK seconds."""
    matrix = torch.randn(4096, 4096, device=device)

    def work(count: int) -> Tensor:
        found = matrix
        for _ in range(count):
            found = matrix @ matrix
        return found

    work(3)
    seconds = _timed(device, lambda: work(10)) / 10
    count = max(1, round(WORK / seconds))
    return lambda: work(count)


def _timed(device: torch.device, call: Callable[[], object]) -> float:
    torch.cuda.synchronize(device)
    since = time.perf_counter()
    call()
    torch.cuda.synchronize(device)
    return time.perf_counter() - since


def _now(raw: RawBatch, count: int, device: torch.device, transform: Transform, step: Callable[[], object]) -> None:
    for _ in range(count):
        to_device(raw, device=device, transform=transform)
        step()


def _ahead(raw: RawBatch, count: int, device: torch.device, transform: Transform, step: Callable[[], object]) -> None:
    def batches() -> Iterator[RawBatch]:
        for _ in range(count):
            yield raw

    for _ in Feed(batches(), device=device, transform=transform):
        step()

"""Every fused operation beside plain torch, torch.compile and a copy of as many bytes, in one table.

    python -m tools.bench.losses                                    # all of them; minutes, most of which compiles
    python -m tools.bench.losses --device cuda --csv losses.csv
    python -m tools.bench.losses --quick --ops group_norm_silu,noise

plain is the code that people have, on a GPU under autocast; eager, compiled, triton are trainer/kernels. MB least are
those that no implementation can avoid; of copy: the time of a copy that reads and writes as many, over the operation's,
so 1.00 is the machine's limit. On a CPU one thread, in turns, without kernels, which are interpreted there.
An implementation that is further from float64 than its dtype explains is refused, and the exit code is then 1.
"""

import argparse
import contextlib
import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch

from tools.bench import clock, turns
from tools.bench.cases import Case, cases
from trainer.errors import boundary
from trainer.kernels.choose import Impl, choose
from trainer.kernels.program import LACKING

IMPLS: dict[str, tuple[Impl, ...]] = {"cpu": ("eager", "compiled"), "cuda": ("eager", "compiled", "triton")}
OPS = tuple(dict.fromkeys(case.op for case in cases("cpu", quick=True)))
ROUNDS = {"cpu": 15, "cuda": 25}
SLOWER = 5.0
"""Microseconds that `auto` may take longer a call than eager on a CPU, where it is eager: it only looks for a GPU."""
COLUMNS = {
    "op": "op", "shape": "shape", "dtype": "dtype", "layout": "layout", "impl": "impl", "mode": "mode", "ms": "ms",
    "ms_median": "p50", "bytes": "MB least", "gb_s": "GB/s", "copy_gb_s": "copy GB/s", "of_copy": "of copy",
    "vs_plain": "x plain", "vs_compiled": "x compiled", "launches": "launches", "peak": "peak MB",
    "saved": "saved B/el", "error": "error", "gradient_error": "of grad.",
}  # fmt: skip
Row = dict[str, Any]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.losses", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda where there is a GPU)")
    parser.add_argument("--ops", type=turns.names(OPS), default=list(OPS), metavar="A,B", help=f"of {','.join(OPS)}")
    parser.add_argument("--rounds", type=turns.count, help="times that each is measured (default: 15, on a GPU 25)")
    parser.add_argument("--quick", action="store_true", help="small sizes, 3 rounds, nothing compiled: seconds")
    parser.add_argument("--csv", type=turns.new_file, metavar="FILE", help="write the table as CSV too")
    parser.add_argument(
        "--json", type=turns.new_file, metavar="FILE", help="write it as JSON, with machine and versions"
    )
    given = parser.parse_args(argv)
    given.device = turns.device_of(given.device)
    return given


# ---------------------------------------------------------------------------------------------- what is called
class Bound:
    """One implementation on inputs of its own: its forward, its backward, and both."""

    def __init__(self, case: Case, name: str, device: torch.device) -> None:
        self.case, self.name, self.device = case, name, device
        self.inputs = case.inputs(device)
        self.wanted = [t for t in self.inputs if t.requires_grad]
        self.upstream = [torch.ones_like(out) / out[0].numel() ** 0.5 for out in self.outputs()]

    def outputs(self) -> tuple[Tensor, ...]:
        case = self.case
        if self.name == "plain" or self.name in case.others:
            formula = case.plain if self.name == "plain" else case.others[self.name]
            assert formula is not None
            with self.autocast():
                found = formula(*self.inputs)
        else:
            found = case.ours(*self.inputs, impl=self.name)
        return (found,) if isinstance(found, Tensor) else tuple(found)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        low = self.case.dtype in (torch.bfloat16, torch.float16)
        if low and self.device.type == "cuda":
            return torch.autocast("cuda", self.case.dtype)
        return contextlib.nullcontext()

    def gradients(self, outputs: Sequence[Tensor], *, retain: bool = False) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(outputs, self.wanted, self.upstream, retain_graph=retain, allow_unused=True)

    def modes(self) -> Iterator[tuple[str, Callable[[], object], int]]:
        """(mode, call, bytes)."""
        yield "fwd", self.outputs, self.case.forward
        if self.case.backward:
            kept = self.outputs()
            yield "bwd", lambda: self.gradients(kept, retain=True), self.case.backward
            yield "full", lambda: self.gradients(self.outputs()), self.case.forward + self.case.backward


def errors(bound: Bound) -> tuple[float | None, float | None]:
    """Largest difference from float64, as a share of the largest value, of the outputs and of the gradients."""
    case = bound.case
    found = bound.outputs()
    exact = Bound.__new__(Bound)
    exact.case, exact.name, exact.device = case, "eager", bound.device
    exact.inputs = case.inputs(bound.device, double=True)
    exact.wanted = [t for t in exact.inputs if t.requires_grad]
    true = exact.outputs()
    exact.upstream = [g.to(out.dtype) for g, out in zip(bound.upstream, true, strict=True)]
    comparable = case.comparable if bound.name == "plain" else (True, True)
    value = max(map(_error, found, true)) if comparable[0] else None
    if not (case.backward and comparable[1]):
        return value, None
    pairs = zip(bound.gradients(found), exact.gradients(true), strict=True)
    return value, max(_error(own, other) for own, other in pairs if own is not None and other is not None)


def _error(found: Tensor, true: Tensor) -> float:
    found, true = found.detach().double(), true.detach().double()
    return float((found - true).abs().max() / true.abs().max().clamp(min=1e-300))


# ---------------------------------------------------------------------------------------------- what is measured
def measure(case: Case, device: torch.device, impls: Sequence[str], *, rounds: int) -> Iterator[Row]:
    """A row an implementation and mode; one with `refused` or `absent` in the place of figures where there are none."""
    names = [*(["plain"] if case.plain is not None else []), *impls, *case.others]
    start = {"op": case.op, "shape": case.shape, "dtype": str(case.dtype).removeprefix("torch."), "layout": case.layout}
    bounds: dict[str, Bound] = {}
    facts: dict[str, Row] = {}
    for name in names:
        try:
            bound = Bound(case, name, device)
            value, gradient = errors(bound)
        except ValueError as error:  # an implementation that cannot run says so
            yield {**start, "impl": name, "absent": str(error)}
            continue
        facts[name] = {"error": value, "gradient_error": gradient}
        allowed = case.allowed(name)
        over = [e for e, limit in zip((value, gradient), allowed, strict=True) if e is not None and not e <= limit]
        if over and name in impls:
            limits = " and ".join(f"{limit:.1e}" for limit in allowed)
            yield {**start, "impl": name, **facts[name], "refused": f"{max(over):.1e} from float64, above {limits}"}
            continue
        bounds[name] = bound
    modes = {name: {mode: (call, size) for mode, call, size in bound.modes()} for name, bound in bounds.items()}
    for mode in next(iter(modes.values()), {}):
        calls: dict[str, clock.Call] = {name: found[mode][0] for name, found in modes.items()}
        size = next(iter(modes.values()))[mode][1]
        taken = clock.times({"copy": clock.copy_of(size, device), **calls}, device, rounds=rounds)
        for name, call in calls.items():
            time, bound = taken[name], bounds[name]
            launches, peak = clock.profiled(call, device)
            yield {
                **start, "impl": name, "mode": mode, "ms": time.least, "ms_median": time.median, "bytes": size,
                "gb_s": size / time.least / 1e6, "copy_gb_s": size / taken["copy"].least / 1e6,
                "of_copy": taken["copy"].least / time.least,
                "vs_plain": taken["plain"].least / time.least if "plain" in taken else None,
                "vs_compiled": taken["compiled"].least / time.least if "compiled" in taken else None,
                "launches": launches, "peak": peak,
                "saved": clock.saved(bound.outputs, besides=bound.inputs[len(bound.inputs) - len(case.weights) :])
                / case.elements if mode == "full" else None,
                **facts[name],
            }  # fmt: skip


def overhead(rounds: int) -> Row:
    """What choosing costs on a CPU: `auto`, which is eager there, beside eager, for the cheapest operation there is."""
    case = min(cases("cpu", quick=True), key=lambda case: case.forward + (case.op != "group_norm_silu") * (1 << 40))
    cpu = torch.device("cpu")
    bounds = {name: Bound(case, name, cpu) for name in ("auto", "eager")}
    taken = clock.times({name: bound.outputs for name, bound in bounds.items()}, cpu, rounds=4 * rounds)
    one = torch.zeros(1)
    chosen = clock.times({"choose": lambda: choose("bench", one, unfit=lambda: None)}, cpu, rounds=rounds)
    auto, eager = 1e3 * taken["auto"].least, 1e3 * taken["eager"].least
    return {"op": case.name, "auto_us": auto, "eager_us": eager, "choose_us": 1e3 * chosen["choose"].least}


# ---------------------------------------------------------------------------------------------- what is printed
def cells_of(row: Row) -> list[str]:
    """The cells of a row, in the order of COLUMNS."""
    shown = {
        "ms": "{:.3f}", "ms_median": "{:.3f}", "gb_s": "{:.1f}", "copy_gb_s": "{:.1f}", "of_copy": "{:.2f}",
        "vs_plain": "{:.2f}", "vs_compiled": "{:.2f}", "saved": "{:.1f}", "error": "{:.0e}", "gradient_error": "{:.0e}",
    }  # fmt: skip
    cells = []
    for key in COLUMNS:
        value = row.get(key)
        if value is not None and key in ("bytes", "peak"):
            value = f"{value / 1e6:.2f}"
        cells.append("" if value is None else shown.get(key, "{}").format(value))
    return cells


def describe(rows: Sequence[Row]) -> None:
    """One operation's rows."""
    table = [list(COLUMNS.values()), *(cells_of(row) for row in rows if "ms" in row)]
    widths = [max(len(line[column]) for line in table) for column in range(len(COLUMNS))]
    for line in table:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())
    for row in rows:
        for word in ("absent", "refused"):
            if word in row:
                print(f"  {row['op']} {row['shape']} {row['dtype']} {row['impl']}: {word}: {row[word]}")
    print(flush=True)


def table(device: str, ops: Sequence[str], *, rounds: int, quick: bool) -> Iterator[list[Row]]:
    """The rows of each case."""
    torch.manual_seed(0)
    functorch.donated_buffer = False  # a compiled backward is timed again and again on one forward
    impls = [impl for impl in IMPLS[device] if not (quick and impl == "compiled")]
    if LACKING is not None:
        impls = [impl for impl in impls if impl != "triton"]
    for case in cases(device, quick=quick):
        if case.op in ops:
            yield list(measure(case, torch.device(device), impls, rounds=rounds))


def _write(given: argparse.Namespace, argv: list[str], rows: list[Row], more: Row) -> None:
    if given.csv is not None:
        with given.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*COLUMNS, "absent", "refused"])
            writer.writeheader()
            writer.writerows(rows)
    if given.json is not None:
        where = turns.where(["python -m tools.bench.losses", *argv], ("torch", "triton"))
        given.json.write_text(json.dumps({**where, **more, "device": given.device, "rows": rows}, indent=1) + "\n")


def main(argv: list[str]) -> int:
    given = parse(argv)
    torch.set_num_threads(1 if given.device == "cpu" else torch.get_num_threads())
    rounds = given.rounds or (3 if given.quick else ROUNDS[given.device])
    rows: list[Row] = []
    for some in table(given.device, given.ops, rounds=rounds, quick=given.quick):
        describe(some)
        rows += some
        _write(given, argv, rows, {})  # after each: who is stopped keeps what there is
    refused = [row for row in rows if "refused" in row]
    slower, more = False, {}
    if given.device == "cpu":
        found = overhead(rounds)
        slower, more = found["auto_us"] - found["eager_us"] > SLOWER, {"overhead": found}
        word = "SLOWER than" if slower else "as fast as"
        told = f"{found['op']} takes {found['auto_us']:.1f} and {found['eager_us']:.1f} us a call"
        print(f"auto is {word} eager: {told}, of which choosing {found['choose_us']:.1f}")
    _write(given, argv, rows, more)
    for row in refused:
        print(f"refused: {row['op']} {row['shape']} {row['dtype']} {row['impl']}: {row['refused']}", file=sys.stderr)
    return 1 if refused or slower else 0


if __name__ == "__main__":
    sys.exit(boundary(main, sys.argv[1:]))

"""Everything that needs a GPU, in one command of less than 8 minutes, for a machine that has nothing but torch.

    python -m tools.bench.gpu                                       # writes tools/bench/results/DEVICE.json
    python -m tools.bench.gpu --stages losses,profile --minutes 4
    python -m tools.bench.gpu --device cpu --quick

Stages, each a process of its own with a share of the minutes: the tests of kernels on the GPU, the table of
tools/bench/losses.py, images a second of the three methods at 28, 64 and 256 pixels (eager, fused, compiled), what
penalties cost, and the kernels that take most of one step. The file is written after each stage, so who is stopped
keeps what there is; stages that are not run stay as the file has them. It needs Python 3.10, torch 2.9, triton 3.6,
numpy and no network; what else is missing is carried (tools/bench/carry.py) or stood in for. tools/bench/page.py makes
the page from the files.
"""

import argparse
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tools.bench import stand_in

ABSENT = stand_in.install()

import torch  # noqa: E402  what follows may import what is stood in for

from tools.bench import activations, losses, models, penalties, step, turns  # noqa: E402
from trainer.errors import boundary  # noqa: E402
from trainer.kernels.choose import preferred  # noqa: E402

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
SHARES = {"tests": 1.5, "losses": 2.5, "step": 2.5, "penalties": 0.4, "profile": 0.5, "activations": 0.2}
"""Stages and what each may take of the minutes, as parts of their sum."""
DEFAULT = {"cuda": tuple(SHARES), "cpu": ("losses", "step", "penalties", "activations")}
TOP = 25
"""Kernels that the profile names."""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda where there is a GPU)")
    parser.add_argument(
        "--stages", type=turns.names(tuple(SHARES)), metavar="A,B",
        help=f"of {','.join(SHARES)} (default: all; on a CPU {','.join(DEFAULT['cpu'])})",
    )  # fmt: skip
    parser.add_argument("--minutes", type=turns.positive, default=7.5, help="of all stages together (default: 7.5)")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: whether it works")
    parser.add_argument("--commit", metavar="HASH", help="of this code, where git does not say")
    parser.add_argument(
        "--out", type=turns.new_file, metavar="FILE", help=f"(default: {RESULTS.relative_to(ROOT)}/DEVICE.json)"
    )
    parser.add_argument("--stage", choices=tuple(SHARES), help=argparse.SUPPRESS)  # of the process of one
    given = parser.parse_args(argv)
    if given.minutes <= 0:
        parser.error(f"--minutes: {given.minutes:g} are none")
    given.device = turns.device_of(given.device)
    given.stages = given.stages or list(DEFAULT[given.device])
    return given


# ---------------------------------------------------------------------------------------------- stages
def tests(given: argparse.Namespace, out: Path) -> None:
    """The tests of kernels, natively where there is a GPU."""
    where = "tests/kernels/test_noise.py" if given.quick else "tests/kernels"
    options = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", where, *options], cwd=ROOT, capture_output=True, text=True, check=False
    )
    lines = ended.stdout.strip().splitlines()
    found = {
        "exit": ended.returncode,
        "said": (lines or ended.stderr.strip().splitlines() or ["nothing"])[-1],
        "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
    }
    out.write_text(json.dumps(found))


def table(given: argparse.Namespace, out: Path) -> None:
    losses.main(["--device", given.device, "--json", str(out), *(["--quick"] if given.quick else [])])


def throughput(given: argparse.Namespace, out: Path) -> None:
    """Of the shipped configs, and on a GPU of the methods at each size, the largest first, and networks compiled last,
    which takes longest."""
    turn = "1" if given.device == "cpu" else "0.3"
    short = ["--quick"] if given.quick else ["--seconds", turn, "--rounds", "5"]
    common = ["--device", given.device, "--out", str(out), *short]
    if given.device == "cpu":
        step.main([*common, "--parts", *(["--configs", "vae_fashion"] if given.quick else [])])
        return
    sizes = ["28"] if given.quick else [str(size) for size in reversed(models.SIZES)]
    methods = ["--methods", ",".join(models.METHODS), "--precision", "bf16"]
    rows: list[Any] = []
    for more in ([], ["--whole"]):
        for size in sizes:
            step.main([*common, *methods, "--sizes", size, *(more or ["--parts"])])
            found = json.loads(out.read_text())
            new = [row for row in found["rows"] if not more or "networks" in row["variant"]]
            rows += new
            out.write_text(json.dumps({**found, "rows": rows}))


def profiled(given: argparse.Namespace, out: Path) -> None:
    """What takes most of a step of the largest model, under auto and under eager."""
    size = 28 if given.quick or given.device == "cpu" else 256
    cuda = given.device == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
    found: dict[str, Any] = {"model": f"vaegan-{size}"}
    with tempfile.TemporaryDirectory() as folder:
        lpips = models.random_lpips(Path(folder)) if size == 256 else None
        config = models.of_size("vaegan", size, lpips=lpips, precision="bf16" if cuda else "fp32")
        for impl in ("eager", "auto"):
            take = step.Taken(config, step.own.alone(torch.device(given.device)), impl)  # type: ignore[arg-type]
            take(3)
            with preferred(impl), torch.profiler.profile(activities=kinds) as seen:  # type: ignore[arg-type]
                take(1)
                if cuda:
                    torch.cuda.synchronize()
            key = "self_device_time_total" if cuda else "self_cpu_time_total"
            events = sorted(seen.key_averages(), key=lambda event: -getattr(event, key))
            total = sum(getattr(event, key) for event in events)
            found[impl] = {
                "ms": total / 1e3,
                "top": [
                    {"name": event.key[:120], "calls": event.count, "ms": round(getattr(event, key) / 1e3, 4),
                     "share": round(getattr(event, key) / max(total, 1e-9), 4)}
                    for event in events[:TOP]
                ],
            }  # fmt: skip
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                take(1)
                found[impl]["peak_bytes"] = torch.cuda.max_memory_allocated()
            out.write_text(json.dumps(found))


def counted(given: argparse.Namespace, out: Path) -> None:
    if given.quick:
        activations.main(["vae_fashion", "--impls", "eager", "--out", str(out)])
    else:
        activations.main(["--lpips", "--out", str(out)])


def penalised(given: argparse.Namespace, out: Path) -> None:
    short = ["--networks", "gan_fashion,vaegan_fashion", "--rounds", "10"] if given.device == "cpu" else []
    short = ["--networks", "gan_fashion", "--rounds", "2"] if given.quick else short
    penalties.main(["--cost", "--device", given.device, "--out", str(out), *short])


STAGES: dict[str, Callable[[argparse.Namespace, Path], None]] = {
    "tests": tests, "losses": table, "step": throughput, "penalties": penalised, "profile": profiled,
    "activations": counted,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------- the file
def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return str(turns.where([], ())["machine"]["cpu"])


def commit() -> str:
    """Of this code, with a mark where it has changed since; `unknown` where there is no git."""
    code = ["--", "trainer", "tools", ":!tools/bench/results", ":!*.md"]
    said = []
    for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", *code]):
        try:
            ended = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        except OSError:
            return "unknown"
        if ended.returncode:
            return "unknown"
        said.append(ended.stdout.strip())
    return said[0] + ("-dirty" if said[1] else "")


def start_of(given: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """What the file says of itself."""
    where = turns.where(["python -m tools.bench.gpu", *argv], ("torch", "triton", "numpy"))
    return {
        "device": device_name(given.device),
        "kind": given.device,
        "commit": given.commit or commit(),
        **where,
        "stood_in_for": ABSENT,
        "quick": given.quick,
        "stages": {},
    }


def earlier(out: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Stages of a file of the same device that is there already."""
    if not out.exists():
        return {}
    try:
        old = json.loads(out.read_text())
    except ValueError:
        return {}
    alike = old.get("device") == found["device"] and old.get("quick") == found["quick"]
    return dict(old["stages"]) if alike else {}


def run(given: argparse.Namespace, argv: Sequence[str], name: str, limit: float) -> dict[str, Any]:
    """One stage in a process of its own: what it wrote, how it ended, and what it took."""
    since = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="tandem-gpu-") as folder:
        out = Path(folder) / "stage.json"
        command = [sys.executable, "-m", "tools.bench.gpu", *argv, "--stage", name, "--out", str(out)]
        environment = ["env", "OMP_NUM_THREADS=1"] if given.device == "cpu" else []
        with subprocess.Popen(
            [*environment, *command], cwd=ROOT, stdout=sys.stderr, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        ) as process:  # fmt: skip
            try:
                _, said = process.communicate(timeout=limit)
                why = "done" if process.returncode == 0 else _last(said) or f"exit code {process.returncode}"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # the processes that it started too
                why = f"stopped after {limit:.0f} s, its share of the minutes"
        found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    return {"ended": why, "seconds": round(time.perf_counter() - since, 1), **found}


def _last(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1] if lines else ""


def main(argv: list[str]) -> int:
    given = parse(argv)
    if given.stage is not None:
        STAGES[given.stage](given, given.out)
        return 0
    began = time.monotonic()
    found = start_of(given, argv)
    slug = re.sub("[^a-z0-9]+", "-", found["device"].lower()).strip("-")
    out = given.out or RESULTS / f"{slug}.json"
    found["stages"] = earlier(out, found)
    passed = [word for word in argv if word != "--out" and word != str(given.out)]
    for number, name in enumerate(given.stages):
        left = 60 * given.minutes - (time.monotonic() - began)
        share = SHARES[name] / sum(SHARES[other] for other in given.stages[number:])
        print(f"{name}: {max(1.0, left * share):.0f} s at most", file=sys.stderr, flush=True)
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        about = {"date": now, "commit": found["commit"], "load": round(os.getloadavg()[0], 1)}
        found["stages"][name] = {**run(given, passed, name, max(1.0, left * share)), **about}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")
        stage = found["stages"][name]
        print(f"{name}: {stage['ended']}, {stage['seconds']:.0f} s", flush=True)
    print(f"written: {out}")
    return 0 if all(found["stages"][name]["ended"] == "done" for name in given.stages) else 1


if __name__ == "__main__":
    sys.exit(boundary(main, sys.argv[1:]))

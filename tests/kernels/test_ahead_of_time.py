"""Every kernel compiles without a GPU, for those that it will meet: no spills, and wide accesses where it streams.

What is compiled is listed in tests/kernels/launches.py."""

import ast
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from tests.kernels import launches

ROOT = Path(__file__).parent.parent.parent
OLDEST = ROOT / ".venv" / "triton-3.6.0"
ARCHITECTURES = (90, 80, 100)  # H100 and H200, A100, B200; variants of kernels for the first alone


def start(folder: Path, arch: int, *options: str, path: str = "") -> subprocess.Popen[str]:
    """Compiles for one architecture, with the triton of `path` or the environment's."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    more = {"TRITON_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.kernels.launches", str(arch), *options, "--json"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=kept | more, text=True, stdout=pipe, stderr=pipe)


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, error = process.communicate(timeout=280)
    assert process.returncode == 0, error
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    return result


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    """One an architecture; each by a process of its own, all at once."""
    with contextlib.ExitStack() as stack:
        running = []
        for arch in ARCHITECTURES:
            options = () if arch == ARCHITECTURES[0] else ("--everywhere",)
            running.append(start(tmp_path_factory.mktemp(f"sm_{arch}"), arch, *options))
            stack.enter_context(running[-1])
            stack.callback(running[-1].kill)
        yield [finish(process) for process in running]


def check(kernel: dict[str, Any]) -> list[str]:
    """What is wrong with a compiled kernel."""
    case, wrong = launches.cases()[kernel["case"]], []
    name, loads, stores = (kernel[key] for key in ("kernel", "loads", "stores"))
    if kernel["stack"] > sum(size for which, size, _ in case.stack if which == name):
        wrong.append(f"{kernel['stack']} bytes of local memory a thread (registers spill, or an array is indexed)")
    if name in case.wide:
        narrow = {bits: count for bits, count in {**loads, **stores}.items() if int(bits) < 32}
        if narrow or not any(int(bits) >= 128 for bits in loads):
            wrong.append(f"loads {loads} and stores {stores}, by bits: not 128 at a time")
    return wrong


def test_every_kernel_compiles_for_each_architecture_without_spills_and_with_wide_accesses(
    results: list[dict[str, Any]],
) -> None:
    wrong = []
    for result in results:
        assert result["forgotten"] == [], "kernels without a case in tests/kernels/launches.py"
        for kernel in result["kernels"]:
            wrong += [f"{kernel['case']}: {kernel['kernel']}, sm_{kernel['arch']}: {fault}" for fault in check(kernel)]
    assert not wrong, "\n".join(wrong)
    assert {kernel["arch"] for result in results for kernel in result["kernels"]} == set(ARCHITECTURES)


def test_cases_name_kernels_that_they_launch(results: list[dict[str, Any]]) -> None:
    """A kernel that is renamed must not leave its conditions behind."""
    launched = {(kernel["case"], kernel["kernel"]) for kernel in results[0]["kernels"]}
    named = {(name, kernel) for name, case in launches.cases().items() for kernel in case.wide}
    named |= {(name, kernel) for name, case in launches.cases().items() for kernel, _, _ in case.stack}
    assert named <= launched


@pytest.mark.skipif(not OLDEST.is_dir(), reason=f"no {OLDEST.name}: tools/setup installs it where there is no GPU")
def test_the_oldest_triton_compiles_every_kernel_too(tmp_path: Path) -> None:
    result = finish(start(tmp_path, 90, "--everywhere", path=str(OLDEST)))
    assert result["triton"] == "3.6.0"
    assert result["forgotten"] == []
    assert not [fault for kernel in result["kernels"] for fault in check(kernel)]


def test_all_but_the_bodies_of_kernels_is_typed() -> None:
    """mypy is told to let functions without types pass in trainer/kernels: those that triton compiles, no others."""
    untyped = []
    for path in sorted((ROOT / "trainer" / "kernels").glob("*.py")):
        for found in ast.walk(ast.parse(path.read_text())):
            if not isinstance(found, ast.FunctionDef) or "triton.jit" in map(ast.unparse, found.decorator_list):
                continue
            arguments = [*found.args.posonlyargs, *found.args.args, *found.args.kwonlyargs]
            bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            if bare or found.returns is None:
                untyped.append(f"{path.name}:{found.lineno}: {found.name}")
    assert not untyped

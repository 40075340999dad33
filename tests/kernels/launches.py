"""What is compiled ahead of time: calls of operations, whose kernels are compiled as each launch asks and never run.

    python -m tests.kernels.launches 90 --cases "noise, normal"      # a table; for programs --json

The operation is called as on a GPU, with tensors that nobody writes or reads, so what is compiled is what its own code
launches: its constants, its number of warps, and its sizes and strides with what the JIT knows of them (1, or divisible
by 16). Run it as a process of its own, without TRITON_INTERPRET.
"""

import argparse
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One call, and what is asked of the kernels that it launches."""

    call: Callable[[], Any]
    wide: tuple[str, ...] = ()
    """Kernels that stream: values of 16 bits go to and from memory 128 bits at a time, none on its own."""
    stack: tuple[tuple[str, int, str], ...] = ()
    """(kernel, bytes of local memory a thread, why): no other kernel may have any."""


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16, gradient: bool = True) -> Tensor:
    """A leaf that nobody has written to; channels last where it has four dimensions."""
    if len(shape) == 4:
        batch, channels, height, width = shape
        x = torch.empty((batch, height, width, channels), dtype=dtype).permute(0, 3, 1, 2)
    else:
        x = torch.empty(shape, dtype=dtype)
    return x.requires_grad_(gradient)


def cases() -> dict[str, Case]:
    """By name; the operations are imported here, once the driver is in place."""
    from trainer.kernels import noise

    return {
        "noise, normal": Case(lambda: noise.normal(0, "latent", torch.arange(4), (4, 32, 32), impl="triton")),
        "noise, uniform": Case(lambda: noise.uniform(0, "latent", torch.arange(4), (), impl="triton")),
    }


# ------------------------------------------------------------------------------------------------------- no GPU needed
class Device:
    """The driver of a GPU that is not there: says what it is, and has no memory and no queue."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(wanted: list[str], arch: int) -> list[dict[str, Any]]:
    """Every kernel that the cases launch, once a case: registers, local memory, and accesses by width."""
    import triton
    from triton.runtime.jit import JITFunction

    import trainer.kernels.choose as choose

    triton.runtime.driver.set_active(Device(arch))
    choose.INTERPRETED = True  # tensors of the CPU are taken; what follows never runs a kernel
    run, launched = JITFunction.run, cast(list[tuple[str, Any]], [])

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        launched.append((self.fn.__name__, kernel))
        return kernel

    JITFunction.run = compile_only
    found = []
    for name, case in cases().items():
        if wanted and name not in wanted:
            continue
        launched.clear()
        case.call()
        assert launched, f"{name} launches nothing"
        for kernel_name, kernel in {id(kernel): (title, kernel) for title, kernel in launched}.values():
            found.append({"case": name, "kernel": kernel_name, "arch": arch, **facts(kernel.asm)})
    return found


def forgotten(found: list[dict[str, Any]]) -> list[str]:
    """Kernels of trainer/kernels that no case launches; functions that other kernels call are compiled within them."""
    from triton.runtime.jit import JITFunction

    import trainer.kernels

    names = [module.name for module in pkgutil.iter_modules(trainer.kernels.__path__, "trainer.kernels.")]
    modules = [importlib.import_module(name) for name in names]
    ours = {f.fn for module in modules for f in vars(module).values() if isinstance(f, JITFunction)}
    called = {name for kernel in ours for name in kernel.__code__.co_names}
    return sorted({f.__name__ for f in ours} - called - {str(kernel["kernel"]) for kernel in found})


def facts(asm: dict[str, Any]) -> dict[str, Any]:
    """Of a compiled kernel."""
    usage = resources(asm["cubin"])
    return {
        "registers": usage["REG"],
        "stack": usage["STACK"] + usage["LOCAL"],
        "shared": usage["SHARED"],
        "loads": accesses(asm["ptx"], "ld"),
        "stores": accesses(asm["ptx"], "st"),
    }


def resources(cubin: bytes) -> dict[str, int]:
    """What cuobjdump, which lies in triton's wheel, says of the kernel: registers and bytes."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def accesses(ptx: str, kind: str) -> dict[str, int]:
    """Number of accesses to global memory by bits."""
    pattern = rf"\b{kind}\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\b"
    return dict(Counter(str(int(count or 1) * int(bits)) for count, bits in re.findall(pattern, ptx)))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arch", type=int, nargs="+", help="compute capability, e.g. 80 or 90")
    parser.add_argument("--cases", nargs="+", default=[], help="some of the cases, by name")
    parser.add_argument("--json", action="store_true", help="for programs")
    asked = parser.parse_args(arguments)
    found = [kernel for arch in asked.arch for kernel in compiled(asked.cases, arch)]
    if asked.json:
        import triton

        print(json.dumps({"triton": triton.__version__, "kernels": found, "forgotten": forgotten(found)}))
    else:
        for kernel in found:
            print("  ".join(f"{value}" for value in kernel.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

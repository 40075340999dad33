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
    everywhere: bool = False
    """Compiled for every architecture and by every triton: at least one case of each kernel. The others, its variants,
    for one architecture."""


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
    from trainer.kernels.group_norm_silu import group_norm_silu
    from trainer.kernels.logistic_mixture import logistic_mixture_nll
    from trainer.kernels.lpips_head import lpips_head
    from trainer.kernels.reconstruction import bernoulli_nll, charbonnier_nll, gaussian_nll, laplace_nll
    from trainer.kernels.reparameterize import reparameterize_kl

    def normalise(x: Tensor, groups: int = 32) -> None:
        weight, bias = (empty(x.shape[1], dtype=torch.float32) for _ in range(2))
        y = group_norm_silu(x, groups, weight, bias, 1e-6, impl="triton")
        y.backward(torch.empty_like(y))

    def reconstruct(nll: Callable[..., Tensor], given: Tensor, image: Tensor, *more: Tensor, **named: Any) -> None:
        nats = nll(given, image, *more, impl="triton", **named)
        nats.backward(torch.empty_like(nats))

    densities = ("_density_nll", "_density_nll_backward")
    prediction, image = empty(8, 3, 256, 256), empty(8, 3, 256, 256, gradient=False)
    log_scale, contiguous = empty(8, dtype=torch.float32), image.contiguous().requires_grad_()

    def compare(*channels: int, dtype: torch.dtype = torch.bfloat16, last: bool = True, both: bool = False) -> None:
        sizes = [(8, c, 64 >> number, 60 >> number) for number, c in enumerate(channels)]
        a, b = ([empty(*size, dtype=dtype, gradient=grad) for size in sizes] for grad in (True, both))
        if not last:
            a, b = ([x.detach().contiguous().requires_grad_(x.requires_grad) for x in maps] for maps in (a, b))
        weights = [empty(1, c, 1, 1, dtype=torch.float32, gradient=False) for c in channels]
        lpips_head(a, b, weights, impl="triton").sum().backward()

    comparing = ("_distances", "_gradients")

    def sample(moments: Tensor) -> None:
        z, kl = reparameterize_kl(moments, noise.address(0, "posterior", torch.arange(len(moments))), impl="triton")
        torch.autograd.backward((z, kl), (torch.empty_like(z), torch.empty_like(kl)))

    sampling = ("_sample_kl", "_sample_kl_backward")
    normalising = ("_statistics", "_activate", "_sums", "_gradient")
    return {
        "group norm, C = 128": Case(lambda: normalise(empty(8, 128, 256, 256)), wide=normalising, everywhere=True),
        "group norm, C = 512": Case(lambda: normalise(empty(8, 512, 64, 64)), wide=normalising, everywhere=True),
        "group norm, C = 512, odd": Case(lambda: normalise(empty(3, 512, 7, 5)), wide=normalising),
        "group norm, C = 64 in 8": Case(lambda: normalise(empty(8, 64, 64, 64), groups=8), wide=normalising),
        "group norm, C = 1024": Case(lambda: normalise(empty(8, 1024, 16, 16)), wide=normalising),
        "group norm, NCHW": Case(
            lambda: normalise(torch.empty(8, 128, 256, 256, dtype=torch.bfloat16).requires_grad_()), wide=normalising
        ),
        "group norm, float32": Case(lambda: normalise(empty(8, 256, 128, 128, dtype=torch.float32)), wide=normalising),
        "laplace": Case(lambda: reconstruct(laplace_nll, prediction, image), wide=densities, everywhere=True),
        "laplace, NCHW": Case(lambda: reconstruct(laplace_nll, contiguous, image), wide=densities),
        "laplace, 28 x 28": Case(
            lambda: reconstruct(laplace_nll, empty(64, 1, 28, 28), empty(64, 1, 28, 28, gradient=False)), wide=densities
        ),
        "gaussian, learned scale": Case(
            lambda: reconstruct(gaussian_nll, prediction, image, log_scale), wide=densities
        ),
        "charbonnier, learned scale": Case(
            lambda: reconstruct(charbonnier_nll, prediction, image, log_scale, softness=1e-3), wide=densities
        ),
        "bernoulli": Case(lambda: reconstruct(bernoulli_nll, prediction, image), wide=densities),
        "logistic mixture, K = 10, C = 3": Case(
            lambda: reconstruct(
                logistic_mixture_nll, empty(8, 70, 64, 64), empty(8, 3, 64, 64, gradient=False), components=10
            ),
            everywhere=True,
        ),
        "logistic mixture, K = 5, C = 1, NCHW": Case(
            lambda: reconstruct(
                logistic_mixture_nll,
                torch.empty(8, 15, 32, 32).requires_grad_(),
                empty(8, 1, 32, 32, gradient=False),
                components=5,
            )
        ),
        "lpips head, VGG16": Case(lambda: compare(64, 128, 256, 512, 1024), wide=comparing, everywhere=True),
        "lpips head, EfficientNet-Lite0": Case(lambda: compare(16, 24, 40, 112), wide=comparing),
        "lpips head, both": Case(lambda: compare(64, 512, 40, both=True), wide=comparing),
        "lpips head, NCHW": Case(lambda: compare(64, 512, last=False), wide=comparing),
        "lpips head, float32": Case(lambda: compare(64, 40, 512, dtype=torch.float32, both=True), wide=comparing),
        "reparameterize, z = 16": Case(lambda: sample(empty(8, 32, 32, 32)), wide=sampling),
        # a pixel's means are 64 bits
        "reparameterize, z = 4": Case(lambda: sample(empty(8, 8, 32, 32)), everywhere=True),
        "reparameterize, z = 16, odd": Case(lambda: sample(empty(8, 32, 7, 7))),
        "reparameterize, NCHW": Case(
            lambda: sample(torch.empty(8, 8, 32, 32, dtype=torch.bfloat16).requires_grad_()), wide=sampling
        ),
        "reparameterize, vector": Case(lambda: sample(empty(8, 128)), wide=sampling, everywhere=True),
        "noise, normal": Case(
            lambda: noise.normal(0, "latent", torch.arange(4), (4, 32, 32), impl="triton"), everywhere=True
        ),
        "noise, uniform": Case(lambda: noise.uniform(0, "latent", torch.arange(4), (), impl="triton"), everywhere=True),
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


def compiled(wanted: list[str], arch: int, *, everywhere: bool = False) -> list[dict[str, Any]]:
    """Every kernel that the cases launch, once a case: registers, local memory, and accesses by width. wanted: by name,
    none for all; everywhere: of those the ones that say so."""
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
        if (wanted and name not in wanted) or (everywhere and not case.everywhere):
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
    parser.add_argument("--everywhere", action="store_true", help="of those the ones for every architecture")
    parser.add_argument("--json", action="store_true", help="for programs")
    asked = parser.parse_args(arguments)
    found = [kernel for arch in asked.arch for kernel in compiled(asked.cases, arch, everywhere=asked.everywhere)]
    if asked.json:
        import triton

        print(json.dumps({"triton": triton.__version__, "kernels": found, "forgotten": forgotten(found)}))
    else:
        for kernel in found:
            print("  ".join(f"{value}" for value in kernel.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

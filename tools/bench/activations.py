"""Memory and bytes of a training step, counted without a GPU, with the kernels and without.

    python -m tools.bench.activations                               # the f8 autoencoder at 256 px, batch 8, bf16
    python -m tools.bench.activations vaegan_fashion --impls eager,triton
    python -m tools.bench.activations kl_f8_256 batch=16 method.autoencoder.recompute=true --lpips

Tensors are fake: the real step runs on shapes and dtypes, nothing is computed and no kernel is launched. plain is the
code that people have under CUDA's autocast, whose GroupNorm and SiLU are float32; eager and triton are trainer/kernels.
Counted are the storages that live at once, and what each operation reads and writes, a tensor once an operation (a
normalisation's input twice: statistics come first). Not counted: what cuDNN takes to work in, and what an allocator
loses between blocks. Gradients wait for the update, as in a run: a second update is the one that is counted.
"""

import argparse
import contextlib
import functools
import json
import sys
import tempfile
import warnings
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tools.bench import models, own, turns
from trainer import build
from trainer.config import Config
from trainer.data import Batch
from trainer.errors import boundary
from trainer.kernels import choose
from trainer.kernels.choose import preferred
from trainer.losses import reconstruction
from trainer.losses.perceptual import Perceptual
from trainer.networks.blocks import GroupNormSiLU, Residual
from trainer.networks.kl_autoencoder import Attention, ResnetBlock
from trainer.parallel import engines as all_engines
from trainer.parallel.ddp import DDPEngine
from trainer.parallel.engine import Applied
from trainer.phase import Run
from trainer.step import train_step

IMPLS = ("plain", "eager", "triton")
NORM, CONVOLUTION, LOSSES, HEAD, WEIGHTS = (
    "norm + activation", "convolutions", "losses", "perceptual head", "weights, moments, average",
)  # fmt: skip
PARTS: tuple[tuple[type[nn.Module], str], ...] = (
    (GroupNormSiLU, NORM),
    (nn.GroupNorm, NORM),
    (nn.SiLU, NORM),
    (nn.LeakyReLU, NORM),
    (nn.Conv2d, CONVOLUTION),
    (Attention, "attention"),
    (ResnetBlock, "residual adds"),
    (Residual, "residual adds"),
)
"""What an operation counts as, by the innermost module that it runs in."""
TWICE = ("native_group_norm", "group_norm_silu", "group_norm")
"""Operations, by parts of their names, that read their first input twice, and their backward its gradient too."""
NOTHING = ("empty", "empty_like", "empty_strided", "new_empty", "detach", "alias")


class Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages that operations made and that still live, by part at their peak, and bytes moved."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive: dict[int, tuple[int, str]] = {}
        self.now = self.peak = 0
        self.at_peak: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()
        self.running: list[str] = []

    def hold(self, tensors: Iterable[Any], part: str) -> None:
        """Counts tensors for as long as their memory lives."""
        for tensor in tensors:
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self.alive:
                self.alive[key] = (size, part)
                self.now += size
                weakref.finalize(storage, self._gone, key)
        if self.now > self.peak:
            self.peak = self.now
            self.at_peak = Counter()
            for size, name in self.alive.values():
                self.at_peak[name] += size

    def _gone(self, key: int) -> None:
        self.now -= self.alive.pop(key)[0]

    def restart(self) -> None:
        """Forgets peak and bytes moved; what lives is still known."""
        self.peak, self.moved = 0, Counter()

    def part(self) -> str:
        """Whose operation runs: in a backward, of the forward that it belongs to."""
        node = torch._C._current_autograd_node()
        if node is not None:
            return str(node.metadata.get("part", LOSSES))
        return self.running[-1] if self.running else LOSSES

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        part, made = self.part(), tree_leaves(out)
        self.moved[part] += _moved(func, tree_leaves((args, kwargs)), made)
        self.hold(made, part)
        return out


def _moved(func: Any, given: list[Any], made: list[Any]) -> int:
    kind, _, name = func._schema.name.partition("::")
    views = [r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns]
    if kind == "prim" or name in NOTHING or any(views):
        return 0
    inputs = [tensor for tensor in given if isinstance(tensor, Tensor)]
    size = sum(map(_bytes, inputs)) + sum(_bytes(t) for t in made if isinstance(t, Tensor))
    if any(word in name for word in TWICE):
        largest = max(map(_bytes, inputs), default=0)
        size += largest * (2 if "backward" in name else 1)
    return size


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# ---------------------------------------------------------------------------------------------- whose operation it is
@contextlib.contextmanager
def attributed(storages: Storages, distance: Perceptual | None) -> Iterator[None]:
    """Operations inside are counted as those of the module that they run in, and their backward too."""

    def enter(module: nn.Module, inputs: Any) -> None:
        part = next((name for kind, name in PARTS if isinstance(module, kind)), None)
        inside = storages.running[-1] if storages.running else LOSSES
        if distance is not None and module is distance.network:
            part = "feature network"
        elif inside == "feature network":
            part = inside
        storages.running.append(part or (inside if inside != HEAD else LOSSES))

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        _label(output, inputs, storages.running.pop())

    with contextlib.ExitStack() as stack:
        for hook in (
            nn.modules.module.register_module_forward_pre_hook(enter),
            nn.modules.module.register_module_forward_hook(leave, always_call=True),
        ):
            stack.callback(hook.remove)
        if distance is not None:
            true = distance.distance

            def told(x: Tensor, y: Tensor) -> Tensor:
                storages.running.append(HEAD)
                out = true(x, y)
                _label(out, (x, y), storages.running.pop())
                return out

            stack.enter_context(mock.patch.object(distance, "distance", told))
        yield


def _label(output: Any, inputs: Any, part: str) -> None:
    """Tells the graph between inputs and output whose it is, where nobody inside has."""
    ends = {id(t.grad_fn) for t in tree_leaves(inputs) if isinstance(t, Tensor)}
    waiting = [t.grad_fn for t in tree_leaves(output) if isinstance(t, Tensor) and t.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in ends or "part" in node.metadata:
            continue
        node.metadata["part"] = part
        waiting += [other for other, _ in node.next_functions]


# ---------------------------------------------------------------------------------------------- a step of no numbers
class _Engine(DDPEngine):
    """Without the look for what is not finite, which asks for a number."""

    @torch.no_grad()
    def step(self, images: int, *, batch: int) -> Applied:
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            torch._foreach_lerp_(self._averages, self.live, 0.5)
        return Applied(torch.ones(()), torch.ones(()))


class _Run(Run):
    """Noise of the right shape."""

    def _draw(self, kind: str, stream: str, shape: tuple[int, ...]) -> Tensor:
        return torch.empty((len(self.batch.image), *shape))


def _fake(module: nn.Module) -> None:
    """Puts tensors without numbers, on the CPU, into the places of the module's; inside a FakeTensorMode."""
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, old in table.items():
                if old is None:
                    continue
                layout = torch.channels_last if old.dim() == 4 else torch.contiguous_format
                new = torch.empty(old.shape, dtype=old.dtype, device="cpu", memory_format=layout)
                parameter = isinstance(old, nn.Parameter)
                table[name] = nn.Parameter(new, requires_grad=old.requires_grad) if parameter else new


def _plain_norm(self: nn.GroupNorm, x: Tensor) -> Tensor:
    """What CUDA's autocast makes of it, on any device."""
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return functional.group_norm(wide, self.num_groups, self.weight, self.bias, self.eps)


def _plain_pair(self: nn.GroupNorm, x: Tensor) -> Tensor:
    return functional.silu(_plain_norm(self, x))


@contextlib.contextmanager
def taking(impl: str) -> Iterator[None]:
    """Operations inside are those of `impl`, one of IMPLS; kernels are chosen, and never launched."""
    with contextlib.ExitStack() as stack:
        if impl == "triton":
            stack.enter_context(mock.patch.object(choose, "LACKING", None))
            stack.enter_context(mock.patch.object(choose, "INTERPRETED", True))
        if impl == "plain":
            stack.enter_context(mock.patch.object(nn.GroupNorm, "forward", _plain_norm))
            stack.enter_context(mock.patch.object(GroupNormSiLU, "forward", _plain_pair))
        stack.enter_context(preferred("triton" if impl == "triton" else "eager"))
        yield


def _forget() -> None:
    """What functions of trainer/ keep from call to call: tensors without numbers may be among it."""
    for name, module in list(sys.modules.items()):
        if name.startswith("trainer."):
            for value in vars(module).values():
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()


def count(config: Config, impl: str, *, updates: int = 2) -> dict[str, Any]:
    """Figures of the last of `updates` updates, in bytes."""
    method = build.build_method(config, device=torch.device("cpu"))
    with torch.device("meta"):
        networks = method.networks()
    distance: Perceptual | None = getattr(method, "perceptual", None)
    storages = Storages()
    with contextlib.ExitStack() as stack:
        stack.callback(_forget)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of addresses that fake tensors do not have
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        for module in (*networks.values(), *([] if distance is None else [distance])):
            _fake(module)
        stack.enter_context(mock.patch.object(nn.Module, "to", lambda self, *args, **kwargs: self))
        stack.enter_context(mock.patch.object(all_engines, "DDPEngine", _Engine))
        stack.enter_context(mock.patch.object(reconstruction, "check_targets", lambda image: None))
        ranks = own.alone(torch.device("cpu"))
        stack.enter_context(preferred("auto"))  # restores what the next line prefers
        engines = build.build_engines(config, method, networks, ranks)
        stack.enter_context(taking(impl))
        run = _Run(engines, seed=0, balance=method.balance, precision=config.precision)
        position = torch.zeros(config.batch, dtype=torch.int64)
        for engine in engines.values():
            for module in (engine.network, engine.evaluated()):
                storages.hold((*module.parameters(), *module.buffers()), WEIGHTS)
        if distance is not None:
            storages.hold((*distance.parameters(), *distance.buffers()), WEIGHTS)
        stack.enter_context(attributed(storages, distance))
        stack.enter_context(storages)
        for _ in range(updates):
            storages.restart()
            image = torch.empty((config.batch, *build.image_shape(config)))
            given = Batch(image, position, position, position, torch.empty(config.batch))
            train_step(method, engines, [given], run, images=0, batch=config.batch, ranks=ranks)
            run.kept.clear()
            for engine in engines.values():
                for state in engine.optimizer.state.values():  # type: ignore[attr-defined]
                    for tensor in tree_leaves(state):
                        if isinstance(tensor, Tensor):
                            key = tensor.untyped_storage()._cdata
                            storages.alive[key] = (storages.alive[key][0], WEIGHTS)
    return {
        "impl": impl,
        "peak": storages.peak,
        "held": storages.now,
        "at_peak": dict(storages.at_peak.most_common()),
        "moved": sum(storages.moved.values()),
        "moved_by": dict(storages.moved.most_common()),
    }


# ---------------------------------------------------------------------------------------------- command
def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.activations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", nargs="?", default="kl_f8_256", help=f"of {','.join(models.SHIPPED)}")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="(default, of kl_f8_256: batch=8)")
    parser.add_argument("--impls", type=turns.names(IMPLS), default=list(IMPLS), metavar="A,B", help=",".join(IMPLS))
    parser.add_argument("--lpips", action="store_true", help="with LPIPS on VGG16, of random weights")
    parser.add_argument("--out", type=turns.new_file, metavar="FILE", help="write the figures as JSON too")
    given = parser.parse_args(argv)
    if given.config not in models.SHIPPED:
        parser.error(f"config: {given.config!r} is none of {', '.join(models.SHIPPED)}")
    return given


def describe(rows: list[dict[str, Any]]) -> None:
    unit, name = (1e9, "GB") if rows[0]["peak"] > 1e9 else (1e6, "MB")
    print(f"{name:30}" + "".join(f"{row['impl']:>18}" for row in rows))
    for title, key, parts in (
        ("at the peak", "peak", "at_peak"),
        ("between updates", "held", ""),
        ("moved in an update", "moved", "moved_by"),
    ):
        print(f"{title:30}" + "".join(f"{row[key] / unit:11.2f}{'':7}" for row in rows))
        for part in _parts(rows, parts) if parts else []:
            cells = [(row[parts].get(part, 0), row[key]) for row in rows]
            print(f"  {part:28}" + "".join(f"{size / unit:11.2f} {size / total:6.1%}" for size, total in cells))


def _parts(rows: list[dict[str, Any]], key: str) -> list[str]:
    every: Counter[str] = Counter()
    for row in rows:
        every.update(row[key])
    return [name for name, size in every.most_common() if size >= 0.001 * max(every.values())]


def main(argv: list[str]) -> int:
    given = parse(argv)
    with tempfile.TemporaryDirectory(prefix="tandem-activations-") as folder:
        overrides = ["batch=8", *given.overrides] if given.config == "kl_f8_256" else given.overrides
        if given.lpips:
            path = models.random_lpips(Path(folder))
            overrides = [*overrides, f"method.perceptual={{kind: lpips_vgg, path: {path}}}"]
        config = models.shipped(given.config, *overrides)
        print(f"{given.config}: {config.data.size} px, batch {config.batch}, {config.precision}; nothing is computed")
        rows = [count(config, impl) for impl in given.impls]
    describe(rows)
    if given.out is not None:
        where = turns.where(["python -m tools.bench.activations", *argv], ("torch",))
        size = {"config": given.config, "size": config.data.size, "batch": config.batch, "precision": config.precision}
        given.out.write_text(json.dumps({**where, **size, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(boundary(main, sys.argv[1:]))

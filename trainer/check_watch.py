"""What `tandem check` sees of the updates that it takes: operations, what autograd keeps, forwards of each network."""

import dataclasses
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from trainer import build, optimizer
from trainer.config import Config
from trainer.data import Batch
from trainer.losses.balance import Balance
from trainer.methods import Method
from trainer.networks.blocks import Body
from trainer.parallel.config import DDPConfig
from trainer.parallel.costs import Network, Passes
from trainer.parallel.engine import Engine
from trainer.parallel.ranks import Ranks
from trainer.phase import Outputs, Run
from trainer.step import train_step


class SavedBytes:
    """Bytes of the tensors that autograd keeps for backward, each storage once, at their peak."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._known = {p.untyped_storage().data_ptr() for p in parameters}
        self._alive: Counter[int] = Counter()
        self._bytes = 0
        self.peak = 0

    def pack(self, tensor: Tensor) -> "_Kept":
        return _Kept(self, tensor)

    def unpack(self, kept: "_Kept") -> Tensor:
        return kept.tensor

    def hold(self, tensor: Tensor) -> None:
        """Counts a tensor for as long as its memory lives."""
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        self.add(key, size, 1)
        weakref.finalize(storage, self.add, key, size, -1)

    def add(self, key: int, size: int, times: int) -> None:
        """times: 1 for a tensor that begins to be kept, -1 for one that is let go."""
        if key in self._known:
            return
        before = self._alive[key] > 0
        self._alive[key] += times
        self._bytes += size * ((self._alive[key] > 0) - before)
        self.peak = max(self.peak, self._bytes)


class _Kept:
    """What autograd holds for a saved tensor; it goes when the graph does, whether it was used or not."""

    def __init__(self, saved: SavedBytes, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.saved, self.tensor, self.key, self.size = saved, tensor, storage.data_ptr(), storage.nbytes()
        saved.add(self.key, self.size, 1)

    def __del__(self) -> None:
        self.saved.add(self.key, self.size, -1)


class Flops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operations of the matrix products and convolutions inside, by torch's formulas; a product is two.

    torch's own FlopCounterMode follows modules with hooks that an autograd.grad at a module's input refuses.

    again: counts what is computed again during backward (activation checkpointing), which no hook for saved tensors
    sees: the hooks there are the checkpoint's own."""

    def __init__(self, *, again: SavedBytes | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total, self.again = 0, again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        if self.again is not None and torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1:
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, Tensor):
                    self.again.hold(tensor)
        return out


class Forward(NamedTuple):
    phase: str
    graph: bool
    """Whether it can be traversed backward."""


class WatchedRun(Run):
    """A run that counts the forwards of each network, as stage 3 of ZeRO gathers weights for them."""

    def __init__(self, engines: Mapping[str, Engine], *, seed: int, balance: Balance, precision: str) -> None:
        super().__init__(engines, seed=seed, balance=balance, precision=precision)
        self._exact = False
        self.clear()
        for name, engine in engines.items():
            last = [module for module in engine.network.modules() if next(module.parameters(False), None) is not None]
            last[-1].register_forward_hook(self._watch(name))

    def clear(self) -> None:
        """Before an update."""
        self.forwards: dict[str, list[Forward]] = {name: [] for name in self.engines}
        self.exact: Counter[str] = Counter()

    def _watch(self, name: str) -> Any:
        def seen(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if not self._exact:
                self.forwards[name].append(Forward(self.phase, output.requires_grad))

        return seen

    def _through(self, name: str, call: Any, inputs: tuple[Any, ...], exact: bool) -> Outputs:
        self.exact[name] += exact
        self._exact = exact
        found = super()._through(name, call, inputs, exact)
        self._exact = False
        return found

    def passes(self, name: str, *, first: tuple[str, ...]) -> Passes:
        """Of the update since `clear`. first: the phases of a run's first update."""
        seen = self.forwards[name]
        opening = [forward for forward in seen if forward.phase in first]
        return Passes(
            graph=sum(forward.graph for forward in seen),
            plain=sum(not forward.graph for forward in seen),
            exact=self.exact[name],
            plain_first=bool(opening) and not opening[0].graph,
        )


@dataclass(frozen=True)
class Watched:
    """Two updates of one rank's share, taken on one process without DeepSpeed: its networks, losses and activations are
    the same under every backend."""

    engines: dict[str, Engine]
    run: WatchedRun
    operations: list[int]
    """Of each update."""
    networks: list[dict[str, Network]]
    """As each update used them."""
    activations: int
    """Bytes that autograd keeps, at their peak."""


def watch(
    config: Config,
    method: Method,
    networks: Mapping[str, nn.Module],
    ranks: Ranks,
    batches: Iterator[Batch],
    *,
    world: int,
    images: int,
) -> Watched:
    """batches: shares of one rank of `world`; images: seen before the first update."""
    plain, micro_batches = one_process(config), config.micro_batches(world)
    engines = build.build_engines(plain, method, networks, ranks)
    run = WatchedRun(engines, seed=config.seed, balance=method.balance, precision=plain.precision)
    saved = SavedBytes([p for network in networks.values() for p in network.parameters()])
    again = any(module.recompute for n in networks.values() for module in n.modules() if isinstance(module, Body))
    operations, seen = list[int](), list[dict[str, Network]]()
    for _ in range(2):
        parts = build.split(next(batches), micro_batches)
        run.clear()
        with Flops(again=saved if again else None) as flops, saved_tensors_hooks(saved.pack, saved.unpack):
            train_step(method, engines, parts, run, images=images, batch=config.batch, ranks=ranks)
        operations.append(flops.total)
        seen.append(
            {name: _network(name, engine, run, config, method, micro_batches) for name, engine in engines.items()}
        )
        images += config.batch
    return Watched(engines, run, operations, seen, saved.peak)


def one_process(config: Config) -> Config:
    """As one process without DeepSpeed takes it, nothing compiled, which would not be seen; float16 needs DeepSpeed's
    loss scale, so bfloat16 stands in for it."""
    precision = "bf16" if config.precision == "fp16" else config.precision
    impl = "eager" if config.impl == "compiled" else config.impl
    return dataclasses.replace(config, parallel=DDPConfig(), precision=precision, compile=False, impl=impl)


def _network(name: str, engine: Engine, run: WatchedRun, config: Config, method: Method, micro_batches: int) -> Network:
    """What the last update tells of a network's costs."""
    optim = optimizer.resolve(config.optim, network=name, total=config.images)
    return Network(
        sizes=tuple(p.numel() for p in engine.network.parameters()),
        averaged=engine.averaged,
        moments=2 if config.optim.algorithm != "sgd" else int(optim.betas[0] > 0),
        passes=run.passes(name, first=method.phases(0)),
        micro_batches=micro_batches,
    )

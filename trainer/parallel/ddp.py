"""One network under one process or DistributedDataParallel, made through Accelerate."""

import contextlib
import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from trainer import optimizer
from trainer.kernels.choose import differentiated_twice
from trainer.parallel import accelerated
from trainer.parallel.checksum import checksum
from trainer.parallel.engine import Applied
from trainer.parallel.ranks import Ranks
from trainer.resume import match

T = TypeVar("T")

# a head with one output has a weight (1, n) whose two strides mean the same memory; DDP copies it and says so on
# every run
warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")


class DDPEngine:
    """See `Engine`. Gradients are averaged over ranks by DDP; each rank hands over those of its own mean.

    Buffers are not exchanged during training: DDP would broadcast them in the middle of a step (which breaks two passes
    before one backward, pytorch#175024). Each rank's follow its own data; `export` stores their mean over ranks.
    """

    scale = 1.0
    floor = None

    def __init__(
        self, network: nn.Module, *, optim: optimizer.NetworkOptim, ranks: Ranks, average: bool, compiled: bool
    ) -> None:
        network.to(device=ranks.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        names = [name for name, _ in network.named_buffers()]
        ignore = nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        ignore(network, names)  # type: ignore[no-untyped-call]
        self.average: nn.Module | None = None
        if average and optim.config.ema_half_life > 0:
            self.average = copy.deepcopy(network).requires_grad_(False).eval()
            self._averages: list[Tensor] = list(self.average.parameters())
            # walking the modules in every step costs as much as averaging the weights of a small network
            self.buffered = next(network.buffers(), None) is not None
        if compiled:
            network.compile()  # in place: the names in a checkpoint stay those of the bare network
        self.network, self.optim, self.ranks = network, optim, ranks
        self.wrapped = accelerated.wrap(network, ranks)
        self.names = [name for name, _ in network.named_parameters()]
        self.parameters = list(network.parameters())
        self.live: list[Tensor] = list(self.parameters)
        self.optimizer = optimizer.build(self.parameters, optim)

    def _sync(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if last or self.ranks.world == 1 else self.wrapped.no_sync()

    def run(self, call: Callable[[Any], T], *, last: bool, eager: bool = False) -> T:
        with self._sync(last), differentiated_twice() if eager else contextlib.nullcontext():
            return call(self.wrapped)

    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor], *, last: bool) -> None:
        with self._sync(last):
            torch.autograd.backward(outputs, [g.to(out.dtype) for out, g in zip(outputs, gradients, strict=True)])

    def rate(self, images: int) -> float:
        return self.optim.rate(images)

    @torch.no_grad()
    def step(self, images: int, *, batch: int) -> Applied:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = _norm(gradients)
        skipped = (norm - norm).nan_to_num_(nan=1.0)  # inf - inf and nan - nan are nan; anything finite gives 0
        # what torch's fused optimisers read from a GradScaler: a skipped update then waits for no device; on the CPU,
        # where nothing is waited for, they are spared it
        spared = skipped.device.type == "cpu" and not skipped
        self.optimizer.found_inf = None if spared else skipped  # type: ignore[attr-defined]
        if self.optim.clip is not None:
            self.optimizer.grad_scale = (norm / self.optim.clip).clamp_(min=1.0)  # type: ignore[attr-defined]
        self.optimizer.param_groups[0]["lr"] = self.optim.rate(images)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            keep = self.optim.ema_decay(images, batch=batch)
            torch._foreach_lerp_(self._averages, self.live, 1.0 - keep)
            if self.buffered:
                self._follow_buffers(self.average)
        return Applied(applied=1.0 - skipped, norm=norm)

    @property
    def averaged(self) -> bool:
        return self.average is not None

    @property
    def state(self) -> Mapping[str, Tensor]:
        return dict(self.network.state_dict())

    def evaluated(self) -> nn.Module:
        return self.network if self.average is None else self.average

    def export(self) -> dict[str, dict[str, Tensor]]:
        self._settle_buffers()
        found = {"": _state(self.network), "optimizer": optimizer.export_state(self.optimizer, self.names)}
        if self.average is not None:
            found["ema"] = _state(self.average)
        return found

    def load(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        targets = {"": self.network} | ({"ema": self.average} if self.average is not None else {})
        for key, module in targets.items():
            state = module.state_dict()
            match(state, tensors.get(key, {}), what=f"network weights{f' ({key})' if key else ''}")
            with torch.no_grad():
                for name, tensor in state.items():
                    tensor.copy_(tensors[key][name])
        optimizer.load_state(self.optimizer, self.names, dict(tensors.get("optimizer", {})))

    def _settle_buffers(self) -> None:
        self.ranks.settle(self.network.buffers())
        if self.average is not None:
            self._follow_buffers(self.average)

    def checksum(self) -> int | None:
        return checksum(self.network.parameters())

    def _follow_buffers(self, average: nn.Module) -> None:
        # looked up each time: wrapping, and some forwards, put new tensors in the place of the old ones
        for mine, live in zip(average.buffers(), self.network.buffers(), strict=True):
            mine.copy_(live)


def _norm(gradients: list[Tensor]) -> Tensor:
    """Norm of all gradients as one vector."""
    if gradients[0].device.type == "cpu":  # has no foreach kernel for norms: one copy is faster than a call a tensor
        parts = torch._C._nn.flatten_dense_tensors(gradients)
    else:
        parts = torch.stack(torch._foreach_norm(gradients))
    norm: Tensor = torch.linalg.vector_norm(parts)
    return norm


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in module.state_dict().items()}

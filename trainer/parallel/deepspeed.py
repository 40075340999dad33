"""One network under DeepSpeed's ZeRO 1, 2 or 3, made through Accelerate. See README.md for what it costs and why."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from trainer import optimizer
from trainer.kernels.choose import differentiated_twice
from trainer.parallel import accelerated
from trainer.parallel.checksum import checksum
from trainer.parallel.config import DeepSpeedConfig
from trainer.parallel.engine import Applied
from trainer.parallel.ranks import Ranks
from trainer.parallel.shards import layout
from trainer.resume import match

T = TypeVar("T")
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # of DeepSpeed's dynamic loss scaler


class DeepSpeedEngine:
    """See `Engine`. Nobody calls DeepSpeed's own forward: its hooks would take any gradient that passes the outputs,
    another network's or a penalty's, for the backward of this network. The bare module is run, and its outputs'
    gradients are handed over.

    Masters, moments and average are flat float32 shards of this rank (`shards.py`); clipping, the finite check and the
    loss scale of fp16 are DeepSpeed's.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        *,
        config: DeepSpeedConfig,
        optim: optimizer.NetworkOptim,
        ranks: Ranks,
        average: bool,
        compiled: bool,
    ) -> None:
        from deepspeed.accelerator import get_accelerator

        if config.weights == "fp16" and not get_accelerator().is_fp16_supported():
            raise ValueError("parallel.weights: fp16 is not supported by this device; take bf16, with precision: bf16")
        self.optim, self.ranks, self.stage = optim, ranks, config.stage_of(name)
        self.plain = copy.deepcopy(network).to("meta")  # without the hooks of stage 3
        network.to(device=ranks.device)
        base = optimizer.build(list(network.parameters()), optim)
        self.engine = accelerated.prepare(name, network, base, config=config, clip=optim.clip, ranks=ranks)
        self.network: nn.Module = self.engine.module
        if compiled:
            self.network.compile()
        self.zero = self.engine.optimizer
        self.base: torch.optim.Optimizer = self.zero.optimizer
        self.masters: list[Tensor] = (
            self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups
        )
        self.layout = layout(self.network, self.zero, stage=self.stage, ranks=ranks)
        optimizer.restart(self.base, self.masters, optim)
        self.averaged = average and optim.config.ema_half_life > 0
        self.averages = [master.detach().clone() for master in self.masters] if self.averaged else []
        self.half = config.weights != "fp32"
        self.dynamic = bool(self.zero.dynamic_loss_scale)
        if self.dynamic:
            self.zero.loss_scaler.raise_error_at_min_scale = False  # health.NonFinite ends such a run, on all backends
            # it would raise the scale before it divides the gradient by it, and halve that update: `step` does it after
            self._rescale, self.zero._update_scale = self.zero._update_scale, lambda overflow: None
        self._handed: list[Tensor] | None = None

    @property
    def state(self) -> Mapping[str, Tensor]:
        return dict(self.plain.state_dict())

    @property
    def scale(self) -> float:
        return float(self.zero.loss_scale)

    @property
    def floor(self) -> float | None:
        return float(self.zero.loss_scaler.min_scale) if self.dynamic else None

    # ------------------------------------------------------------------ the step
    def run(self, call: Callable[[Any], T], *, last: bool, eager: bool = False) -> T:
        if not eager:
            return call(self.network)
        with differentiated_twice():
            if self.stage == 3:
                return call(self._whole())
            if self.half:  # float32 for what half precision would spoil; gradients reach the weights through the cast
                weights = {name: parameter.float() for name, parameter in self.network.named_parameters()}
                return call(lambda *inputs: functional_call(self.network, weights, inputs))
            return call(self.network)

    def _whole(self) -> Callable[..., Any]:
        """The network on whole weights of our own: stage 3 frees its own before a second backward (of a penalty's
        gradient) reaches them. It costs the network's weights and gradients on each rank, for this phase."""
        with self._gathered() as parameters:
            weights = {name: p.detach().float().clone().requires_grad_() for name, p in parameters.items()}
        self._handed = list(weights.values())
        state = weights | dict(self.network.named_buffers())
        return lambda *inputs: functional_call(self.plain, state, inputs)

    @contextlib.contextmanager
    def _gathered(self) -> Iterator[dict[str, nn.Parameter]]:
        import deepspeed

        parameters = dict(self.network.named_parameters())
        with deepspeed.zero.GatheredParameters(list(parameters.values())):
            yield parameters

    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor], *, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.zero.clear_backward_seen_flag()  # as its forward does, or stage 3 forgets all micro-batches but the last
        if self._handed is None:
            self.engine.backward(_hand_over(outputs, gradients))
        else:
            found = torch.autograd.grad(outputs, self._handed, gradients, allow_unused=True)
            self._handed = None
            with self._gathered() as parameters:
                pairs = [(p, g) for p, g in zip(parameters.values(), found, strict=True) if g is not None]
                self.engine.backward(_hand_over([p for p, _ in pairs], [g for _, g in pairs]))
        if not last:
            self.engine.step()  # counts the micro-batch

    def rate(self, images: int) -> float:
        return self.optim.rate(images)

    @torch.no_grad()
    def step(self, images: int, *, batch: int) -> Applied:
        for group in self.base.param_groups:
            group["lr"] = self.optim.rate(images)
        self.engine.step()
        if self.dynamic:
            self._rescale(self.zero.overflow)
        if self.averaged:
            torch._foreach_lerp_(self.averages, self.masters, 1.0 - self.optim.ema_decay(images, batch=batch))
        device = self.ranks.device
        norm = torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32, device=device)
        return Applied(applied=torch.tensor(float(self.engine.was_step_applied()), device=device), norm=norm)

    # ------------------------------------------------------------------ whole tensors
    def evaluated(self) -> nn.Module:
        if not self.averaged and self.stage < 3 and not self.half:
            return self.network
        whole = self.layout.whole(self.averages or self.masters, self.ranks, everywhere=True)
        found = copy.deepcopy(self.plain).to_empty(device=self.ranks.device).requires_grad_(False).eval()
        found.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for name, parameter in found.named_parameters():
            parameter.copy_(whole[name])
        for buffer, live in zip(found.buffers(), self.network.buffers(), strict=True):
            buffer.copy_(live)
        return found

    def export(self) -> dict[str, dict[str, Tensor]]:
        buffers = self._settled_buffers()
        found = {"": self._export(self.masters) | buffers, "optimizer": self._export_optimizer()}
        if self.averaged:
            found["ema"] = self._export(self.averages) | buffers
        found["scaler"] = self._scaler()
        return found if self.ranks.rank == 0 else {}

    def load(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        expected = self.plain.state_dict()
        for key, flats in {"": self.masters, "ema": self.averages}.items():
            if flats:
                what = f"network weights{f' ({key})' if key else ''}"
                match(expected, tensors.get(key, {}), what=what)
                self.layout.fill([flat.data for flat in flats], tensors[key])
        self._spread(tensors[""])
        self._load_optimizer(tensors.get("optimizer", {}))
        if self.dynamic:
            for name, value in tensors.get("scaler", {}).items():
                setattr(self.zero.loss_scaler, name, value.item())

    @torch.no_grad()
    def _spread(self, whole: Mapping[str, Tensor]) -> None:
        """Into the weights that forwards use, which are not the masters."""
        pieces = {piece.name: piece for piece in self.layout.pieces[self.ranks.rank]}
        for name, parameter in self.network.named_parameters():
            if self.stage == 3 and name in pieces:
                begin, count = pieces[name].begin, pieces[name].size
                parameter.ds_tensor.data[:count].copy_(whole[name].reshape(-1)[begin : begin + count])  # type: ignore[attr-defined]
            if parameter.numel() == whole[name].numel():  # all but what stage 3 has not gathered
                parameter.data.copy_(whole[name])
        for name, buffer in self.network.named_buffers():
            if name in whole:  # else it is none of the checkpoint's
                buffer.copy_(whole[name])

    def _export(self, flats: Sequence[Tensor]) -> dict[str, Tensor]:
        whole = self.layout.whole(flats, self.ranks, everywhere=False)
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in whole.items()}

    def _export_optimizer(self) -> dict[str, Tensor]:
        """By parameter, as `optimizer.export_state`."""
        found: dict[str, Tensor] = {}
        states = [self.base.state.get(master, {}) for master in self.masters]
        for kind, value in states[0].items():
            if not isinstance(value, Tensor):
                continue
            if value.dim():
                whole = self._export([state[kind] for state in states])
                found |= {f"{kind}.{name}": tensor for name, tensor in whole.items()}
            else:
                found |= {f"{kind}.{name}": value.detach().to("cpu", copy=True) for name in self.layout.shapes}
        return found

    def _load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        optimizer.restart(self.base, self.masters, self.optim)
        for kind, whole in optimizer.by_kind(tensors, self.layout.shapes).items():
            parts = [torch.zeros_like(master) for master in self.masters]
            if kind != "step":
                self.layout.fill(parts, whole)
            for master, part in zip(self.masters, parts, strict=True):
                step = next(iter(whole.values())).to(device=master.device, copy=True) if kind == "step" else part
                self.base.state[master][kind] = step

    def _scaler(self) -> dict[str, Tensor]:
        """fp16's loss scale and what decides on its next change."""
        scaler = self.zero.loss_scaler
        return {name: torch.tensor(getattr(scaler, name)) for name in SCALER if self.dynamic}

    def _buffers(self) -> dict[str, Tensor]:
        return {name: buffer.detach() for name, buffer in self.network.named_buffers()}

    def _settled_buffers(self) -> dict[str, Tensor]:
        self.ranks.settle(self.network.buffers())
        kinds = {name: tensor.dtype for name, tensor in self.plain.state_dict().items()}
        return {
            name: tensor.to(device="cpu", dtype=kinds[name], copy=True)
            for name, tensor in self._buffers().items()
            if name in kinds
        }

    def checksum(self) -> int | None:
        return None if self.stage == 3 else checksum(self.network.parameters())


def _hand_over(outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    found: Tensor = _HandOver.apply(len(outputs), *outputs, *gradients)  # type: ignore[no-untyped-call]
    return found


class _HandOver(torch.autograd.Function):
    """A scalar whose backward hands gradients to outputs. The scalar's own gradient is fp16's loss scale, which takes
    effect in float32, before anything could vanish in half precision."""

    @staticmethod
    def forward(ctx: Any, count: int, *both: Tensor) -> Tensor:
        ctx.kinds = [output.dtype for output in both[:count]]
        ctx.save_for_backward(*both[count:])
        return both[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> Any:
        handed = ctx.saved_tensors
        found = [(gradient * scale).to(kind) for gradient, kind in zip(handed, ctx.kinds, strict=True)]
        return (None, *found, *[None] * len(handed))

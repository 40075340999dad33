"""What a phase sees: the network that it trains as leaves, the others frozen, its noise by position.

A phase computes its losses on leaves, copies of its network's outputs that are cut from the graph. So no loss can
reach a network that it should not reach, and the network is traversed backward once, however many losses were weighed.
"""

import contextlib
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from trainer.data import Batch
from trainer.kernels import noise
from trainer.kernels.ahead import Ahead
from trainer.kernels.choose import choose
from trainer.losses.balance import Balance, Term
from trainer.parallel.engine import Engine

Outputs = dict[str, Tensor]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
FOLD = 256  # notes of a name that are held whole


class Run:
    """One update as its phases see it. `begin` is the step's; all else is for methods."""

    batch: Batch
    """The micro-batch of the phase."""

    def __init__(self, engines: Mapping[str, Engine], *, seed: int, balance: Balance, precision: str = "fp32") -> None:
        self.engines, self.seed, self.balance, self.precision = engines, seed, balance, precision
        self.images = 0
        self._noise: dict[tuple[str, str, tuple[int, ...]], Tensor] = {}
        self._draws = {"normal": Ahead(noise.normal), "uniform": Ahead(noise.uniform)}
        self.kept: dict[str, list[Tensor]] = {}
        self._shared: dict[str, Outputs] = {}
        self._frozen: list[nn.Module] = []

    # ------------------------------------------------------------------ for the step
    def begin(self, phase: str, batch: Batch, *, images: int, last: bool, share: bool, count: int) -> None:
        """images: seen before this update; share: a forward may wait for its own phase; count: samples of this rank."""
        self.phase, self.images, self.last, self.share, self.count = phase, images, last, share, count
        if getattr(self, "batch", None) is not batch:
            self.batch, self._noise = batch, {}
        for network in self._frozen:
            network.requires_grad_(True)
        self._frozen = []
        self.outputs: Outputs = {}
        self.leaves: Outputs = {}

    def end(self) -> None:
        """Forgets what was shared: a phase that did not come must not leave its graph to the next update."""
        self._shared = {}

    def autocast(self, *, enabled: bool = True) -> contextlib.AbstractContextManager[Any]:
        dtype = AUTOCAST.get(self.precision)
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.batch.image.device.type, dtype=dtype, enabled=enabled)

    def gradients(self, terms: Mapping[str, Term]) -> tuple[list[Tensor], list[Tensor]]:
        """(outputs, gradients) to hand over: of the mean over this rank's samples of the weighted sum of `terms`."""
        loss_scale = self.engines[self.phase].scale
        groups: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
        scales: dict[str, float] = {}
        for name, term in terms.items():
            assert term.value.dtype == torch.float32, f"{self.phase}.{name} is not float32"
            group = term.group if term.group is not None and self.balance.active else ""
            values, shares = groups.setdefault(group, ([], []))
            values.append(term.value)
            weight = term.weight if group else term.weight * term.scale
            shares.append(torch.full_like(term.value, weight / self.count * loss_scale, requires_grad=False))
            scales[group] = term.scale
        leaves = list(self.leaves.values())
        total: list[Tensor | None] = [None] * len(leaves)
        for i, (group, (values, shares)) in enumerate(groups.items()):
            retain = i + 1 < len(groups)
            # the gradient of the weighted sum, without taking the sum
            found: tuple[Tensor | None, ...] = torch.autograd.grad(
                values, leaves, shares, allow_unused=True, retain_graph=retain
            )
            if loss_scale != 1.0:
                found = tuple(None if g is None else g / loss_scale for g in found)
            if len(groups) > 1:
                found = self._balanced(group, found, scale=scales[group])
            total = [b if a is None else a if b is None else a + b for a, b in zip(total, found, strict=True)]
        pairs = [(out, g) for out, g in zip(self.outputs.values(), total, strict=True) if g is not None]
        return [out for out, _ in pairs], [g for _, g in pairs]

    def _balanced(self, group: str, found: tuple[Tensor | None, ...], *, scale: float) -> tuple[Tensor | None, ...]:
        at = found[list(self.leaves).index("reconstruction")]
        assert at is not None, f"{self.phase}: group {group!r} does not reach the reconstruction"
        features = self.outputs.get("features")
        seen = None if features is None else features.detach()[: len(at)]
        self.balance.observe(group or Balance.REFERENCE, at, seen)
        if not group:
            return found
        ratio = self.balance.ratio(group, like=at)
        self.note(f"weight/{group}", ratio)
        if scale == 0.0:  # measured, not felt: zero times a gradient that is not finite would be felt
            return (None,) * len(found)
        return tuple(None if g is None else g * (ratio * scale) for g in found)

    # ------------------------------------------------------------------ for methods
    def __call__(self, name: str, call: Tensor | Callable[[Any], Any], *inputs: Any, exact: bool = False) -> Any:
        """The phase's own network: its outputs as float32 leaves, by name.

        call: the network's first input, or a function of the network that returns its outputs. exact: eager and in
        float32, for penalties, whose double backward torch.compile refuses and half precision spoils."""
        assert name == self.phase, f"the phase {self.phase} trains {self.phase}, not {name}"
        waiting = self._shared.pop(name, None)
        self.outputs = self._through(name, call, inputs, exact) if waiting is None else waiting
        self.leaves = {key: out.detach().float().requires_grad_() for key, out in self.outputs.items()}
        return SimpleNamespace(**self.leaves)

    def shared(self, name: str, call: Tensor | Callable[[Any], Any], *inputs: Any) -> Any:
        """Detached outputs of a network that a later phase of this update trains, from the same inputs.

        With one micro-batch its graph waits for that phase; with more the forward is run again there."""
        if self.share:
            if name not in self._shared:
                self._shared[name] = self._through(name, call, inputs, False)
            outputs = self._shared[name]
        else:
            with torch.no_grad():
                outputs = _named(_apply(self.engines[name].network, call, inputs))
        return SimpleNamespace(**{key: out.detach().float() for key, out in outputs.items()})

    def frozen(self, name: str) -> Any:
        """The bare network, whose weights take no gradient in this phase."""
        network = self.engines[name].network
        self._frozen.append(network.requires_grad_(False))
        return network

    def normal(self, stream: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal (B, *shape): the noise `stream` of the batch's samples."""
        return self._draw("normal", stream, shape)

    def uniform(self, stream: str, shape: tuple[int, ...] = ()) -> Tensor:
        """Uniform in [0, 1), (B, *shape): the draws `stream` of the batch's samples."""
        return self._draw("uniform", stream, shape)

    def noise(self, stream: str, shape: tuple[int, ...]) -> Tensor:
        """`normal` for `reparameterize_kl`: only the address, int64 (B, 3), where its kernel will draw it."""
        position = self.batch.position
        if choose("reparameterize_kl", position, unfit=lambda: None) != "triton":
            return self.normal(stream, shape)
        key = ("address", stream, ())
        if key not in self._noise:
            self._noise[key] = noise.address(self.seed, stream, position)
        return self._noise[key]

    def _draw(self, kind: str, stream: str, shape: tuple[int, ...]) -> Tensor:
        key = (kind, stream, shape)
        if key not in self._noise:  # the phases of an update ask for the same noise
            self._noise[key] = self._draws[kind](self.seed, stream, self.batch.position, shape)
        return self._noise[key]

    def note(self, name: str, values: Tensor) -> None:
        """A figure for the board, () or (B, ...), whose mean is logged. In `kept` are (B,) values of it, the mean over
        patches, and of former updates only their means, as (updates, B) views of one number a row."""
        values = values.detach()
        notes = self.kept.setdefault(name, [])
        notes.append(values.flatten(1).mean(1) if values.dim() > 1 else values)
        if len(notes) >= FOLD and notes[-FOLD].dim() < 2:  # the last ones are not folded yet
            several = torch.stack(notes[-FOLD:]).view(FOLD, -1)
            notes[-FOLD:] = [several.mean(1, keepdim=True).expand_as(several)]

    def _through(self, name: str, call: Tensor | Callable[[Any], Any], inputs: tuple[Any, ...], exact: bool) -> Outputs:
        with self.autocast(enabled=not exact):
            return _named(
                self.engines[name].run(lambda network: _apply(network, call, inputs), last=self.last, eager=exact)
            )


def _apply(network: Any, call: Tensor | Callable[[Any], Any], inputs: tuple[Any, ...]) -> Any:
    return network(call, *inputs) if isinstance(call, Tensor) else call(network)


def _named(outputs: Any) -> Outputs:
    return outputs if isinstance(outputs, dict) else {"output": outputs}

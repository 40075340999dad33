"""The optimiser of one network: its config, its learning rate as a function of the clock, its state by name."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from trainer import bounds, progress


@dataclass(frozen=True)
class CriticOptim:
    """What the discriminator does differently; null takes the value of `optim`."""

    lr: float | None = None
    """Learning rate of the discriminator (per update)."""
    betas: tuple[float, float] | None = None
    """Adam's betas of the discriminator; (0, 0.99) is the habit of StyleGAN and R3GAN."""
    clip: float | None = None
    """Largest gradient norm of the discriminator."""

    def __post_init__(self) -> None:
        bounds.above_zero(self, "lr", "clip")
        if self.betas is not None:
            _check_betas(self.betas)


@dataclass(frozen=True)
class OptimConfig:
    """One optimiser a network, the same rules for all of them."""

    algorithm: Literal["adam", "adamw", "sgd"] = "adam"
    """Update rule; torch's fused implementation."""
    lr: float = 2e-4
    """Learning rate after warm-up (per update). Never scaled with the batch behind your back."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Adam's decay rates of the first and second moment; SGD takes the first as momentum."""
    eps: float = 1e-8
    """Adam's denominator offset."""
    weight_decay: float = 0.0
    """Decoupled for adamw, L2 for adam and sgd."""
    warmup: int = 0
    """Images over which the rate rises linearly from 0; 0 starts in full."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the decay down to `floor` at the end of the budget."""
    hold: float = 0.5
    """Share of the budget before the decay begins."""
    floor: float = 0.02
    """Rate at the end of the decay, as a share of `lr`."""
    clip: float | None = None
    """Largest gradient norm of a network's update; null does not clip. The norm is logged either way."""
    ema_half_life: int = 4000
    """Images after which a weight's share in the average has halved; 0 keeps no average."""
    ema_ramp: float = 0.05
    """The half-life is at most this share of the images seen (Karras et al. 2020), so an early average is usable."""
    discriminator: CriticOptim = field(default_factory=CriticOptim)

    def __post_init__(self) -> None:
        bounds.above_zero(self, "lr", "eps", "ema_ramp")
        bounds.at_least(0, self, "weight_decay", "warmup", "ema_half_life")
        _check_betas(self.betas)
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor: {self.floor} is a share of lr, 0 <= floor <= 1")
        if not 0 <= self.hold < 1:
            raise ValueError(f"hold: {self.hold} is a share of the budget, 0 <= hold < 1")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip: {self.clip} must be above 0; null switches clipping off")


def _check_betas(betas: tuple[float, float]) -> None:
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas: {list(betas)} are shares of the old moments, 0 <= beta < 1 each")


@dataclass(frozen=True)
class NetworkOptim:
    """`OptimConfig` resolved for one network and one budget."""

    config: OptimConfig
    lr: float
    betas: tuple[float, float]
    clip: float | None
    total: int

    def rate(self, images: int) -> float:
        """Learning rate of the update that begins at `images` images seen."""
        warm = 1.0 if self.config.warmup == 0 else min(1.0, (images + 1) / self.config.warmup)
        fall = progress.decay(
            images, total=self.total, hold=self.config.hold, floor=self.config.floor, shape=self.config.decay
        )
        return self.lr * warm * fall

    def ema_decay(self, images: int, *, batch: int) -> float:
        """Weight of the old average in the update of `batch` images that begins at `images`."""
        half_life = min(float(self.config.ema_half_life), self.config.ema_ramp * images)
        return 0.5 ** (batch / half_life) if half_life > 0 else 0.0


def resolve(config: OptimConfig, *, network: str, total: int) -> NetworkOptim:
    """The optimiser settings of `network` in a run of `total` images."""
    own = config.discriminator if network == "discriminator" else CriticOptim()
    return NetworkOptim(
        config=config,
        lr=config.lr if own.lr is None else own.lr,
        betas=config.betas if own.betas is None else own.betas,
        clip=config.clip if own.clip is None else own.clip,
        total=total,
    )


def build(parameters: list[nn.Parameter], optim: NetworkOptim) -> torch.optim.Optimizer:
    """torch's fused optimiser, which can skip a non-finite update on the device (found_inf) without waiting for it."""
    config = optim.config
    if config.algorithm == "sgd":
        found = torch.optim.SGD(
            parameters, lr=optim.lr, momentum=optim.betas[0], weight_decay=config.weight_decay, fused=True
        )
        restart(found, parameters, optim)
        return found
    kind = torch.optim.Adam if config.algorithm == "adam" else torch.optim.AdamW
    return kind(
        parameters, lr=optim.lr, betas=optim.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
    )


def restart(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], optim: NetworkOptim) -> None:
    """As before the first update. parameters: those that it updates."""
    optimizer.state.clear()
    if optim.config.algorithm == "sgd" and optim.betas[0] > 0:
        # torch leaves the momentum uninitialised when found_inf skips the very first update
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)


def export_state(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """The optimiser's tensors as "exp_avg.decoder.0.weight" and the like: named by parameter, whole, on the CPU."""
    (group,) = optimizer.param_groups
    found = {}
    for name, parameter in zip(names, group["params"], strict=True):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                found[f"{key}.{name}"] = value.detach().to("cpu", copy=True)
    return found


def by_kind(tensors: Mapping[str, Tensor], names: Collection[str]) -> dict[str, dict[str, Tensor]]:
    """What `export_state` gave as {kind: {parameter: tensor}}; empty where no update was taken yet.

    Raises ValueError for a name that is no parameter's, or for parameters without state beside others with one."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition(".")
        if name not in names:
            raise ValueError(f"optimizer state {key!r} belongs to no parameter of this network")
        found.setdefault(kind, {})[name] = value
    for states in found.values():
        if missing := sorted(set(names) - set(states)):
            raise ValueError(f"optimizer state is missing for {len(missing)} parameters, the first is {missing[0]!r}")
    return found


def load_state(optimizer: torch.optim.Optimizer, names: list[str], tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `export_state`; ValueError as `by_kind`."""
    (group,) = optimizer.param_groups
    targets = dict(zip(names, group["params"], strict=True))
    for kind, whole in by_kind(tensors, names).items():
        for name, value in whole.items():
            target = targets[name]
            if kind == "step":
                optimizer.state[target][kind] = value.to(device=target.device, copy=True)
            else:  # a moment lies in memory as its parameter does
                optimizer.state[target][kind] = torch.empty_like(target, dtype=value.dtype, requires_grad=False).copy_(
                    value
                )

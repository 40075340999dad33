"""What `tandem check` says of memory and communication, for the ranks that were asked for and for others."""

from collections.abc import Mapping, Sequence

from trainer.parallel.config import DeepSpeedConfig, ParallelConfig
from trainer.parallel.costs import Backend, Network, Sent, backend, memory, sent, summed, total

STAGES = (0, 1, 2, 3)
POWERS = tuple(2**power for power in range(11))


def describe(config: ParallelConfig, *, world: int) -> str:
    """The backend in words."""
    ranks = f"{world} rank{'' if world == 1 else 's'}"
    if not isinstance(config, DeepSpeedConfig):
        return f"DistributedDataParallel on {ranks}" if world > 1 else "one process"
    stages = f"stage {config.stage}"
    if config.stage_of("discriminator") != config.stage:
        stages += f", discriminator {config.stage_of('discriminator')}"
    more = (", optimiser on the CPU" if config.offload == "cpu" else "") + (
        f", weights in {config.weights}" if config.weights != "fp32" else ""
    )
    return f"DeepSpeed ZeRO {stages}{more} on {ranks}; predicted, the two updates are one process's without it"


def rows(
    updates: Sequence[Mapping[str, Network]],
    config: ParallelConfig,
    *,
    world: int,
    activations: int,
    lazy: int,
    cpu: bool,
) -> dict[str, str]:
    """updates: the networks as in an update with the penalties and in the next, which has none where the interval is
    longer; activations: bytes at their peak; lazy: updates from one penalty to the next."""
    networks = updates[0]
    backends = {name: backend(config, name, cpu=cpu) for name in networks}
    found = {name: memory(network, backends[name], world=world) for name, network in networks.items()}
    held, peak = total(found, activations=activations)
    said = {
        "memory a rank": f"{_mb(peak)} MB at the peak of an update, {_mb(held)} MB between updates",
        "- parameters": _each({name: part.parameters for name, part in found.items()}),
        "- gradients": _each({name: part.gradients for name, part in found.items()}),
        "- optimizer": _each({name: part.optimizer for name, part in found.items()}),
        "- average": _each({name: part.average for name, part in found.items()}),
        "- activations": f"{_mb(activations)} MB",
        "- buckets": _each({name: part.buckets for name, part in found.items()}) + _bucket(backends, networks),
        "- gathered": _each({name: part.gathered for name, part in found.items()}),
        "- copies": _each({name: max(part.copies, part.sending) for name, part in found.items()}),
        "- on the CPU": _each({name: part.host for name, part in found.items()}),
        "sent a rank": _sent(mean(updates, backends, world=world, lazy=lazy)),
    }
    return {name: text for name, text in said.items() if text}


def mean(updates: Sequence[Mapping[str, Network]], backends: Mapping[str, Backend], *, world: int, lazy: int) -> Sent:
    """Bytes of an update, all networks together: the mean of `lazy` updates, one of them with penalties."""
    first, other = (
        summed({name: sent(network, backends[name], world=world) for name, network in networks.items()})
        for networks in updates
    )
    parts = zip((first.all_reduce, first.reduce_scatter, first.all_gather),
                (other.all_reduce, other.reduce_scatter, other.all_gather), strict=True)  # fmt: skip
    return Sent(*(round((a + (lazy - 1) * b) / lazy) for a, b in parts))


def worlds(
    updates: Sequence[Mapping[str, Network]], config: ParallelConfig, sizes: Sequence[int], *, lazy: int, cpu: bool
) -> list[list[str]]:
    """A table: a row a backend, a column a number of ranks, each with MB a rank at the peak of an update without
    activations, MB between updates, and MB sent in an update; last, from how many ranks on the peak is below that of
    DistributedDataParallel, and of the stage before."""
    table = [["", *(f"{size} rank{'' if size == 1 else 's'}" for size in sizes), "below ddp", "below the one above"]]
    for stage in STAGES:
        backends = [
            {name: backend(config, name, cpu=cpu, stage=n) for name in updates[0]}
            for n in (stage, 0, max(0, stage - 1))
        ]
        own, ddp, before = backends
        cells = []
        for size in sizes:
            held, peak = _total(updates[0], own, size)
            cells.append(f"{_mb(peak, 0)} / {_mb(held, 0)} / {_mb(mean(updates, own, world=size, lazy=lazy).total, 0)}")
        begins = [_pays(updates[0], own, other) for other in (ddp, before)] if stage else ["", ""]
        table.append(["ddp" if stage == 0 else f"stage {stage}", *cells, *begins])
    return table


def _pays(networks: Mapping[str, Network], own: Mapping[str, Backend], other: Mapping[str, Backend]) -> str:
    """The least number of ranks, a power of two, at which `own` holds less at its peak than `other`."""
    for world in POWERS:
        if _total(networks, own, world)[1] < _total(networks, other, world)[1]:
            return str(world)
    return f"never to {POWERS[-1]}"


def _total(networks: Mapping[str, Network], backends: Mapping[str, Backend], world: int) -> tuple[int, int]:
    return total({name: memory(network, backends[name], world=world) for name, network in networks.items()})


def _bucket(backends: Mapping[str, Backend], networks: Mapping[str, Network]) -> str:
    sizes = {min(found.bucket, networks[name].size): None for name, found in backends.items() if found.stage}
    return f"; zero_optimization.reduce_bucket_size: {', '.join(f'{size:,}' for size in sizes)}" if sizes else ""


def _sent(found: Sent) -> str:
    parts = {"all-reduce": found.all_reduce, "reduce-scatter": found.reduce_scatter, "all-gather": found.all_gather}
    some = ", ".join(f"{name} {_mb(size)}" for name, size in parts.items() if size)
    return f"{_mb(found.total)} MB an update: {some}" if some else "nothing: one rank"


def _each(parts: Mapping[str, int]) -> str:
    """Empty where nobody has any."""
    if not any(parts.values()):
        return ""
    if len(parts) == 1:
        return f"{_mb(sum(parts.values()))} MB"
    return f"{_mb(sum(parts.values()))} MB: " + ", ".join(f"{name} {_mb(size)}" for name, size in parts.items() if size)


def _mb(size: float, digits: int = 1) -> str:
    return f"{size / 1e6:,.{digits}f}"

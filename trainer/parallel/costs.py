"""What a rank holds and sends under each backend, as arithmetic: nothing is started, no tensor is made.

The shares are those of Rajbhandari et al. 2020 (ZeRO), section 5 for memory and section 7 for communication. What
DeepSpeed 0.19 holds or sends beside is added where it was measured (tools/bench/memory.py): its buckets, stages 1 and 2
that reduce by all-reduce, weights of stage 3 that stay gathered from forward to backward, persistent weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from trainer.parallel import zero_config
from trainer.parallel.config import DeepSpeedConfig, ParallelConfig

PERSISTENT = 100_000  # DeepSpeed's own defaults, in elements
LIVE = 1_000_000_000
FLOAT = 4  # bytes of a master weight, a moment, a weight of the average


@dataclass(frozen=True)
class Passes:
    """Forwards of a network in one update, over all its micro-batches and phases."""

    graph: int = 1
    """Traversed backward: its own phase's, and other phases' that look through it."""
    plain: int = 0
    """Without a graph."""
    exact: int = 0
    """Micro-batches whose penalty needs double backward; their forwards are not counted above."""
    plain_first: bool = False
    """Whether the run's first forward has no graph: DeepSpeed then never keeps weights from forward to backward."""


@dataclass(frozen=True)
class Network:
    """What decides on the costs of one network."""

    sizes: tuple[int, ...]
    """Elements of each parameter."""
    averaged: bool
    moments: int
    """Numbers that the optimiser keeps for each weight: 2 for Adam, 1 for SGD with momentum."""
    passes: Passes
    micro_batches: int = 1

    @property
    def size(self) -> int:
        return sum(self.sizes)


@dataclass(frozen=True)
class Backend:
    """What decides on a network's costs beside the network."""

    stage: int = 0
    """Of ZeRO; 0 is DistributedDataParallel."""
    width: int = 4
    """Bytes of a weight and of a gradient."""
    offload: bool = False
    bucket: int = zero_config.BUCKET
    """Elements that are reduced at a time."""
    buckets: int = 1
    """2 where a bucket fills while the other is sent (overlap_comm of stages 1 and 2)."""
    persistent: int = PERSISTENT
    """Parameters of so many elements or fewer stay whole under stage 3."""
    live: int = LIVE
    """Elements that stage 3 keeps gathered from one use to the next."""
    cpu: bool = False
    """Whether it trains on the CPU, where the gradient's norm is taken of a flat copy."""


def backend(config: ParallelConfig, name: str, *, cpu: bool, stage: int | None = None) -> Backend:
    """Of the network `name`; stage: another than the config's, with its other settings."""
    if stage is None:
        stage = config.stage_of(name) if isinstance(config, DeepSpeedConfig) else 0
    if stage == 0:
        return Backend(cpu=cpu)
    config = config if isinstance(config, DeepSpeedConfig) else DeepSpeedConfig()
    zero: Mapping[str, Any] = zero_config.settings(config, name, clip=None)["zero_optimization"]
    return Backend(
        stage=stage,
        width=FLOAT if config.weights == "fp32" else 2,
        offload=config.offload == "cpu",
        bucket=int(zero.get("reduce_bucket_size", zero_config.BUCKET)),
        buckets=2 if stage < 3 and zero.get("overlap_comm", False) else 1,
        persistent=int(zero.get("stage3_param_persistence_threshold", PERSISTENT)),
        live=int(min(zero.get("stage3_max_live_parameters", LIVE), zero.get("stage3_max_reuse_distance", LIVE))),
        cpu=cpu,
    )


@dataclass(frozen=True)
class Memory:
    """Bytes of one network on one rank's device; activations are not in it."""

    parameters: int
    """What forwards use, between updates."""
    gradients: int
    """In the network's own phase; under stage 3 always."""
    optimizer: int
    """Masters, which DeepSpeed holds beside float32 weights too, and moments."""
    average: int
    buckets: int
    """Where gradients are gathered up to be sent: always there under DistributedDataParallel and stage 3, in the
    network's own phase under stages 1 and 2."""
    gathered: int
    """Whole weights of stage 3 while they are used; with a penalty also those of its own and their gradients, and under
    stages 1 and 2 float32 copies of half precision's."""
    copies: int
    """Flat copies of gradients that are made and dropped: for the norm or the update, or, under stage 3, to be sent."""
    sending: int
    """Flat copy of a full bucket that stages 1 and 2 reduce."""
    once: bool
    """Whether stages 1 and 2 fill no bucket before backward is done: all is sent then, when activations are gone."""
    host: int
    """What offload puts into the CPU's memory: masters, moments, average and gradients."""
    stage: int

    @property
    def held(self) -> int:
        """Between updates."""
        always = self.buckets + (self.gradients if self.stage == 3 else 0) if self.stage in (0, 3) else 0
        return self.parameters + self.optimizer + self.average + always

    def backward(self, activations: int) -> int:
        """On top of `held` in the network's own backward, at most."""
        if self.stage == 3:
            return self.gathered + self.copies + activations
        if self.stage == 0:
            return self.gradients + activations
        if self.once:
            return self.buckets + max(self.gradients + activations + self.gathered, self.sending)
        return self.buckets + self.gradients + activations + self.gathered + self.sending

    @property
    def update(self) -> int:
        """On top of `held` in the network's update."""
        return 0 if self.stage == 3 else self.gradients + self.copies


def memory(network: Network, backend: Backend, *, world: int) -> Memory:
    """Rajbhandari et al. 2020, section 5: with Psi weights on N ranks, stage 1 divides the optimiser's state by N,
    stage 2 the gradients too, stage 3 the weights too."""
    size, width, stage = network.size, backend.width, backend.stage
    share = -(-size // world) if stage else size
    states = FLOAT * share * network.moments
    average = FLOAT * share * network.averaged
    if stage == 0:
        sent = FLOAT * size if world > 1 else 0
        copies = 2 * FLOAT * size if backend.cpu else 0  # contiguous copies of the gradients, and they in a row
        return Memory(FLOAT * size, FLOAT * size, states, average, sent, 0, copies, 0, False, 0, stage)
    bucket = width * min(size, backend.bucket) * backend.buckets
    masters = FLOAT * share
    if stage == 3:
        share = sum(-(-n // world) for n in network.sizes)  # each is cut by itself
        small = sum(n for n in network.sizes if n <= backend.persistent)
        large = size - small
        whole = width * (large if _kept(network, backend) else min(large, 2 * max(network.sizes)))
        if network.passes.exact:  # its own weights in float32, gathered ones, and the penalty's gradients
            whole = width * large + 2 * FLOAT * size
        parameters, gradients = width * (share + small), width * share
        copies = width * min(size, backend.bucket)  # laid out by rank, to be scattered
    else:
        parameters = width * size
        # stage 1 sends nothing before the last backward is done
        gradients = width * (size if stage == 1 else share)
        # a penalty computes with float32 copies of half precision's weights
        whole, copies = (FLOAT * size if network.passes.exact and width < FLOAT else 0), FLOAT * share
    sending = width * min(size, backend.bucket) if stage < 3 else 0
    once = stage == 1 or (stage == 2 and size <= backend.bucket)
    host = masters + states + average + FLOAT * share
    if backend.offload:
        return Memory(parameters, gradients, 0, 0, bucket, whole, copies, sending, once, host, stage)
    return Memory(parameters, gradients, masters + states, average, bucket, whole, copies, sending, once, 0, stage)


def total(networks: Mapping[str, Memory], *, activations: int = 0) -> tuple[int, int]:
    """(bytes between updates, bytes at most in one) of a rank that trains these networks.

    One network's gradients are there at a time. Whole weights of stage 3 may be there of all networks at once, and all
    activations while gradients are: both count in full."""
    held = sum(memory.held for memory in networks.values())
    peak = 0
    for own, found in networks.items():
        others = sum(other.gathered for name, other in networks.items() if name != own)
        peak = max(peak, found.backward(activations) + others, found.update)
    return held, held + peak


@dataclass(frozen=True)
class Sent:
    """Bytes that a rank sends in one update for one network, as many as it receives, by ring algorithms."""

    all_reduce: int = 0
    reduce_scatter: int = 0
    all_gather: int = 0

    @property
    def total(self) -> int:
        return self.all_reduce + self.reduce_scatter + self.all_gather


def whole(network: Network, backend: Backend) -> Sent:
    """Bytes of the whole tensors that all ranks together reduce, scatter or gather in an update, before a ring divides
    the work: what a count of collectives finds.

    Rajbhandari et al. 2020, section 7, has 2 Psi for stages 1 and 2 and 3 Psi for stage 3. DeepSpeed 0.19 reduces by
    all-reduce under stages 1 and 2 (use_multi_rank_bucket_allreduce), which makes it 3 Psi; stage 2 reduces after each
    micro-batch. Stage 3 reduces after each micro-batch too, and gathers as `_gathers` says."""
    size = network.size * backend.width
    if backend.stage == 0:
        return Sent(all_reduce=size)
    if backend.stage < 3:
        times = network.micro_batches if backend.stage == 2 else 1
        return Sent(all_reduce=size * times, all_gather=size)
    return Sent(reduce_scatter=size * network.micro_batches, all_gather=_gathers(network, backend) * backend.width)


def sent(network: Network, backend: Backend, *, world: int) -> Sent:
    """What a rank sends of `whole`: 2 (N - 1) / N of what is all-reduced, (N - 1) / N of the rest."""
    found = whole(network, backend)
    part = (world - 1) / world
    return Sent(round(2 * part * found.all_reduce), round(part * found.reduce_scatter), round(part * found.all_gather))


def _gathers(network: Network, backend: Backend) -> int:
    """Elements that stage 3 gathers in an update.

    Weights that stay gathered from forward to backward are gathered once for both, and serve forwards without a graph
    before them. Otherwise each forward and each backward gathers them. A penalty's phase gathers them twice: to
    compute with, and to hand their gradients over. Small ones are gathered after the update."""
    passes = network.passes
    small = sum(n for n in network.sizes if n <= backend.persistent)
    exact = 2 * passes.exact * (network.size - small)
    if _kept(network, backend):
        return exact + passes.graph * (network.size - small) + small
    return exact + (2 * passes.graph + passes.plain) * network.size + small


def _kept(network: Network, backend: Backend) -> bool:
    return not network.passes.plain_first and network.size <= backend.live


def summed(found: Mapping[str, Sent]) -> Sent:
    return Sent(*(sum(getattr(part, field.name) for part in found.values()) for field in fields(Sent)))

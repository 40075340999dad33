"""The processes of a run: who we are, on which device, and the few exchanges that are no gradient."""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from trainer.errors import code_of
from trainer.parallel import accelerated, rendezvous
from trainer.parallel.config import ParallelConfig
from trainer.parallel.launcher import asked_processes, check_gpus, take_srun


class Ranks:
    """This process among the others. Made once, before anything is allocated."""

    def __init__(self, accelerator: Accelerator, *, store: object = None, timeout: float = 600.0) -> None:
        """store: what must live as long as the group. timeout: seconds to connect."""
        self.accelerator, self._store = accelerator, store
        started = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if started else 0
        self.world = dist.get_world_size() if started else 1
        self.device: torch.device = accelerator.device
        # Accelerate's group speaks NCCL alone on GPUs; what ranks agree on goes over the CPU and waits for no GPU
        self._host = _host_group(timeout) if self.world > 1 else None

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor, group=self._host if tensor.device.type == "cpu" else None)
        return tensor

    def everyones(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of each rank, in order; of one shape on all of them."""
        if self.world == 1:
            return [tensor]
        found = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(found, tensor.contiguous(), group=self._host if tensor.device.type == "cpu" else None)
        return found

    def settle(self, buffers: Iterable[Tensor]) -> None:
        """Makes buffers of networks the same on all ranks: the mean of what is a float, else rank 0's."""
        for buffer in buffers:
            if self.world == 1:
                return
            if buffer.is_floating_point():
                self.sum(buffer).div_(self.world)
            else:
                dist.broadcast(buffer, src=0)

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        if self.world == 1:
            return number
        found = torch.tensor(number)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._host)
        return int(found)

    def first(self, value: Any) -> Any:
        """Rank 0's JSON value on every rank."""
        if self.world == 1:
            return value
        data = json.dumps(value).encode() if self.rank == 0 else b""
        size = torch.tensor(len(data))
        dist.broadcast(size, src=0, group=self._host)
        payload = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        payload = payload if self.rank == 0 else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(payload, src=0, group=self._host)
        return json.loads(payload.numpy().tobytes())

    def total(self, count: int) -> int:
        """The sum of a count over ranks."""
        return int(self.sum(torch.tensor(count))) if self.world > 1 else count

    def gather(self, value: Any) -> list[Any]:
        """The JSON value of every rank, in order, on every rank."""
        if self.world == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.tensor(0) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor(len(data)), group=self._host)
        longest = max(int(size) for size in sizes)
        padded = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.world)]
        dist.all_gather(padded, F.pad(data, (0, longest - len(data))), group=self._host)
        pairs = zip(padded, sizes, strict=True)
        return [json.loads(part[: int(size)].numpy().tobytes()) for part, size in pairs]

    def agree(self, fault: str | None) -> None:
        """A collective. ValueError on all ranks, with the fault of the first rank that has one; all None: nothing."""
        if self.largest(int(fault is not None)):
            raise ValueError(next(text for text in self.gather(fault) if text is not None))

    def together(self, call: Callable[[], Any]) -> Any:
        """Rank 0's call, and its JSON result on every rank. Its exception ends them all, and rank 0 says why."""
        value, error, code = None, None, 0
        if self.rank == 0:
            try:
                value = call()
            except Exception as found:  # noqa: BLE001  raised below, once the others know
                error, code = found, code_of(found)
        value, code = self.first([value, code])
        if error is not None:
            raise error
        if code:
            raise SystemExit(code)
        return value

    def close(self) -> None:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def _host_group(timeout: float) -> dist.ProcessGroup:
    try:
        found = dist.new_group(backend="gloo", timeout=rendezvous.connecting(timeout))
    except RuntimeError as error:
        raise rendezvous.unconnected(error, timeout=timeout) from None
    assert isinstance(found, dist.ProcessGroup)
    rendezvous.patient(found, "gloo")
    return found


def start(config: ParallelConfig, *, alike: Mapping[str, Any] | None = None) -> Ranks:
    """Joins the process group that the launcher announced.

    alike: flat keys of the run's config that all ranks must have in common. Raises ValueError when fewer or more
    processes came up than the config or the launcher asked for, and, within `config.timeout`, when ranks are missing,
    there twice or of another mind.
    """
    take_srun()
    check_gpus(torch.cuda.device_count())
    asked = asked_processes()
    store = rendezvous.join(alike or {}, timeout=config.timeout)
    ranks = Ranks(accelerated.start(config), store=store, timeout=config.timeout)
    if asked is not None and asked[0] != ranks.world:
        raise ValueError(
            f"{asked[0]} processes were asked for by {asked[1]}, {ranks.world} came up; start them with "
            f"`tandem train CONFIG --processes {asked[0]}`, or `torchrun --nproc-per-node {asked[0]} -m trainer CONFIG`"
        )
    if config.processes is not None and config.processes != ranks.world:
        raise ValueError(f"parallel.processes: {config.processes} were asked for, {ranks.world} came up")
    return ranks

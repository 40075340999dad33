"""The interface that methods, step and loop see; backends implement it and nothing else knows which one runs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor, nn

T = TypeVar("T")


class Applied(NamedTuple):
    """What an update did, as tensors on the device so that nobody waits for them."""

    applied: Tensor
    """Float 1 if the update was taken, 0 if it was skipped because its gradient was not finite; the same on all
    ranks."""
    norm: Tensor
    """Norm of the whole gradient before clipping, float32."""


class Engine(Protocol):
    """One network and its optimiser."""

    network: nn.Module
    """The bare network: what other phases look through, never wrapped."""

    @property
    def averaged(self) -> bool:
        """Whether it keeps an exponential moving average of the weights, in float32."""

    @property
    def state(self) -> Mapping[str, Tensor]:
        """Names, shapes and dtypes of its weights and buffers as a checkpoint has them; not always their values."""

    @property
    def scale(self) -> float:
        """What losses of the next backward should be multiplied with while they pass through other networks in half
        precision; 1 but for fp16."""

    @property
    def floor(self) -> float | None:
        """What `scale` may fall to; None where it does not move. Above it, a gradient that is not finite lowers it."""

    def evaluated(self) -> nn.Module:
        """What is sampled and evaluated: the average where one is kept, else the network; whole, in float32, of the
        last step. A collective."""

    def run(self, call: Callable[[Any], T], *, last: bool, eager: bool = False) -> T:
        """`call(network)` through the wrapper, so that its backward reduces gradients.

        last: whether this is the last micro-batch of the update. eager: past torch.compile, for double backward."""

    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor], *, last: bool) -> None:
        """Hands over the gradient of the global mean loss at the outputs, in float32; ranks are averaged at the last
        micro-batch."""

    def step(self, images: int, *, batch: int) -> Applied:
        """Clips, updates and averages the weights, for the update of `batch` images that begins at `images`."""

    def rate(self, images: int) -> float:
        """Learning rate of the update that begins at `images`."""

    def export(self) -> dict[str, dict[str, Tensor]]:
        """Whole tensors on the CPU by the bare network's names: {"": weights, "ema": ..., "optimizer": ..., "scaler":
        ...}; on rank 0, where weights are sharded others may get none. A collective."""

    def load(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The inverse of `export`, strict. Raises ValueError for names or shapes of another network."""

    def checksum(self) -> int | None:
        """Of this rank's weights, which all ranks hold alike; None where each holds its own shard."""

"""Draws of the next updates in one go: on a CPU the forty small calls cost a small network more than the numbers do."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.kernels.noise import numel

UPDATES = 16
LARGEST = 1 << 17
"""Values drawn in one go; from there on the numbers cost more than the calls."""


@dataclass
class _Ask:
    """What is known of the calls for one stream."""

    first: int
    """First position of the last call."""
    stride: int
    """Its distance from the call before."""
    ahead: list[tuple[Tensor, Tensor]]
    """Positions and values of the calls to come, the next one last."""


class Ahead:
    """The function `draw` of trainer/kernels/noise.py, for positions that move on evenly from call to call.

    The same values: a row depends on its position alone. Not to be written to. Where the positions are others than
    foreseen, or lie on a GPU, they are drawn as they come."""

    def __init__(self, draw: Callable[[int, str, Tensor, tuple[int, ...]], Tensor]) -> None:
        self.draw = draw
        self.asked: dict[tuple[int, str, tuple[int, ...]], _Ask] = {}

    def __call__(self, seed: int, stream: str, positions: Tensor, shape: tuple[int, ...]) -> Tensor:
        rows = len(positions)
        if positions.device.type != "cpu" or rows == 0 or UPDATES * rows * numel(shape) > LARGEST:
            return self.draw(seed, stream, positions, shape)
        ask = self.asked.setdefault((seed, stream, shape), _Ask(first=0, stride=0, ahead=[]))
        first = int(positions[0])
        stride, before = first - ask.first, ask.stride
        ask.first, ask.stride = first, stride
        if ask.ahead:
            expected, values = ask.ahead.pop()
            if torch.equal(expected, positions):
                return values
            ask.ahead.clear()
        if stride == 0 or stride != before:
            return self.draw(seed, stream, positions, shape)
        steps = torch.arange(UPDATES).unsqueeze(1) * stride
        coming = positions + steps
        values = self.draw(seed, stream, coming.flatten(), shape).view(UPDATES, rows, *shape)
        ask.ahead = list(zip(coming.unbind(), values.unbind(), strict=True))[::-1]
        return ask.ahead.pop()[1]

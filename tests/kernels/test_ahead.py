"""Draws made ahead are the draws themselves, whatever the caller asks for next."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.kernels import noise
from trainer.kernels.ahead import UPDATES, Ahead

STEPS = st.lists(st.sampled_from([0, 4, 4, 4, 4, 7, -8]), min_size=1, max_size=3 * UPDATES)


@given(steps=STEPS, rows=st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_values_are_those_of_their_positions_however_positions_move(steps: list[int], rows: int) -> None:
    ahead, start = Ahead(noise.normal), 100
    for step in steps:
        start += step
        at = torch.arange(start, start + rows)
        assert torch.equal(ahead(3, "latent", at, (2, 3)), noise.normal(3, "latent", at, (2, 3)))


def test_positions_that_move_on_evenly_are_drawn_once_in_many_calls() -> None:
    calls = []

    def draw(seed: int, stream: str, positions: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        calls.append(len(positions))
        return noise.uniform(seed, stream, positions, shape)

    ahead = Ahead(draw)
    for update in range(1, 2 * UPDATES + 2):
        ahead(0, "flip", torch.arange(8 * update, 8 * update + 8), ())
    assert calls == [8, 8 * UPDATES, 8 * UPDATES]  # the first call shows the stride from 0

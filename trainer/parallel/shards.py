"""Where a rank's float32 shards of a network lie in DeepSpeed's flat partitions, and the whole tensors of all ranks.

ZeRO lays all weights in a row and gives each rank a piece (stages 1 and 2), or cuts each weight and gives each rank its
piece of each (stage 3). Either way the masters, the moments and the average are a few flat tensors of one layout.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainer.parallel.ranks import Ranks


class Piece(NamedTuple):
    """whole.flatten()[begin : begin + size] == flats[flat][at : at + size]"""

    name: str
    flat: int
    at: int
    begin: int
    size: int


@dataclass
class Layout:
    """Which rank holds which piece of which parameter; the same on all ranks."""

    shapes: dict[str, torch.Size]
    pieces: list[list[Piece]]
    """Of each rank."""
    rank: int

    def whole(self, flats: Sequence[Tensor], ranks: Ranks, *, everywhere: bool) -> dict[str, Tensor]:
        """The whole tensors of this rank's `flats`, by parameter, on their device; on rank 0 alone unless
        `everywhere`. A collective."""
        wanted = everywhere or self.rank == 0
        found = {
            name: torch.empty(prod(shape), dtype=flats[0].dtype, device=flats[0].device)
            for name, shape in (self.shapes.items() if wanted else ())
        }
        for number, flat in enumerate(flats):
            for rank, part in enumerate(ranks.everyones(flat)):
                for piece in self.pieces[rank]:
                    if wanted and piece.flat == number:
                        target = found[piece.name][piece.begin : piece.begin + piece.size]
                        target.copy_(part[piece.at : piece.at + piece.size])
        return {name: tensor.view(self.shapes[name]) for name, tensor in found.items()}

    def fill(self, flats: Sequence[Tensor], whole: Mapping[str, Tensor]) -> None:
        """This rank's pieces of whole tensors into its `flats`."""
        for piece in self.pieces[self.rank]:
            source = whole[piece.name].reshape(-1)[piece.begin : piece.begin + piece.size]
            flats[piece.flat][piece.at : piece.at + piece.size].copy_(source)


def layout(network: nn.Module, optimizer: Any, *, stage: int, ranks: Ranks) -> Layout:
    """optimizer: DeepSpeed's, of this stage."""
    named = {id(parameter): name for name, parameter in network.named_parameters()}
    own = _split(named, optimizer, rank=ranks.rank) if stage == 3 else _row(named, optimizer)
    shapes = {name: _shape(parameter) for name, parameter in network.named_parameters()}
    pieces = [[Piece(*row) for row in rows] for rows in ranks.gather([list(piece) for piece in own])]
    held = dict.fromkeys(shapes, 0)
    for piece in (piece for some in pieces for piece in some):
        held[piece.name] += piece.size
    assert held == {name: prod(shape) for name, shape in shapes.items()}, "DeepSpeed lays out its partitions otherwise"
    return Layout(shapes, pieces, ranks.rank)


def _shape(parameter: Any) -> torch.Size:
    found: torch.Size = parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape
    return found


def _row(named: Mapping[int, str], optimizer: Any) -> list[Piece]:
    """Stages 1 and 2."""
    found = []
    for flat, group in enumerate(optimizer.bit16_groups):
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is not None:  # None: all of it lies with others
                at, begin = mapping.hp_fragment_address, mapping.lp_fragment_address
                found.append(Piece(named[id(parameter)], flat, at.start, begin.start, begin.numel))
    return found


def _split(named: Mapping[int, str], optimizer: Any, *, rank: int) -> list[Piece]:
    """Stage 3: equal pieces of each weight, the last of them padded."""
    found = []
    for flat, group in enumerate(optimizer.fp16_groups):
        at = 0
        for parameter in group:
            size = parameter.partition_numel()
            begin = min(rank * size, parameter.ds_numel)
            count = min(size, parameter.ds_numel - begin)
            if count:
                found.append(Piece(named[id(parameter)], flat, at, begin, count))
            at += size
    return found

"""Where each tensor lies in a flat buffer that is cut into equal shards. Integers only."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

LayoutKind = Literal["flat", "aligned"]

# [Note: alignment] Tensors and shards start on multiples of 16 elements, 64 bytes in fp32. Without
# it a parameter's address, and with it the kernel a matrix product picks, would depend on the
# world size; real matrices have sizes divisible by 16, so this costs them nothing.
ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A named shape.

    Attributes:
        name: Fully qualified name of the parameter.
        shape: Its shape; the last two dimensions of a Muon parameter are its matrices [m, n].
    """

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Segment:
    """A contiguous piece of one tensor inside one rank's shard.

    Attributes:
        tensor: Index into `Layout.specs`.
        rank: The rank whose shard holds the piece.
        tensor_start: Offset of the piece in the row-major tensor, in elements.
        shard_start: Offset of the piece in the rank's shard, in elements.
        numel: Length of the piece, in elements.
    """

    tensor: int
    rank: int
    tensor_start: int
    shard_start: int
    numel: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The flat order of tensors and its cut into `world_size` equal shards.

    Attributes:
        specs: The tensors in flat order.
        offsets: Start of each tensor in the flat buffer, in elements; ascending.
        world_size: Number of shards.
        shard_numel: Elements per shard, the same for every rank.
    """

    specs: tuple[TensorSpec, ...]
    offsets: tuple[int, ...]
    world_size: int
    shard_numel: int

    @property
    def numel(self) -> int:
        """Elements in the whole buffer, padding included: `world_size * shard_numel`."""
        return self.world_size * self.shard_numel

    def segments(self, rank: int) -> tuple[Segment, ...]:
        """Pieces that `rank` holds, in shard order."""
        start, stop = rank * self.shard_numel, (rank + 1) * self.shard_numel
        found: list[Segment] = []
        index = max(bisect_right(self.offsets, start) - 1, 0)
        while index < len(self.specs) and self.offsets[index] < stop:
            found.extend(s for s in self.holders(index) if s.rank == rank)
            index += 1
        return tuple(found)

    def holders(self, tensor: int) -> tuple[Segment, ...]:
        """Pieces of `tensor` over all ranks, in order; together they cover it exactly once."""
        offset, numel = self.offsets[tensor], self.specs[tensor].numel
        pieces, position = [], 0
        while position < numel:
            rank, shard_start = divmod(offset + position, self.shard_numel)
            length = min(numel - position, self.shard_numel - shard_start)
            pieces.append(Segment(tensor, rank, position, shard_start, length))
            position += length
        return tuple(pieces)


def flat_layout(specs: Sequence[TensorSpec], world_size: int) -> Layout:
    """Tensors end to end, cut into equal shards wherever the cuts fall.

    Args:
        specs: The tensors in flat order.
        world_size: Number of shards.

    Returns:
        The layout; it is padded by less than `world_size * ALIGNMENT` elements at its end.

    Raises:
        ValueError: if `world_size` is below 1.
    """
    if world_size < 1:
        raise ValueError(f"Invalid {world_size=}. Must be >= 1.")
    ends = list(accumulate((_align(spec.numel) for spec in specs), initial=0))
    shard_numel = _align(-(-ends[-1] // world_size))
    return Layout(tuple(specs), tuple(ends[:-1]), world_size, shard_numel)


def aligned_layout(bins: Sequence[Sequence[TensorSpec]]) -> Layout:
    """Whole tensors in every shard: nothing is cut, and shards are padded to the largest.

    Args:
        bins: The tensors of each rank.

    Returns:
        The layout.
    """
    sizes = [sum(_align(spec.numel) for spec in members) for members in bins]
    shard_numel = max(sizes)
    offsets: list[int] = []
    for rank, members in enumerate(bins):
        ends = accumulate((_align(spec.numel) for spec in members), initial=rank * shard_numel)
        offsets.extend(list(ends)[:-1])
    specs = tuple(spec for members in bins for spec in members)
    return Layout(specs, tuple(offsets), len(bins), shard_numel)


def _align(numel: int) -> int:
    return -(-numel // ALIGNMENT) * ALIGNMENT

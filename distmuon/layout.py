"""Where each tensor lies in a flat buffer that is cut into equal shards. Integers only."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, field

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
        world_size: Number of shards.
        offsets: Start of each tensor in the flat buffer, in elements; derived.
        shard_numel: Elements per shard, the same for every rank; derived.
    """

    specs: tuple[TensorSpec, ...]
    world_size: int
    offsets: tuple[int, ...] = field(init=False)
    shard_numel: int = field(init=False)

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise ValueError(f"Invalid world_size={self.world_size}. Must be >= 1.")
        offsets, end = [], 0
        for spec in self.specs:
            offsets.append(end)
            end += _align(spec.numel)
        object.__setattr__(self, "offsets", tuple(offsets))
        object.__setattr__(self, "shard_numel", _align(-(-end // self.world_size)))

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


def _align(numel: int) -> int:
    return -(-numel // ALIGNMENT) * ALIGNMENT

"""Shapes of the tiles that the symmetric product is computed in, and its factors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program of the kernel computes, and with what.

    Attributes:
        rows: Rows of the result; as many as `cols` or twice as many.
        cols: Columns of the result.
        depth: Terms of the sum that are loaded at a time.
        warps: Warps of a program.
        stages: Loads in flight.
        resident: Programs that are to run on one of the GPU's processors (SMs) at a time.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    resident: int = 1

    @property
    def registers(self) -> int:
        """Registers that each thread may have, of a processor's 65,536."""
        return min(255, 65536 // (32 * self.warps * self.resident))

    @property
    def moved(self) -> int:
        """Numbers that pass through shared memory for one term of each of the tile's sums.

        What bounds the product where the matrix instructions do not: rows and columns are written
        there once; an instruction of Hopper reads 64 rows, and for them all columns.
        """
        return (self.rows + self.cols) + (self.rows + self.rows // 64 * self.cols)

    def count(self, m: int) -> int:
        """Tiles that touch the lower triangle of an m x m matrix; some may lie beyond its edge."""
        down = -(-m // self.rows)
        return down * (down + 1) // 2 * (self.rows // self.cols)


class Scaled(NamedTuple):
    """A factor that the host knows times one that only the device knows: nothing waits for it.

    Attributes:
        number: The host's.
        by: float32, one for each matrix, in the device's memory; None for 1.
    """

    number: float
    by: Tensor | None = None


# For matrices of fewer rows than this, SMALL.
_LARGE_FROM = 512
SMALL = Tile(64, 64, 64, warps=4, stages=3, resident=4)
# The wide one moves less per operation; the square one wastes less at the diagonal and at the end,
# when some processors have nothing left, and two programs on one processor fill each other's waits.
# Chosen from what is counted and from published kernels; not yet measured.
LARGE = (
    Tile(128, 128, 64, warps=8, stages=3, resident=2),
    Tile(256, 128, 64, warps=8, stages=3),
)
TILES = (SMALL, *LARGE)


def tile_for(m: int, *, batch: int = 1, processors: int = 1) -> Tile:
    """The tile with which the busiest processor moves least.

    Of the 272 tiles of 256 x 128 of one 4096 x 4096 product some of 132 processors compute three,
    most two; of its 528 tiles of 128 x 128 each computes four, which is a quarter less.

    Args:
        m: Rows of the result.
        batch: Matrices.
        processors: Of the GPU (SMs). One: as with so many matrices that all are always busy.

    Returns:
        One of `TILES`.
    """
    if m < _LARGE_FROM:
        return SMALL
    return min(LARGE, key=lambda tile: -(-tile.count(m) * batch // processors) * tile.moved)


@cache
def _processors(device: torch.device) -> int:
    on_gpu = device.type == "cuda"
    return torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1


def tile_of(a: Tensor) -> Tile:
    """The tile for products with a left operand.

    Args:
        a: [batch, m, k].
    """
    batch, m, _ = a.shape
    return tile_for(m, batch=batch, processors=_processors(a.device))

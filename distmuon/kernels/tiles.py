"""Shapes of the tiles that the symmetric product is computed in, and its factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program of the kernel computes, and with what.

    Attributes:
        rows: Rows of the result; a multiple of `cols`.
        cols: Columns of the result.
        depth: Terms of the sum that are loaded at a time.
        warps: Warps of a program.
        stages: Loads in flight.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int

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


# By the least m that takes it. Wide tiles read less from the cache per operation, small ones waste
# less at the diagonal: of an m x m matrix, 256 x 128 compute 53% at m = 4096 and 63% at 1024, where
# 128 x 128 compute 56%. Chosen from that and from published kernels; not yet measured.
TILES: tuple[tuple[int, Tile], ...] = (
    (2048, Tile(256, 128, 64, warps=8, stages=3)),
    (512, Tile(128, 128, 64, warps=8, stages=4)),
    (0, Tile(64, 64, 64, warps=4, stages=4)),
)


def tile_for(m: int) -> Tile:
    """The tile for an m x m result."""
    return next(tile for least, tile in TILES if m >= least)

"""Which rank orthogonalizes which matrix, and the flat order that keeps matrices near their owner.

Two decisions, both in integers:

1. Longest-processing-time first: the costliest matrix goes to the least loaded bin, which bounds
   the largest bin by 4/3 of the optimum (Graham 1969).
2. The bins are laid end to end in the flat buffer, one per rank, so that bin k belongs to rank k.
   The buffer is then cut into *equal* shards; a bin above or below the mean size is picked next so
   that the cumulative offset between bins and shards stays within one bin's deviation. Only the
   pieces that drifted across a boundary have to move.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from distmuon.layout import Layout, LayoutKind, TensorSpec, aligned_layout, flat_layout


@dataclass(frozen=True, slots=True)
class Ownership:
    """A layout and the owner of each of its tensors.

    Attributes:
        layout: Tensors in flat order, cut into equal shards.
        owners: Rank that orthogonalizes `layout.specs[i]`, for each i; never decreasing.
        order: Index in the caller's sequence of `layout.specs[i]`, for each i.
    """

    layout: Layout
    owners: tuple[int, ...]
    order: tuple[int, ...]

    def owned(self, rank: int) -> range:
        """Tensors that `rank` orthogonalizes, by index in the layout."""
        return range(bisect_left(self.owners, rank), bisect_right(self.owners, rank))

    def waves(self, wave_numel: int) -> tuple[int | None, ...]:
        """In which round each tensor is brought together.

        Args:
            wave_numel: Most elements that one owner fetches in a round; a single tensor may
                exceed it.

        Returns:
            For each tensor its round, from 0; None if its owner holds all of it.
        """
        rounds: list[int | None] = []
        wave = fetched = 0
        for tensor, owner in enumerate(self.owners):
            if tensor == 0 or owner != self.owners[tensor - 1]:
                wave = fetched = 0
            numel = sum(s.numel for s in self.layout.holders(tensor) if s.rank != owner)
            if fetched and fetched + numel > wave_numel:
                wave, fetched = wave + 1, 0
            fetched += numel
            rounds.append(wave if numel else None)
        return tuple(rounds)


def newton_schulz_cost(shape: Sequence[int], steps: int = 5) -> int:
    """Floating-point operations of quintic Newton-Schulz on a stack of matrices.

    Per step and matrix `A = XXᵀ` and `BX` cost 2m²n each and `A²` 2m³, with m the shorter side.

    Args:
        shape: [..., m, n] in either orientation.
        steps: Number of iterations.

    Returns:
        A count of operations; only ratios matter here.
    """
    m, n = sorted(shape[-2:])
    return math.prod(shape[:-2]) * steps * (4 * m * m * n + 2 * m**3)


def assign(
    specs: Sequence[TensorSpec], world_size: int, *, layout: LayoutKind = "flat"
) -> Ownership:
    """Balance the tensors over the ranks and lay them out.

    Args:
        specs: Muon tensors in the caller's order.
        world_size: Number of ranks.
        layout: "flat" balances work, cuts equal shards without padding, and moves what drifted over
            a border; "aligned" keeps every tensor whole at its owner, so that nothing moves, and
            pads the shards to the largest.

    Returns:
        The layout in its own order with one owner per tensor.

    Raises:
        ValueError: if `world_size` is below 1.
    """
    costs = [newton_schulz_cost(spec.shape) for spec in specs]
    if layout == "aligned":
        # Both what a rank computes and what it holds count: the larger share sets the pace, or the
        # padding. In integers, so that every rank agrees.
        total_cost, total_numel = sum(costs), sum(spec.numel for spec in specs)
        costs = [
            cost * total_numel + spec.numel * total_cost
            for cost, spec in zip(costs, specs, strict=True)
        ]
    bins = balance(costs, world_size)
    if layout == "flat":
        sizes = [sum(specs[i].numel for i in members) for members in bins]
        bins = [bins[chosen] for chosen in drift_bounded_order(sizes)]
    order = [i for members in bins for i in members]
    owners = [rank for rank, members in enumerate(bins) for _ in members]
    placed = (
        flat_layout([specs[i] for i in order], world_size)
        if layout == "flat"
        else aligned_layout([[specs[i] for i in members] for members in bins])
    )
    return Ownership(placed, tuple(owners), tuple(order))


def balance(costs: Sequence[int], world_size: int) -> list[list[int]]:
    """Longest-processing-time assignment of items to bins.

    Args:
        costs: Cost of each item.
        world_size: Number of bins.

    Returns:
        Item indices of each bin, ascending; ties are broken by index, so every rank agrees.
    """
    bins: list[list[int]] = [[] for _ in range(world_size)]
    heap = [(0, index) for index in range(world_size)]
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, index = heap[0]
        bins[index].append(item)
        heapq.heapreplace(heap, (load + costs[item], index))
    return [sorted(members) for members in bins]


def drift_bounded_order(sizes: Sequence[int]) -> list[int]:
    """Order of bins whose cumulative size stays close to a multiple of the mean size.

    Args:
        sizes: Elements in each bin.

    Returns:
        A permutation of the bins; every prefix of k bins is within one bin's deviation of k means.
    """
    count, total = len(sizes), sum(sizes)
    ascending = sorted(range(count), key=lambda i: (sizes[i], i))
    below = [i for i in ascending if sizes[i] * count < total]
    above = [i for i in reversed(ascending) if sizes[i] * count >= total]
    order: list[int] = []
    ahead = 0  # cumulative size minus k means, times count: kept integral
    while below or above:
        pick_below = bool(below) and (ahead > 0 or not above)
        index = (below if pick_below else above).pop()
        order.append(index)
        ahead += sizes[index] * count - total
    return order

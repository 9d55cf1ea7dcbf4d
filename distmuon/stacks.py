"""Place stacks of matrices that are too large for one rank: where they are cut, and what follows.

A stack [E, m, n] is one parameter and stays contiguous, so its matrices cannot be spread at will.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from distmuon.layout import ALIGNMENT, Layout, TensorSpec, align

# Shard sizes that are tried, from the smallest upwards, in steps of one matrix of every stack.
_SIZES = 64


def spread(numels: Sequence[int], work: Sequence[int]) -> list[int]:
    """Order in which the work along the buffer keeps up with its elements.

    Equal shards then hold nearly equal work: a matrix that costs much per element is followed by
    stacks that cost little, until it is made up for.

    Args:
        numels: Elements of each parameter.
        work: Cost of each.

    Returns:
        A permutation of the parameters.
    """
    total, cost = sum(numels), sum(work)
    return drift_bounded_order(
        [each * total - numel * cost for numel, each in zip(numels, work, strict=True)]
    )


def drift_bounded_order(deviations: Sequence[int]) -> list[int]:
    """Order in which the cumulative deviation stays within one entry.

    Args:
        deviations: Integers that sum to zero.

    Returns:
        A permutation; the sum of every prefix is at most the largest deviation in size.
    """
    ascending = sorted(range(len(deviations)), key=lambda i: (deviations[i], i))
    below = [i for i in ascending if deviations[i] < 0]
    above = [i for i in reversed(ascending) if deviations[i] >= 0]
    order: list[int] = []
    ahead = 0
    while below or above:
        pick_below = bool(below) and (ahead > 0 or not above)
        index = (below if pick_below else above).pop()
        order.append(index)
        ahead += deviations[index]
    return order


def aligned_stacks(
    specs: Sequence[TensorSpec], work: Sequence[int], world_size: int
) -> tuple[Layout, tuple[int, ...]] | None:
    """Lay out stacks that are larger than a quarter of a share so that no matrix is cut.

    A stack is contiguous, so shards must end where one of its matrices does: their size is a
    multiple of the matrices of every large stack. Those stacks fill the first shards; what is loose
    is balanced over the rest. Of the shard sizes the one is taken at which the largest rank's share
    of the work and the padded buffer's share of the elements add up to least.

    Args:
        specs: The parameters.
        work: Cost of each.
        world_size: Number of ranks.

    Returns:
        The layout, and the index in `specs` of each of its parameters; None if no stack is so
        large, or if no size was found.
    """
    numel, cost = sum(spec.numel for spec in specs), sum(work)
    large = [
        i
        for i, spec in enumerate(specs)
        if spec.count > 1
        and 4 * world_size * max(spec.numel * cost, work[i] * numel) > numel * cost
    ]
    if not large:
        return None
    large.sort(key=lambda i: (math.prod(specs[i].matrix), i))
    unit = math.lcm(ALIGNMENT, *(math.prod(specs[i].matrix) for i in large))
    first = -(-numel // (world_size * unit))
    loose = sorted(set(range(len(specs))) - set(large), key=lambda i: (-work[i], i))
    best: tuple[int, _Bins] | None = None
    for size in range(first * unit, (first + _SIZES) * unit, unit):
        padded = world_size * size * cost
        if best is not None and padded + cost * numel >= best[0]:
            break
        bins = _Bins(specs, work, size, world_size)
        if bins.place_end_to_end(large) and bins.place_balanced(loose, numel, cost):
            objective = world_size * max(bins.loads) * numel + padded
            if best is None or objective < best[0]:
                best = objective, bins
    if best is None:
        return None
    offsets = best[1].offsets
    order = tuple(sorted(offsets, key=lambda i: offsets[i]))
    placed = tuple(specs[i] for i in order)
    return Layout(placed, tuple(offsets[i] for i in order), world_size, best[1].size), order


class _Bins:
    """Ranks' shards while they are being filled."""

    def __init__(
        self, specs: Sequence[TensorSpec], work: Sequence[int], size: int, world_size: int
    ) -> None:
        self.specs, self.work, self.size = specs, work, size
        self.offsets: dict[int, int] = {}
        self.filled = [0] * world_size
        self.loads = [0] * world_size

    def place_end_to_end(self, large: Sequence[int]) -> bool:
        """Put stacks into the first shards; says whether they fit."""
        position, size = 0, self.size
        for i in large:
            total, unit = self.specs[i].numel, math.prod(self.specs[i].matrix)
            position += _gap(total, unit, size - position % size)
            if position + total > len(self.filled) * size:
                return False
            self.offsets[i] = position
            for rank in range(position // size, -(-(position + total) // size)):
                begin, end = max(position, rank * size), min(position + total, (rank + 1) * size)
                self.loads[rank] += self.work[i] * (end - begin) // total
                self.filled[rank] = align(end - rank * size)
            position += align(total)
        return True

    def place_balanced(self, loose: Sequence[int], numel: int, cost: int) -> bool:
        """Put each where work and elements together are least so far; says whether they fit."""
        heap = [
            (self.loads[rank] * numel + filled * cost, rank)
            for rank, filled in enumerate(self.filled)
            if filled < self.size
        ]
        heapq.heapify(heap)
        for i in loose:
            length = align(self.specs[i].numel)
            full = []
            while heap and self.filled[heap[0][1]] + length > self.size:
                full.append(heapq.heappop(heap))
            if not heap:
                return False
            share, rank = heap[0]
            self.offsets[i] = rank * self.size + self.filled[rank]
            self.filled[rank] += length
            self.loads[rank] += self.work[i]
            heapq.heapreplace(heap, (share + self.work[i] * numel + length * cost, rank))
            for entry in full:
                heapq.heappush(heap, entry)
        return True


def _gap(total: int, unit: int, room: int) -> int:
    """Elements to leave free so that the shard's end falls between two matrices of a stack."""
    if total <= room:
        return 0
    gap = room % unit if room >= unit else room
    return gap if gap % ALIGNMENT == 0 else room

"""Which matrices several ranks share, because one rank would hold the others up. Integers only.

Where one matrix costs more than a fair share of all work, or where there are more ranks than
matrices, one owner per matrix leaves the others waiting. Such a matrix is *split*: k ranks each
fetch a slice of its long side, form the slice's m x m Gram matrix and send it to the owner, one of
them; the owner evaluates the Newton-Schulz polynomial on the sum and sends two m x m factors back;
each rank multiplies its slice by them and returns the pieces (orthogonalize/parts.py).

The polynomial itself is not shared, so splitting gains less the nearer a matrix is to square, and
past a number of ranks the m x m messages outweigh the pieces that need not travel to one owner.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from distmuon.layout import Layout

# Rows of the panels in which a symmetric matrix travels: each goes up to its diagonal block.
_PANEL = 32
# Newton-Schulz steps that costs are counted for; only ratios matter.
_STEPS = 5

SplitDtype = Literal["float32", "float64"]


class Sharing(NamedTuple):
    """How far matrices may be split.

    Attributes:
        most: Most ranks that may share a matrix; 1 for none.
        itemsize: Bytes of an element of the Gram matrices.
    """

    most: int = 1
    itemsize: int = 4


@dataclass(frozen=True, slots=True)
class Split:
    """A matrix that several ranks share.

    Attributes:
        matrix: Index in the layout.
        owner: The rank that evaluates the polynomial; one of `ranks`.
        ranks: Who has a part, ascending: part i belongs to `ranks[i]`.
        cuts: Part i is `cuts[i]:cuts[i + 1]` of the long side.
    """

    matrix: int
    owner: int
    ranks: tuple[int, ...]
    cuts: tuple[int, ...]


def packed_panels(m: int) -> tuple[tuple[int, int], ...]:
    """Row panels (start, stop) of a symmetric matrix [m, m]; columns up to `stop` travel."""
    return tuple((start, min(start + _PANEL, m)) for start in range(0, m, _PANEL))


def packed_numel(m: int) -> int:
    """Elements that a symmetric matrix [m, m] takes in a message, a little over half."""
    return sum((stop - start) * stop for start, stop in packed_panels(m))


def most_parts(rows: int, columns: int, *, itemsize: int) -> int:
    """Into how many parts a matrix may be split before that sends more than one owner would.

    With its pieces on k ranks, one owner of a matrix m x n fetches and returns (k-1)/k of it in
    fp32, 8mn (k-1)/k bytes. Split k ways, k-1 ranks send one packed Gram matrix each and receive
    two factors: about 3/2 m² itemsize (k-1). So k pays up to 16/(3 itemsize) n/m: up to 4/3 n/m in
    float32 and 2/3 n/m in float64, less the packing's overhead.

    Args:
        rows: Rows of the matrix.
        columns: Columns of the matrix.
        itemsize: Bytes of an element of the Gram matrix.

    Returns:
        The largest such k; below 2 for a matrix that should not be split.
    """
    m, n = sorted((rows, columns))
    return min(8 * m * n // (3 * packed_numel(m) * itemsize), n)


def part_work(shape: Sequence[int], width: int, *, is_owner: bool) -> int:
    """What one part costs, in the operations that `newton_schulz_cost` counts.

    With symmetric products at half, a part of width w takes m²w for its Gram matrix and 4m²w for
    two factors, and its owner (4T - 3)m³ for T steps, where the whole matrix takes T (3m²n + m³).
    The cost is this share of the whole matrix's, T (4m²n + 2m³), with T = 5.

    Args:
        shape: The whole matrix's shape [m, n], in either orientation.
        width: Width of the part along the long side.
        is_owner: Whether the part's rank evaluates the polynomial.

    Returns:
        A count of operations, rounded up.
    """
    m, n = sorted(shape)
    polynomial = (4 * _STEPS - 3) * m if is_owner else 0
    return -(-m * m * (4 * n + 2 * m) * (5 * width + polynomial) // (3 * n + m))


def choose_splits(
    layout: Layout, owners: Sequence[int], work: Sequence[int], sharing: Sharing
) -> tuple[Split, ...]:
    """Split the matrices that cost more than a fair share, where that relieves their owners.

    Helpers are ranks that hold a piece of the matrix, unless they would become slower than the
    owner; then the least loaded ones.

    Args:
        layout: Where the matrices lie.
        owners: Owner of each matrix; it stays one of the matrix's ranks.
        work: Cost of each matrix when it is whole.
        sharing: How far they may be split.

    Returns:
        The splits by matrix; none if the slowest rank would not become faster.
    """
    if sharing.most < 2 or layout.world_size < 2:
        return ()
    total = sum(work)
    # A fused matrix has blocks, which no slice of its long side would keep whole.
    costly = [
        i
        for i, (each, spec) in enumerate(zip(work, layout.specs, strict=True))
        if each * layout.world_size > total and spec.blocks is None
    ]
    costly.sort(key=lambda i: (-work[i], i))
    whole = loads_with(layout, owners, work, ())
    best: tuple[Split, ...] = ()
    fastest = max(whole)
    # More ranks a matrix leave fewer for the next one, so that fewer can be better.
    for limit in range(2, sharing.most + 1) if costly else ():
        idle = _Idle(list(whole))
        chosen = _split_each(layout, owners, work, costly, Sharing(limit, sharing.itemsize), idle)
        if max(idle.loads) < fastest:
            best, fastest = chosen, max(idle.loads)
    return best


def _split_each(
    layout: Layout,
    owners: Sequence[int],
    work: Sequence[int],
    costly: Sequence[int],
    sharing: Sharing,
    idle: _Idle,
) -> tuple[Split, ...]:
    """Split one matrix after the other, where that relieves its owner."""
    chosen = []
    for matrix in costly:
        shape = layout.specs[matrix].shape
        fitting = most_parts(*shape, itemsize=sharing.itemsize)
        most = min(sharing.most, layout.world_size, fitting)
        split = _best_split(layout, matrix, owners[matrix], work[matrix], most=most, idle=idle)
        if split is not None:
            _exchange_loads(split, shape, work[matrix], idle.loads)
            idle.changed(split.ranks)
            chosen.append(split)
    return tuple(sorted(chosen, key=lambda split: split.matrix))


def loads_with(
    layout: Layout, owners: Sequence[int], work: Sequence[int], splits: Sequence[Split]
) -> list[int]:
    """Work of each rank.

    Args:
        layout: Where the matrices lie.
        owners: Owner of each matrix.
        work: Cost of each matrix when it is whole.
        splits: The matrices that are not.

    Returns:
        `world_size` counts of operations.
    """
    loads = [0] * layout.world_size
    for owner, each in zip(owners, work, strict=True):
        loads[owner] += each
    for split in splits:
        _exchange_loads(split, layout.specs[split.matrix].shape, work[split.matrix], loads)
    return loads


def _exchange_loads(split: Split, shape: Sequence[int], work: int, loads: list[int]) -> None:
    """Replace a whole matrix's cost at its owner by its parts' at all of its ranks."""
    loads[split.owner] -= work
    for rank, (start, stop) in zip(split.ranks, pairwise(split.cuts), strict=True):
        loads[rank] += part_work(shape, stop - start, is_owner=rank == split.owner)


class _Idle:
    """Ranks by load, the least loaded first, while loads change."""

    def __init__(self, loads: list[int]) -> None:
        self.loads = loads
        self._heap = [(load, rank) for rank, load in enumerate(loads)]
        heapq.heapify(self._heap)

    def take(self, count: int, but: Sequence[int]) -> list[int]:
        """The least loaded `count` ranks that are not in `but`; all stay in the heap."""
        seen: list[tuple[int, int]] = []
        found: list[int] = []
        while len(found) < count:
            load, rank = heapq.heappop(self._heap)
            if load != self.loads[rank] or rank in found:
                continue  # outdated, or pushed twice
            seen.append((load, rank))
            if rank not in but:
                found.append(rank)
        for entry in seen:
            heapq.heappush(self._heap, entry)
        return found

    def changed(self, ranks: Sequence[int]) -> None:
        """Enter the new loads of some ranks."""
        for rank in ranks:
            heapq.heappush(self._heap, (self.loads[rank], rank))


def _best_split(
    layout: Layout, matrix: int, owner: int, work: int, *, most: int, idle: _Idle
) -> Split | None:
    """The number of parts and the helpers that leave the slowest of a matrix's ranks fastest."""
    shape, loads = layout.specs[matrix].shape, idle.loads
    long = max(shape)
    best, fastest = None, loads[owner]
    for k in range(2, most + 1):
        width = -(-long // k)
        bound = loads[owner] - work + part_work(shape, width, is_owner=True)
        help_work = part_work(shape, width, is_owner=False)
        near = [
            segment.rank
            for segment in layout.holders(matrix)
            if segment.rank != owner and loads[segment.rank] + help_work <= bound
        ]
        helpers = sorted(near, key=lambda rank: (loads[rank], abs(rank - owner), rank))[: k - 1]
        helpers += idle.take(k - 1 - len(helpers), [owner, *helpers])
        slowest = max(bound, *(loads[rank] + help_work for rank in helpers))
        if slowest < fastest:
            fastest = slowest
            cuts = tuple(long * i // k for i in range(k + 1))
            best = Split(matrix, owner, tuple(sorted([owner, *helpers])), cuts)
    return best

"""Owners for matrices whose places are given: balance against the bytes that have to move.

One objective, in whole numbers: the slowest rank's work, plus the price of the elements that travel
to an owner and back, averaged over the ranks. Each matrix starts at the rank that holds most of it;
then bounds on the work are tried from loose to tight, and what exceeds a bound is given away, the
most work per moved element first. With equal shards this beats cutting the sequence of matrices by
work: there one costly matrix shifts every border after it, here only its neighbours in the same
shard travel.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from distmuon.layout import Layout

# Bounds that are tried: excess over the ideal load, halved so often; then these parts of the best.
_HALVINGS = 7
_REFINEMENTS = (5, 6, 7, 10, 12, 14)


@dataclass(frozen=True, slots=True)
class Owners:
    """A choice of owners and what it costs.

    Attributes:
        ranks: Owner of each matrix.
        loads: Work of each rank.
        moved: Elements that are held elsewhere than at their matrix's owner.
    """

    ranks: tuple[int, ...]
    loads: tuple[int, ...]
    moved: int

    def objective(self, price: int) -> int:
        """Slowest rank's work plus the price of movement, both times the number of ranks.

        Args:
            price: Work that takes as long as moving one element there and back.
        """
        return max(self.loads) * len(self.loads) + price * self.moved


def rate(layout: Layout, work: Sequence[int], ranks: Sequence[int]) -> Owners:
    """What a choice of owners costs.

    Args:
        layout: Where the matrices lie.
        work: Cost of each matrix.
        ranks: Owner of each matrix.

    Returns:
        The choice with its figures.
    """
    loads = [0] * layout.world_size
    moved = 0
    for index, (amount, rank) in enumerate(zip(work, ranks, strict=True)):
        loads[rank] += amount
        moved += layout.specs[index].numel - layout.held(index, rank)
    return Owners(tuple(ranks), tuple(loads), moved)


def choose_owners(layout: Layout, work: Sequence[int], *, price: int) -> Owners:
    """Pick owners among the holders, and others only where the balance is worth the bytes.

    Args:
        layout: Where the matrices lie; nothing is reordered.
        work: Cost of each matrix.
        price: Work that takes as long as moving one element there and back.

    Returns:
        The best choice found; ties go to the first, so every rank agrees. Near-linear in the
        number of matrices and ranks.
    """
    start = _start(layout, work, price)
    floor = max(-(-sum(work) // layout.world_size), max(work, default=0))
    excess = max(start.loads) - floor
    offers = _offers(layout, work, start, floor)
    tried = {excess: start}
    for _ in range(_HALVINGS):
        excess //= 2
        tried[excess] = _give_away(layout, work, start, offers, floor + excess)
    nearest = min(tried, key=lambda each: tried[each].objective(price))
    for eighths in _REFINEMENTS:
        excess = nearest * eighths // 8
        tried[excess] = _give_away(layout, work, start, offers, floor + excess)
    return min(tried.values(), key=lambda choice: choice.objective(price))


def _start(layout: Layout, work: Sequence[int], price: int) -> Owners:
    """Whole matrices stay; those that are cut go to the holder where they cost least, large first.

    What counts is the load that the holder then has, and the price of what it lacks.
    """
    owners, loads, cut = [], [0] * layout.world_size, []
    for index, amount in enumerate(work):
        holders = layout.span(index)
        owners.append(holders[0])
        if len(holders) == 1:
            loads[holders[0]] += amount
        else:
            cut.append(index)
    moved = 0
    for index in sorted(cut, key=lambda i: (-work[i], i)):
        held = {rank: layout.held(index, rank) for rank in layout.span(index)}
        owner = min(held, key=lambda rank: (loads[rank] - price * held[rank], rank))
        owners[index] = owner
        loads[owner] += work[index]
        moved += layout.specs[index].numel - held[owner]
    return Owners(tuple(owners), tuple(loads), moved)


def _offers(
    layout: Layout, work: Sequence[int], start: Owners, floor: int
) -> list[tuple[int, list[int]]]:
    """For each rank with too much work, the most loaded first, what it gives away first."""
    owned: dict[int, list[int]] = {
        rank: [] for rank, load in enumerate(start.loads) if load > floor
    }
    for index, rank in enumerate(start.ranks):
        if rank in owned:
            owned[rank].append(index)
    # Elements that moving it adds, per work: in whole numbers, so that every rank agrees.
    for rank, members in owned.items():
        members.sort(key=lambda i: ((layout.held(i, rank) << 64) // work[i], i))
    return sorted(owned.items(), key=lambda item: (-start.loads[item[0]], item[0]))


def _give_away(
    layout: Layout,
    work: Sequence[int],
    start: Owners,
    offers: Sequence[tuple[int, Sequence[int]]],
    bound: int,
) -> Owners:
    """Move matrices from ranks above the bound to ranks that stay below it with them."""
    owners, loads = list(start.ranks), list(start.loads)
    moved = start.moved
    idle = [(load, rank) for rank, load in enumerate(loads) if load < bound]
    heapq.heapify(idle)
    for giver, members in offers:
        for index in members:
            if loads[giver] <= bound:
                break
            taker = _taker(layout, index, bound - work[index], loads, idle)
            if taker is not None:
                moved += layout.held(index, giver) - layout.held(index, taker)
                owners[index] = taker
                loads[giver] -= work[index]
                loads[taker] += work[index]
    return Owners(tuple(owners), tuple(loads), moved)


def _taker(
    layout: Layout, index: int, most: int, loads: Sequence[int], idle: list[tuple[int, int]]
) -> int | None:
    """Who may take a matrix: the holder of most of it, else the rank with the least work."""
    near = [rank for rank in layout.span(index) if loads[rank] <= most]
    if near:
        return max(near, key=lambda rank: (layout.held(index, rank), -rank))
    while idle and idle[0] != (loads[idle[0][1]], idle[0][1]):
        heapq.heapreplace(idle, (loads[idle[0][1]], idle[0][1]))  # it took something meanwhile
    return idle[0][1] if idle and idle[0][0] <= most else None

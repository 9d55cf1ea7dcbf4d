"""Owners for matrices whose places are given: balance against the bytes that have to move.

One objective, in whole numbers: the slowest rank's work, plus the price of the elements that travel
to an owner and back, averaged over the ranks. Each matrix starts at a rank that holds much of it;
then bounds on the work are tried from loose to tight, and what exceeds a bound is given away, the
most work per moved element first. This beats cutting the sequence of matrices by work: there one
costly matrix shifts every border after it, here only its neighbours in the same shard travel.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True, slots=True)
class Places:
    """Where matrices lie and what they cost, prepared for many questions.

    Attributes:
        held: For each matrix the elements that each of its holders has.
        work: Cost of each matrix.
        world_size: Number of ranks.
        price: Work that takes as long as moving one element there and back.
    """

    held: tuple[dict[int, int], ...]
    work: tuple[int, ...]
    world_size: int
    price: int

    def rate(self, ranks: Sequence[int]) -> Owners:
        """What a choice of owners costs.

        Args:
            ranks: Owner of each matrix.
        """
        loads = [0] * self.world_size
        moved = 0
        for pieces, amount, rank in zip(self.held, self.work, ranks, strict=True):
            loads[rank] += amount
            if rank not in pieces or len(pieces) > 1:
                moved += sum(pieces.values()) - pieces.get(rank, 0)
        return Owners(tuple(ranks), tuple(loads), moved)

    def by_size(self) -> list[int]:
        """The matrices, the costliest first."""
        return sorted(range(len(self.work)), key=lambda i: (-self.work[i], i))


def look_up(layout: Layout, work: Sequence[int], *, price: int) -> Places:
    """Prepare a layout for `choose_owners`.

    Args:
        layout: Where the matrices lie.
        work: Cost of each matrix.
        price: Work that takes as long as moving one element there and back.

    Returns:
        The holders of each matrix.
    """
    held = []
    for index, spec in enumerate(layout.specs):
        span = layout.span(index)
        alone = len(span) == 1
        held.append(
            {span[0]: spec.numel} if alone else {rank: layout.held(index, rank) for rank in span}
        )
    return Places(tuple(held), tuple(work), layout.world_size, price)


def choose_owners(places: Places) -> Owners:
    """Pick owners among the holders, and others only where the balance is worth the bytes.

    Args:
        places: Where the matrices lie; nothing is reordered.

    Returns:
        The best choice found; ties go to the first, so every rank agrees. Near-linear in the
        number of matrices and ranks.
    """
    start = _start(places)
    floor = max((-(-sum(places.work) // places.world_size), *places.work))
    excess = max(start.loads) - floor
    offers = _offers(places, start, floor)
    tried = {excess: start}
    for _ in range(_HALVINGS):
        excess //= 2
        tried[excess] = _give_away(places, start, offers, floor + excess)
    nearest = min(tried, key=lambda each: tried[each].objective(places.price))
    for eighths in _REFINEMENTS:
        excess = nearest * eighths // 8
        tried[excess] = _give_away(places, start, offers, floor + excess)
    choices = (*tried.values(), _largest_first(places))
    return min(choices, key=lambda choice: choice.objective(places.price))


def _start(places: Places) -> Owners:
    """Whole matrices stay; those that are cut go to the holder where they cost least, large first.

    What counts is the load that the holder then has, and the price of what it lacks.
    """
    owners, loads = [min(pieces) for pieces in places.held], [0] * places.world_size
    cut = []
    for index, pieces in enumerate(places.held):
        if len(pieces) == 1:
            loads[owners[index]] += places.work[index]
        else:
            cut.append(index)
    for index in sorted(cut, key=lambda i: (-places.work[i], i)):
        pieces = places.held[index]
        owner = min(pieces, key=lambda rank: (loads[rank] - places.price * pieces[rank], rank))
        owners[index] = owner
        loads[owner] += places.work[index]
    return places.rate(owners)


def _largest_first(places: Places) -> Owners:
    """The costliest matrix goes to the least loaded rank, or to a holder if that is cheaper."""
    world_size, price = places.world_size, places.price
    loads = [0] * world_size
    owners = [0] * len(places.work)
    idle = [(0, rank) for rank in range(world_size)]
    for index in places.by_size():
        _refresh(idle, loads)
        owner, least = idle[0][1], idle[0][0] * world_size
        for rank, held in places.held[index].items():
            if loads[rank] * world_size - price * held <= least:
                owner, least = rank, loads[rank] * world_size - price * held
        owners[index] = owner
        loads[owner] += places.work[index]
    return places.rate(owners)


def _refresh(idle: list[tuple[int, int]], loads: Sequence[int]) -> None:
    """Bring the least loaded rank to the top of a heap whose loads have grown since."""
    while idle and idle[0][0] != loads[idle[0][1]]:
        heapq.heapreplace(idle, (loads[idle[0][1]], idle[0][1]))


def _offers(places: Places, start: Owners, floor: int) -> list[tuple[int, list[int]]]:
    """For each rank with too much work, the most loaded first, what it gives away first."""
    owned: dict[int, list[int]] = {
        rank: [] for rank, load in enumerate(start.loads) if load > floor
    }
    for index, rank in enumerate(start.ranks):
        if rank in owned:
            owned[rank].append(index)
    # Elements that moving it adds, per work: in whole numbers, so that every rank agrees.
    for rank, members in owned.items():
        members.sort(key=lambda i: ((places.held[i].get(rank, 0) << 64) // places.work[i], i))
    return sorted(owned.items(), key=lambda item: (-start.loads[item[0]], item[0]))


def _give_away(
    places: Places, start: Owners, offers: Sequence[tuple[int, Sequence[int]]], bound: int
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
            pieces, amount = places.held[index], places.work[index]
            taker = _taker(pieces, bound - amount, loads, idle)
            if taker is not None:
                moved += pieces.get(giver, 0) - pieces.get(taker, 0)
                owners[index] = taker
                loads[giver] -= amount
                loads[taker] += amount
    return Owners(tuple(owners), tuple(loads), moved)


def _taker(
    pieces: Mapping[int, int], most: int, loads: Sequence[int], idle: list[tuple[int, int]]
) -> int | None:
    """Who may take a matrix: the holder of most of it, else the rank with the least work."""
    near = [rank for rank in pieces if loads[rank] <= most]
    if near:
        return max(near, key=lambda rank: (pieces[rank], -rank))
    _refresh(idle, loads)
    return idle[0][1] if idle and idle[0][0] <= most else None

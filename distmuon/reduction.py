"""Which pieces of a set of gradients go to which rank. Integers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from distmuon.layout import Layout, Segment


class Member(NamedTuple):
    """A parameter by its place: which flat buffer, and which tensor of its layout."""

    bucket: int
    tensor: int


@dataclass(frozen=True, slots=True)
class ReductionPlan:
    """How gradients that every rank has whole are summed straight into the flat ranges.

    Attributes:
        pieces: Every piece of every member, in the order of sending: by receiving rank first.
        counts: Elements for each rank.
        mine: This rank's pieces, with the offset of each in what it receives from any one rank.
    """

    pieces: tuple[tuple[Member, Segment], ...]
    counts: tuple[int, ...]
    mine: tuple[tuple[Member, Segment, int], ...]


def plan_reduction(
    members: Sequence[Member], layouts: Sequence[Layout], rank: int
) -> ReductionPlan:
    """Cut gradients into the pieces that the ranks hold.

    Args:
        members: The parameters, in an order that all ranks share.
        layouts: Layout of each flat buffer.
        rank: The rank to plan for.

    Returns:
        The plan; what a rank receives from each rank has the same order and length.
    """
    cut = [(member, s) for member in members for s in layouts[member.bucket].holders(member.tensor)]
    pieces = sorted(cut, key=lambda piece: piece[1].rank)  # stable: members stay in their order
    counts = [0] * layouts[0].world_size
    mine = []
    for member, segment in pieces:
        if segment.rank == rank:
            mine.append((member, segment, counts[rank]))
        counts[segment.rank] += segment.numel
    return ReductionPlan(tuple(pieces), tuple(counts), tuple(mine))

"""What one rank sends and receives so that owners see whole matrices. Integers only.

The gather moves every piece that a non-owner holds to the matrix's owner; the scatter moves the
update of the same pieces back, so one list of transfers describes both directions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from distmuon.layout import Layout, Segment
from distmuon.ownership import Ownership


@dataclass(frozen=True, slots=True)
class Transfer:
    """A piece that travels between its holder and its owner.

    Attributes:
        peer: The rank at the other end.
        segment: The piece, as the holder sees it.
        buffer_start: Offset of the piece in the packed buffer of this rank, in elements.
    """

    peer: int
    segment: Segment
    buffer_start: int


@dataclass(frozen=True, slots=True)
class ExchangePlan:
    """One rank's part in the gather and scatter of one flat buffer.

    Attributes:
        ownership: The layout and the owners, the same on every rank.
        rank: The rank this plan is for.
        segments: Pieces in this rank's shard, in shard order.
        owned: Tensors this rank orthogonalizes, by index in the layout.
        outgoing: Pieces held here and owned elsewhere, packed by (peer, tensor, offset).
        incoming: Pieces owned here and held elsewhere, packed by (peer, tensor, offset).
    """

    ownership: Ownership
    rank: int
    segments: tuple[Segment, ...]
    owned: tuple[int, ...]
    outgoing: tuple[Transfer, ...]
    incoming: tuple[Transfer, ...]

    @property
    def outgoing_numel(self) -> int:
        """Elements sent in the gather and received in the scatter."""
        return sum(t.segment.numel for t in self.outgoing)

    @property
    def incoming_numel(self) -> int:
        """Elements received in the gather and sent in the scatter."""
        return sum(t.segment.numel for t in self.incoming)


def build_plan(ownership: Ownership, rank: int) -> ExchangePlan:
    """Derive one rank's transfers from the owners.

    Args:
        ownership: The layout and its owners.
        rank: The rank to plan for.

    Returns:
        The plan; the outgoing list of rank a towards b equals b's incoming list from a.
    """
    layout, owners = ownership.layout, ownership.owners
    segments = layout.segments(rank)
    owned = tuple(i for i, owner in enumerate(owners) if owner == rank)
    sends = ((owners[s.tensor], s) for s in segments if owners[s.tensor] != rank)
    receives = ((s.rank, s) for i in owned for s in layout.holders(i) if s.rank != rank)
    return ExchangePlan(ownership, rank, segments, owned, _pack(sends), _pack(receives))


def peer_counts(transfers: Iterable[Transfer], world_size: int) -> list[int]:
    """Elements exchanged with each peer, as an all-to-all wants them.

    Args:
        transfers: One direction of a plan.
        world_size: Number of ranks.

    Returns:
        `world_size` counts.
    """
    counts = [0] * world_size
    for transfer in transfers:
        counts[transfer.peer] += transfer.segment.numel
    return counts


def describe(layout: Layout, owners: Sequence[int | None]) -> list[str]:
    """Lines that must be the same on every rank before anything is exchanged.

    Args:
        layout: Where the tensors lie.
        owners: Owner of each tensor; None where nothing is gathered (elementwise rules).

    Returns:
        Readable lines; the first that differs between two ranks names the mistake.
    """
    head = f"world size {layout.world_size}, {layout.shard_numel} elements per shard"
    rows = zip(layout.specs, layout.offsets, owners, strict=True)
    return [head] + [
        f"{spec.name}: shape {list(spec.shape)}, flat offset {offset}, owner {owner}"
        for spec, offset, owner in rows
    ]


def digest(lines: Iterable[str]) -> bytes:
    """SHA-256 of lines, 32 bytes."""
    return hashlib.sha256("\n".join(lines).encode()).digest()


def _pack(pairs: Iterable[tuple[int, Segment]]) -> tuple[Transfer, ...]:
    ordered = sorted(pairs, key=lambda pair: (pair[0], pair[1].tensor, pair[1].tensor_start))
    packed, end = [], 0
    for peer, segment in ordered:
        packed.append(Transfer(peer, segment, end))
        end += segment.numel
    return tuple(packed)

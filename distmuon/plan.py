"""What one rank sends and receives so that owners see whole matrices. Integers only.

The gather moves every piece that a non-owner holds to the matrix's owner; the scatter moves the
update of the same pieces back, so one list of transfers describes both directions.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from distmuon.layout import Layout, Segment, TensorSpec
from distmuon.ownership import Ownership
from distmuon.split_plan import SplitPlan, build_split_plan


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
class Wave:
    """One round of messages, fetched, orthogonalized and returned together.

    Attributes:
        tensors: Matrices of this round that this rank orthogonalizes, by index in the layout.
        outgoing: Pieces held here and owned elsewhere, packed by (peer, tensor, offset).
        incoming: Pieces owned here and held elsewhere, packed by (peer, tensor, offset).
        batches: `tensors` by shape and parameter group.
    """

    tensors: tuple[int, ...]
    outgoing: tuple[Transfer, ...]
    incoming: tuple[Transfer, ...]
    batches: tuple[tuple[int, ...], ...]

    @property
    def outgoing_numel(self) -> int:
        """Elements sent in the gather and received in the scatter."""
        return sum(t.segment.numel for t in self.outgoing)

    @property
    def incoming_numel(self) -> int:
        """Elements received in the gather and sent in the scatter."""
        return sum(t.segment.numel for t in self.incoming)


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of every rank's shard that is final before the first wave has come back.

    Attributes:
        start: Its first element, the same in all shards.
        stop: One past its last.
        tensors: Matrices of this rank that must be done first.
    """

    start: int
    stop: int
    tensors: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ExchangePlan:
    """One rank's part in the gather and scatter of one flat buffer.

    Attributes:
        ownership: The layout and the owners, the same on every rank.
        rank: The rank this plan is for.
        segments: Pieces of matrices in this rank's shard, in shard order.
        local: Matrices this rank owns and holds whole: nothing is sent for them.
        batches: The local ones by shape and parameter group, in flat order: each may be
            orthogonalized as one stack.
        waves: Rounds of messages; every rank has the same number of them.
        split: What this rank does for matrices that several ranks share.
        parts: What may be published while other matrices are still to come, in this order.
    """

    ownership: Ownership
    rank: int
    segments: tuple[Segment, ...]
    local: tuple[int, ...]
    batches: tuple[tuple[int, ...], ...]
    waves: tuple[Wave, ...]
    split: SplitPlan
    parts: tuple[Part, ...] = ()

    @property
    def owned(self) -> tuple[int, ...]:
        """Matrices this rank orthogonalizes, by index in the layout."""
        return self.ownership.owned(self.rank)

    @property
    def reason(self) -> str:
        """Why this layout, with the predicted figures of those it was compared with."""
        return self.ownership.reason

    @property
    def outgoing_numel(self) -> int:
        """Elements sent in the gather and received in the scatter, slices included."""
        return sum(wave.outgoing_numel for wave in self.waves) + self.split.outgoing_numel

    @property
    def incoming_numel(self) -> int:
        """Elements received in the gather and sent in the scatter, slices included."""
        return sum(wave.incoming_numel for wave in self.waves) + self.split.incoming_numel


def build_plan(
    ownership: Ownership,
    rank: int,
    *,
    wave_numel: int,
    groups: Sequence[int] = (),
    part_numel: int = 0,
) -> ExchangePlan:
    """Derive one rank's transfers from the owners.

    Args:
        ownership: The layout and its owners.
        rank: The rank to plan for.
        wave_numel: Most elements that one owner fetches in a wave; one matrix may exceed it.
        groups: Parameter group of each parameter, in flat order; none for a single group.
        part_numel: Elements of a shard that are published at a time; 0 for all at once.

    Returns:
        The plan; what rank a sends to b in a wave is what b receives from a in it.
    """
    layout, owners = ownership.layout, ownership.owners
    segments, owned = layout.segments(rank), ownership.owned(rank)
    rounds, shared = ownership.waves(wave_numel), ownership.shared
    local: list[int] = []
    matrices: defaultdict[int, list[int]] = defaultdict(list)
    sends: defaultdict[int, list[tuple[int, Segment]]] = defaultdict(list)
    receives: defaultdict[int, list[tuple[int, Segment]]] = defaultdict(list)
    for index in owned:
        wave = rounds[index]
        if wave is None:
            if index not in shared:
                local.append(index)
            continue
        matrices[wave].append(index)
        receives[wave].extend((s.rank, s) for s in layout.holders(index) if s.rank != rank)
    for segment in segments:
        wave = rounds[segment.tensor]
        if owners[segment.tensor] != rank and wave is not None:
            sends[wave].append((owners[segment.tensor], segment))

    def alike(indices: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        found: defaultdict[tuple[TensorSpec, int], list[int]] = defaultdict(list)
        for index in indices:
            group = groups[ownership.members[index]] if groups else 0
            found[replace(layout.specs[index], name=""), group].append(index)
        return tuple(map(tuple, found.values()))

    waves = tuple(
        Wave(
            tuple(matrices[wave]), _pack(sends[wave]), _pack(receives[wave]), alike(matrices[wave])
        )
        for wave in range(1 + max((r for r in rounds if r is not None), default=-1))
    )
    split = build_split_plan(layout, ownership.splits, rank, wave_numel=wave_numel)
    moving = [index for index, wave in enumerate(rounds) if wave is not None or index in shared]
    parts = _cut_parts(layout, moving, [s for s in segments if s.tensor in set(local)], part_numel)
    return ExchangePlan(ownership, rank, segments, tuple(local), alike(local), waves, split, parts)


def _cut_parts(
    layout: Layout, moving: Iterable[int], own: Sequence[Segment], part_numel: int
) -> tuple[Part, ...]:
    """Cut the longest stretch that no moving matrix touches in any shard."""
    if not part_numel:
        return ()
    touched = sorted(
        (s.shard_start, s.shard_start + s.numel) for i in moving for s in layout.holders(i)
    )
    best = (0, 0)
    free = 0
    for start, stop in (*touched, (layout.shard_numel, layout.shard_numel)):
        best = max(best, (free, start), key=lambda span: span[1] - span[0])
        free = max(free, stop)
    parts = []
    for start in range(best[0], best[1], part_numel):
        stop = min(start + part_numel, best[1])
        inside = (s for s in own if s.shard_start < stop and s.shard_start + s.numel > start)
        parts.append(Part(start, stop, tuple(s.tensor for s in inside)))
    return tuple(parts)


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


def describe(layout: Layout, notes: Sequence[str]) -> list[str]:
    """Lines that must be the same on every rank before anything is exchanged.

    Args:
        layout: Where the tensors lie.
        notes: What else belongs to each tensor: its owner, its group.

    Returns:
        Readable lines; the first that differs between two ranks names the mistake.
    """
    head = f"world size {layout.world_size}, {layout.shard_numel} elements per shard"
    rows = zip(layout.specs, layout.offsets, notes, strict=True)
    return [head] + [
        f"{spec.name}: shape {list(spec.shape)}{spec.reading}, flat offset {offset}, {note}"
        for spec, offset, note in rows
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

"""What each rank sends so that split matrices are orthogonalized. Integers only.

A part is a rectangle of its matrix: whole rows, or a range of columns of every row. What a holder
has of a matrix is a run of elements, which is at most three rectangles; their intersections with
the parts are what travels, and no element travels that its part does not need.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, NamedTuple

from distmuon.layout import Layout, Segment
from distmuon.splits import Split, packed_numel

MessageKind = Literal["gram", "transform"]


@dataclass(frozen=True, slots=True)
class Block:
    """A rectangle of a matrix that travels between its holder and the owner of a part.

    Attributes:
        matrix: Index in the layout.
        peer: The rank at the other end; this rank itself if nothing has to travel.
        rows: Rows of the rectangle.
        columns: Columns of the rectangle.
        shard_start: Offset of its first element in the holder's shard.
        shard_stride: Elements between its rows there.
        slice_start: Offset of its first element in the slice.
        slice_stride: Elements between its rows there.
        buffer_start: Offset of the packed rectangle in the message.
    """

    matrix: int
    peer: int
    rows: int
    columns: int
    shard_start: int
    shard_stride: int
    slice_start: int
    slice_stride: int
    buffer_start: int

    @property
    def numel(self) -> int:
        """Elements of the rectangle."""
        return self.rows * self.columns


@dataclass(frozen=True, slots=True)
class Part:
    """One rank's part of a split matrix.

    Attributes:
        split: The matrix and who shares it.
        rows: Rows of the slice as it is stored.
        columns: Columns of the slice as it is stored.
        short: The matrix's shorter side, m.
        sliced: Which side is cut: the longer one, columns for a square matrix.
    """

    split: Split
    rows: int
    columns: int
    short: int
    sliced: Literal["rows", "columns"]

    def message_numel(self, kind: MessageKind) -> int:
        """Elements of a packed message: one Gram matrix, or two factors; and their scale."""
        return (1 if kind == "gram" else 2) * packed_numel(self.short) + 1


@dataclass(frozen=True, slots=True)
class Route:
    """Between whom a Gram matrix and a transform travel.

    Attributes:
        peer: The rank at the other end.
        part: The matrix, as this rank sees it.
    """

    peer: int
    part: Part


@dataclass(frozen=True, slots=True)
class SplitWave:
    """Split matrices that are fetched, computed and returned together.

    Attributes:
        parts: This rank's parts, by matrix.
        outgoing: Rectangles held here for parts elsewhere, packed by (peer, matrix, offset).
        incoming: Rectangles held elsewhere for parts here, packed by (peer, matrix, offset).
        kept: Rectangles held here for parts here.
        to_owners: For each part here whose matrix is owned elsewhere, by (owner, matrix).
        to_parts: For each part elsewhere whose matrix is owned here, by (rank, matrix).
    """

    parts: tuple[Part, ...]
    outgoing: tuple[Block, ...]
    incoming: tuple[Block, ...]
    kept: tuple[Block, ...]
    to_owners: tuple[Route, ...]
    to_parts: tuple[Route, ...]


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """One rank's part in all split matrices of a flat buffer.

    Attributes:
        rank: The rank this plan is for.
        waves: Rounds of messages; every rank has the same number of them.
    """

    rank: int
    waves: tuple[SplitWave, ...]

    @property
    def outgoing_numel(self) -> int:
        """Elements sent in the gather and received in the scatter."""
        return sum(block.numel for wave in self.waves for block in wave.outgoing)

    @property
    def incoming_numel(self) -> int:
        """Elements received in the gather and sent in the scatter."""
        return sum(block.numel for wave in self.waves for block in wave.incoming)

    def sent_numel(self, kind: MessageKind) -> int:
        """Elements of Gram matrices sent to owners, or of transforms sent to parts."""
        routes = (
            route
            for wave in self.waves
            for route in (wave.to_owners if kind == "gram" else wave.to_parts)
        )
        return sum(route.part.message_numel(kind) for route in routes)


def build_split_plan(
    layout: Layout, splits: Sequence[Split], rank: int, *, wave_numel: int
) -> SplitPlan:
    """Derive one rank's messages.

    Args:
        layout: Where the matrices lie.
        splits: Which are split, by matrix; the same on every rank.
        rank: The rank to plan for.
        wave_numel: Most elements of slices, Gram matrices and transforms that a rank has to do with
            in a wave; a single matrix may exceed it.

    Returns:
        The plan; what rank a sends to b in a wave is what b receives from a in it.
    """
    rounds = _rounds(layout, splits, wave_numel)
    parts: defaultdict[int, list[Part]] = defaultdict(list)
    blocks: defaultdict[tuple[int, str], list[Block]] = defaultdict(list)
    for split, wave in zip(splits, rounds, strict=True):
        if rank in split.ranks:
            parts[wave].append(_part(layout, split, split.ranks.index(rank)))
        for holder, user, block in _pieces(layout, split, rank):
            direction = "kept" if holder == user else "outgoing" if holder == rank else "incoming"
            blocks[wave, direction].append(block)
    waves = tuple(
        SplitWave(
            tuple(parts[wave]),
            _pack(blocks[wave, "outgoing"]),
            _pack(blocks[wave, "incoming"]),
            tuple(blocks[wave, "kept"]),
            *_routes(parts[wave], rank),
        )
        for wave in range(max(rounds, default=-1) + 1)
    )
    return SplitPlan(rank, waves)


def _routes(parts: Sequence[Part], rank: int) -> tuple[tuple[Route, ...], tuple[Route, ...]]:
    to_owners = [Route(part.split.owner, part) for part in parts if part.split.owner != rank]
    to_parts = [
        Route(peer, part)
        for part in parts
        if part.split.owner == rank
        for peer in part.split.ranks
        if peer != rank
    ]
    return tuple(sorted(to_owners, key=_by_peer)), tuple(sorted(to_parts, key=_by_peer))


def _by_peer(route: Route) -> tuple[int, int]:
    return route.peer, route.part.split.matrix


def _rounds(layout: Layout, splits: Sequence[Split], wave_numel: int) -> list[int]:
    """In which wave each split matrix is done, from 0."""
    wave: defaultdict[int, int] = defaultdict(int)
    used: defaultdict[int, int] = defaultdict(int)
    rounds = []
    for split in splits:
        m, n = sorted(layout.specs[split.matrix].shape)
        small = 3 * packed_numel(m) + 2
        needs = {
            rank: m * (stop - start)
            + (small * (len(split.ranks) - 1) if rank == split.owner else small)
            for rank, (start, stop) in zip(split.ranks, pairwise(split.cuts), strict=True)
        }
        assert split.cuts[-1] == n, "the cuts cover the long side"
        round_ = max(wave[rank] for rank in split.ranks)
        if any(
            wave[rank] == round_ and used[rank] and used[rank] + need > wave_numel
            for rank, need in needs.items()
        ):
            round_ += 1
        for rank, need in needs.items():
            used[rank] = need + (used[rank] if wave[rank] == round_ else 0)
            wave[rank] = round_
        rounds.append(round_)
    return rounds


class _Rectangle(NamedTuple):
    """Rows and columns of a matrix, as half-open ranges."""

    top: int
    bottom: int
    left: int
    right: int


def _part_rectangle(layout: Layout, split: Split, index: int) -> _Rectangle:
    rows, columns = layout.specs[split.matrix].shape
    start, stop = split.cuts[index], split.cuts[index + 1]
    if columns >= rows:
        return _Rectangle(0, rows, start, stop)
    return _Rectangle(start, stop, 0, columns)


def _part(layout: Layout, split: Split, index: int) -> Part:
    rows, columns = layout.specs[split.matrix].shape
    whole = _part_rectangle(layout, split, index)
    return Part(
        split,
        whole.bottom - whole.top,
        whole.right - whole.left,
        min(rows, columns),
        "columns" if columns >= rows else "rows",
    )


def moved_pieces(layout: Layout, split: Split) -> Iterator[tuple[int, int, int]]:
    """What has to travel so that every part of a matrix is whole.

    Args:
        layout: Where the matrices lie.
        split: The matrix and who shares it.

    Yields:
        The rank that holds a piece, another that needs it, and its elements.
    """
    for segment in layout.holders(split.matrix):
        for index, user in enumerate(split.ranks):
            if user != segment.rank:
                blocks = _overlap(layout, split, segment, index)
                yield segment.rank, user, sum(block.numel for block in blocks)


def _pieces(layout: Layout, split: Split, rank: int) -> Iterator[tuple[int, int, Block]]:
    """Rectangles that `rank` holds, or needs, or both, with their holder and the part's owner."""
    for segment in layout.holders(split.matrix):
        for index, user in enumerate(split.ranks):
            if rank not in (segment.rank, user):
                continue
            for block in _overlap(layout, split, segment, index):
                peer = segment.rank if user == rank else user
                yield segment.rank, user, replace(block, peer=peer)


def _overlap(layout: Layout, split: Split, segment: Segment, index: int) -> Iterator[Block]:
    columns = layout.specs[split.matrix].shape[1]
    part = _part_rectangle(layout, split, index)
    for run in _rectangles(segment.tensor_start, segment.tensor_start + segment.numel, columns):
        top, bottom = max(run.top, part.top), min(run.bottom, part.bottom)
        left, right = max(run.left, part.left), min(run.right, part.right)
        if top < bottom and left < right:
            width = part.right - part.left
            yield Block(
                matrix=split.matrix,
                peer=segment.rank,
                rows=bottom - top,
                columns=right - left,
                shard_start=segment.shard_start + top * columns + left - segment.tensor_start,
                shard_stride=columns,
                slice_start=(top - part.top) * width + left - part.left,
                slice_stride=width,
                buffer_start=0,
            )


def _rectangles(start: int, stop: int, columns: int) -> Iterator[_Rectangle]:
    """A run of elements of a row-major matrix: the end of a row, whole rows, the start of one."""
    top, left = divmod(start, columns)
    bottom, right = divmod(stop, columns)
    if top == bottom:
        yield _Rectangle(top, top + 1, left, right)
        return
    if left:
        yield _Rectangle(top, top + 1, left, columns)
        top += 1
    if top < bottom:
        yield _Rectangle(top, bottom, 0, columns)
    if right:
        yield _Rectangle(bottom, bottom + 1, 0, right)


def _pack(blocks: Iterable[Block]) -> tuple[Block, ...]:
    # Within a peer and a matrix the blocks come in flat order at both ends.
    packed, end = [], 0
    for block in sorted(blocks, key=lambda block: (block.peer, block.matrix)):
        packed.append(replace(block, buffer_start=end))
        end += block.numel
    return tuple(packed)

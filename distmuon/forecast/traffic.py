"""What every rank sends in one step, and what it computes: the plan's own numbers, for all ranks.

`Muon.report()` counts the same bytes under the same names as they are sent; the tests compare both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from distmuon.buckets import BucketSpec
from distmuon.layout import Layout
from distmuon.options import Policy
from distmuon.report import planned_loads
from distmuon.split_plan import moved_pieces
from distmuon.splits import packed_numel

# What the agreement before a step sends beside one number for each parameter.
_AGREED = 4


class Move(NamedTuple):
    """Momentum that one rank holds and another needs, in bytes."""

    holder: int
    owner: int
    nbytes: int


def bytes_per_rank(specs: Sequence[BucketSpec], policy: Policy) -> dict[str, list[int]]:
    """Bytes that each rank sends in one step in which every parameter has a gradient.

    Args:
        specs: All buckets.
        policy: Says who averages the gradients, and how wide Gram matrices travel.

    Returns:
        A count for each rank by kind, as in `Report.bytes_sent`, kinds of which nobody sends
        anything left out. "all-reduce" is DistributedDataParallel's own, with reduce="ddp": that
        is not in the report. Clipping sends a few bytes more.
    """
    world_size = specs[0].layout.world_size
    found: dict[str, list[int]] = {}
    if world_size == 1:
        return found

    def add(kind: str, counts: Sequence[int]) -> None:
        before = found.setdefault(kind, [0] * world_size)
        found[kind] = [a + b for a, b in zip(before, counts, strict=True)]

    for spec in specs:
        itemsize, numel = spec.parameters[0].element_size(), spec.numel
        if policy.reduce == "ddp":
            whole = 2 * numel * itemsize * (world_size - 1) // world_size
            add("all-reduce", [whole] * world_size)
        else:
            add("reduce", [(numel - held) * itemsize for held in held_numel(spec.layout)])
        add("publish", [spec.layout.shard_numel * itemsize * (world_size - 1)] * world_size)
        if spec.ownership is not None:
            for kind, counts in exchanged(spec, policy).items():
                add(kind, counts)
    agreed = 8 * (sum(len(spec.parameters) for spec in specs) + _AGREED)
    add("agree", [2 * (world_size - 1) * agreed // world_size] * world_size)
    return {kind: counts for kind, counts in found.items() if any(counts)}


def exchanged(spec: BucketSpec, policy: Policy) -> dict[str, list[int]]:
    """Bytes that each rank sends so that owners see whole matrices, and so that all get theirs.

    Args:
        spec: Of matrices: places, owners and split matrices.
        policy: Says how wide momentum and Gram matrices travel.

    Returns:
        "gather", "scatter", "gram" and "transform", a count for each rank.
    """
    ownership = spec.ownership
    assert ownership is not None, "only matrices have owners"
    layout = ownership.layout
    wire, itemsize = wire_itemsize(spec, policy), master_itemsize(spec)
    gathered, scattered = ([wire * numel for numel in each] for each in ownership.traffic())
    grams, transforms = ([0] * layout.world_size for _ in range(2))
    for split in ownership.splits:
        for holder, user, numel in moved_pieces(layout, split):
            gathered[holder] += itemsize * numel
            scattered[user] += itemsize * numel
        # A message is one packed matrix or two of them, and their scale.
        packed = packed_numel(min(layout.specs[split.matrix].shape))
        for rank in split.ranks:
            if rank != split.owner:
                grams[rank] += packed + 1
                transforms[split.owner] += 2 * packed + 1
    small = {"gram": grams, "transform": transforms}
    narrow = policy.sharing.itemsize
    return {
        "gather": gathered,
        "scatter": scattered,
        **{kind: [count * narrow for count in counts] for kind, counts in small.items()},
    }


def moves(specs: Sequence[BucketSpec], policy: Policy) -> tuple[Move, ...]:
    """Who sends momentum to whom, in ascending order of both.

    Args:
        specs: All buckets.
        policy: Says how wide momentum travels.
    """
    found: Counter[tuple[int, int]] = Counter()
    for spec in specs:
        if spec.ownership is None:
            continue
        layout, shared = spec.ownership.layout, spec.ownership.shared
        wire, itemsize = wire_itemsize(spec, policy), master_itemsize(spec)
        for index, owner in enumerate(spec.ownership.owners):
            for rank in layout.span(index) if index not in shared else ():
                if rank != owner:
                    found[rank, owner] += layout.held(index, rank) * wire
        for split in spec.ownership.splits:
            for holder, user, numel in moved_pieces(layout, split):
                found[holder, user] += numel * itemsize
    return tuple(Move(*pair, count) for pair, count in sorted(found.items()) if count)


def held_numel(layout: Layout) -> list[int]:
    """Elements of parameters in each rank's shard, without alignment and padding."""
    held = [0] * layout.world_size
    for tensor in range(len(layout.specs)):
        for segment in layout.holders(tensor):
            held[segment.rank] += segment.numel
    return held


def loads(specs: Sequence[BucketSpec]) -> tuple[int, ...]:
    """Newton-Schulz operations of each rank in one step, as in `Report.loads`."""
    return planned_loads(spec.ownership for spec in specs if spec.ownership is not None)


def state_bytes(spec: BucketSpec) -> int:
    """Bytes of a bucket's state on one rank, whatever its rule; master weights not counted."""
    numel = sum(spec.places(name).shard_numel for name in spec.states)
    return numel * master_itemsize(spec)


def wire_itemsize(spec: BucketSpec, policy: Policy) -> int:
    """Bytes of an element of momentum and update on their way, of matrices with one owner."""
    return 2 if policy.wire == "bfloat16" else master_itemsize(spec)


def master_itemsize(spec: BucketSpec) -> int:
    """Bytes of an element of a bucket's state: fp32, or wider where the parameters are."""
    return torch.promote_types(spec.parameters[0].dtype, torch.float32).itemsize

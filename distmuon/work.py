"""What a step has done: matrices, all of them, and the operations of their products."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from distmuon.buckets import Bucket
from distmuon.errors import see
from distmuon.options import GroupOptions, NsDtype
from distmuon.orthogonalize.flops import count_flops, count_part_flops
from distmuon.shard import Range
from distmuon.split_exchange import SplitJob

_DTYPES: dict[NsDtype, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class Work(NamedTuple):
    """What one rank did in a step.

    Attributes:
        matrices: How many it orthogonalized.
        flops: Operations of their products, in the form that they really took.
    """

    matrices: int
    flops: int


def products_dtype(options: GroupOptions) -> torch.dtype | None:
    """Dtype of a group's Newton-Schulz products; None where device and shape decide.

    Args:
        options: Of the group.
    """
    return None if options.ns_dtype is None else _DTYPES[options.ns_dtype]


def whole_flops(
    bucket: Bucket[Range], matrices: Iterable[int], options: Sequence[GroupOptions]
) -> int:
    """Operations of orthogonalizing whole matrices.

    Args:
        bucket: They are in.
        matrices: Indices in its layout.
        options: Of each parameter group.
    """
    ownership = bucket.spec.ownership
    assert ownership is not None, "a Muon bucket has owners"
    device = bucket.shard.master.device
    known: dict[tuple[int, tuple[int, ...]], int] = {}
    total = 0
    for matrix in matrices:
        spec = ownership.layout.specs[matrix]
        group = bucket.spec.groups[ownership.members[matrix]]
        if (group, spec.shape) not in known:  # one group cuts equal shapes alike
            chosen = options[group]
            known[group, spec.shape] = sum(
                count_flops(
                    shape,
                    coefficients=chosen.ns_coefficients,
                    steps=chosen.ns_steps,
                    dtype=products_dtype(chosen),
                    device=device,
                )
                for shape in spec.orthogonalized
            )
        total += known[group, spec.shape]
    return total


def part_flops(bucket: Bucket[Range], jobs: Mapping[int, SplitJob]) -> int:
    """Operations of this rank's share in matrices that several ranks share.

    Args:
        bucket: They are in.
        jobs: What was done with each, by index in the layout.
    """
    assert bucket.plan is not None, "a Muon bucket has a plan"
    device = bucket.shard.master.device
    total = 0
    for part in (part for wave in bucket.plan.split.waves for part in wave.parts):
        if part.split.matrix in jobs:
            owns = part.split.owner == bucket.plan.rank
            halves = jobs[part.split.matrix].halves if owns else None
            width = part.columns if part.sliced == "columns" else part.rows
            total += count_part_flops(part.short, width, halves, device)
    return total


def check_all_done(bucket: Bucket[Range], present: Sequence[bool], done: set[int]) -> None:
    """Refuse to go on if a matrix got lost.

    Args:
        bucket: Of Muon or NorMuon.
        present: For each parameter whether it has a gradient.
        done: Matrices that this rank has orthogonalized, by index in the layout.

    Raises:
        RuntimeError: if those are not what it owns, naming what is missing.
    """
    # Expected from the owners, done from what the exchange delivered: two sources, so that a
    # matrix which got lost between them cannot go unnoticed.
    assert bucket.plan is not None, "a Muon bucket has a plan"
    rank, ownership = bucket.plan.rank, bucket.plan.ownership
    rows = zip(ownership.owners, ownership.members, strict=True)
    expected = {i for i, (owner, member) in enumerate(rows) if owner == rank and present[member]}
    if done != expected:
        lost = [ownership.layout.specs[i].name for i in sorted(expected - done)]
        raise RuntimeError(
            f"Rank {rank} orthogonalized {len(done)} of {len(expected)} owned matrices with a "
            f"gradient; missing {lost}. Training stops here rather than go on without Muon. "
            "Please report this." + see("not-orthogonalized")
        )

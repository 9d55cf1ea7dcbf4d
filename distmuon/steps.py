"""One step of each algorithm on one bucket: the straight path from a gradient to an update."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distmuon import update_rules
from distmuon.buckets import Bucket
from distmuon.options import GroupOptions, NsDtype
from distmuon.orthogonalize import orthogonalize

_DTYPES: dict[NsDtype, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def muon_step(
    bucket: Bucket, update: Tensor, present: Sequence[bool], options: Sequence[GroupOptions]
) -> int:
    """Update this rank's range of a Muon bucket.

    Args:
        bucket: The buffers and their exchange.
        update: [shard_numel], this rank's averaged gradients; overwritten.
        present: For each parameter whether it has a gradient; equal on all ranks.
        options: Of each parameter group.

    Returns:
        How many matrices this rank orthogonalized.

    Raises:
        RuntimeError: if that is not each owned matrix with a gradient, naming the lost ones.
    """
    shard, exchange, ownership = bucket.shard, bucket.exchange, bucket.spec.ownership
    assert exchange is not None, "a Muon bucket has an exchange"
    assert ownership is not None, "a Muon bucket has owners"
    runs = shard.begin_step(present, bucket.spec.groups)
    momentum_buffer = shard.state["momentum_buffer"]
    for group, _, start, stop in runs:
        update_rules.momentum_(
            update[start:stop],
            momentum_buffer[start:stop],
            momentum=options[group].momentum,
            nesterov=options[group].nesterov,
        )
    done = set()
    for tensor, matrix in exchange.gather(update):
        member = ownership.members[tensor]
        if present[member]:
            try:
                value = _orthogonal_update(matrix, options[bucket.spec.groups[member]])
            except Exception as error:
                name = ownership.layout.specs[tensor].name
                error.add_note(f"while orthogonalizing {name} {list(matrix.shape)}")
                raise
            exchange.scatter(tensor, value, out=update)
            done.add(tensor)
    _check_all_done(bucket, present, done)
    for group, _, start, stop in runs:
        update_rules.apply_(
            shard.master[start:stop],
            update[start:stop],
            lr=options[group].lr,
            weight_decay=options[group].weight_decay,
        )
    return len(done)


def adamw_step(
    bucket: Bucket, grad: Tensor, present: Sequence[bool], options: Sequence[GroupOptions]
) -> None:
    """Update this rank's range of an AdamW bucket.

    Args:
        bucket: The buffers.
        grad: [shard_numel], this rank's averaged gradients.
        present: For each parameter whether it has a gradient; equal on all ranks.
        options: Of each parameter group.
    """
    shard = bucket.shard
    for group, step, start, stop in shard.begin_step(present, bucket.spec.groups):
        update_rules.adamw_(
            shard.master[start:stop],
            grad[start:stop],
            shard.state["exp_avg"][start:stop],
            shard.state["exp_avg_sq"][start:stop],
            step=step,
            lr=options[group].lr,
            betas=options[group].betas,
            eps=options[group].eps,
            weight_decay=options[group].weight_decay,
        )


def _orthogonal_update(matrix: Tensor, options: GroupOptions) -> Tensor:
    """Polar factor of a momentum [..., m, n], scaled for its shape."""
    dtype = None if options.ns_dtype is None else _DTYPES[options.ns_dtype]
    polar = orthogonalize(
        matrix, coefficients=options.ns_coefficients, steps=options.ns_steps, dtype=dtype
    )
    rows, cols = matrix.shape[-2:]
    return polar.mul_(update_rules.adjust_lr_factor(options.adjust_lr_fn, rows, cols))


def _check_all_done(bucket: Bucket, present: Sequence[bool], done: set[int]) -> None:
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
            "Please report this."
        )

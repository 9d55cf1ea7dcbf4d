"""One step of an optimizer class on one bucket: on runs of elements, or on whole tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from distmuon.buckets import Bucket
from distmuon.companion import find_companion
from distmuon.options import GroupOptions
from distmuon.phases import PhaseClock
from distmuon.shard import Range, Run


def companion_step(
    bucket: Bucket[Range],
    grad: Tensor,
    present: Sequence[bool],
    options: Sequence[GroupOptions],
    clock: PhaseClock,
) -> None:
    """Update this rank's range of a bucket by an optimizer class.

    Args:
        bucket: The buffers.
        grad: [shard_numel], this rank's averaged gradients; the class may overwrite it.
        present: For each parameter whether it has a gradient; equal on all ranks.
        options: Of each parameter group.
        clock: Times it.
    """
    shard, companion = bucket.shard, find_companion(bucket.spec.algorithm)
    with clock("companion"):
        runs = shard.begin_step(present, bucket.spec.groups)
        pieces = _runs(bucket, grad, runs)
        if companion.reach == "tensor":
            pieces = _tensors(bucket, grad, present)
        for group, step, param, gradient, state in pieces:
            companion.update_(
                param,
                gradient,
                state,
                step=step,
                lr=options[group].lr,
                weight_decay=options[group].weight_decay,
            )


class _Piece(NamedTuple):
    """What a class updates at once: its group, the number of the step, and the tensors."""

    group: int
    step: int
    param: Tensor
    grad: Tensor
    state: dict[str, Tensor]


def _runs(bucket: Bucket[Range], grad: Tensor, runs: Sequence[Run]) -> Iterator[_Piece]:
    shard = bucket.shard
    for group, step, start, stop in runs:
        state = {name: tensor[start:stop] for name, tensor in shard.state.items()}
        yield _Piece(group, step, shard.master[start:stop], grad[start:stop], state)


def _tensors(bucket: Bucket[Range], grad: Tensor, present: Sequence[bool]) -> Iterator[_Piece]:
    """Every tensor of this rank that has a gradient, whole, in its own shape."""
    shard, spec = bucket.shard, bucket.spec
    for segment in shard.segments:
        index, start, numel = segment.tensor, segment.shard_start, segment.numel
        if not present[index]:
            continue
        shape = shard.layout.specs[index].shape
        state = {}
        for name, places in spec.kept.items():
            first, kept = places.starts[index], places.specs[index]
            if kept.numel:
                state[name] = shard.state[name][first : first + kept.numel].view(kept.shape)
        param, gradient = (each[start : start + numel].view(shape) for each in (shard.master, grad))
        yield _Piece(spec.groups[index], shard.steps[index], param, gradient, state)

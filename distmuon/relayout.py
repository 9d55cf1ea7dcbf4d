"""Carry optimizer state from one set of flat buffers to another, each piece to its new place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distmuon.buckets import Bucket
from distmuon.collectives import Communicator
from distmuon.failure import Topic
from distmuon.layout import Segment


class Move(NamedTuple):
    """A run of elements that one rank has and one rank gets.

    Attributes:
        source: The rank that has it.
        target: The rank that gets it, perhaps the same.
        source_start: Offset in the source's old shard.
        target_start: Offset in the target's new shard.
        numel: Elements.
    """

    source: int
    target: int
    source_start: int
    target_start: int
    numel: int


def plan_moves(before: Iterable[Segment], after: Iterable[Segment]) -> Iterator[Move]:
    """Intersect two ways of cutting one tensor.

    Args:
        before: Its segments in the old layout, by their place in the tensor.
        after: Likewise in the new one.

    Yields:
        Moves that cover the tensor once, in its order.
    """
    old_segments = iter(before)
    old = next(old_segments)
    for new in after:
        start, stop = new.tensor_start, new.tensor_start + new.numel
        while start < stop:
            while old.tensor_start + old.numel <= start:
                old = next(old_segments)
            numel = min(stop, old.tensor_start + old.numel) - start
            yield Move(
                old.rank,
                new.rank,
                old.shard_start + start - old.tensor_start,
                new.shard_start + start - new.tensor_start,
                numel,
            )
            start += numel


def carry_state(
    before: Sequence[Bucket], after: Sequence[Bucket], communicator: Communicator
) -> None:
    """Give parameters in new buffers the state they had in the old ones. A collective.

    Parameters that are new, or have another update rule now, start from zero, and so do values per
    row where rows are columns now. One that has become narrow brings no master copy: its own value
    begins one.

    Args:
        before: The buffers so far.
        after: The new ones, over the same ranks.
        communicator: The group.
    """
    places = {p: (bucket, i) for bucket in before for i, p in enumerate(bucket.spec.parameters)}
    for bucket in after:
        kept: list[tuple[int, Bucket, int]] = []
        for index, parameter in enumerate(bucket.spec.parameters):
            old, place = places.get(parameter, (None, 0))
            if old is None or old.spec.algorithm != bucket.spec.algorithm:
                continue
            bucket.shard.steps[index] = old.shard.steps[place]
            kept.append((index, old, place))
        for name, tensor in bucket.shard.tensors.items():
            new = bucket.spec.places(name)
            moves = [
                (old, move)
                for index, old, place in kept
                if name in old.shard.tensors
                and old.spec.places(name).specs[place].shape == new.specs[index].shape
                and new.specs[index].numel
                for move in plan_moves(old.spec.places(name).holders(place), new.holders(index))
            ]
            _carry(name, tensor, moves, communicator, Topic("refresh", None, bucket.spec.names))


def _carry(
    name: str,
    tensor: Tensor,
    moves: Sequence[tuple[Bucket, Move]],
    communicator: Communicator,
    topic: Topic,
) -> None:
    rank = communicator.rank
    sends = sorted((m for m in moves if m[1].source == rank), key=lambda m: m[1].target)
    receives = sorted((m for m in moves if m[1].target == rank), key=lambda m: m[1].source)
    pieces = [old.shard.tensors[name][m.source_start :][: m.numel] for old, m in sends]
    send_counts, receive_counts = [[0] * communicator.world_size for _ in range(2)]
    for _, move in sends:
        send_counts[move.target] += move.numel
    for _, move in receives:
        receive_counts[move.source] += move.numel
    # Of the new dtype on every rank, those that send nothing included.
    send = torch.cat(pieces).to(tensor) if pieces else tensor.new_empty(0)
    received = communicator.exchange(send, send_counts, receive_counts, topic=topic).wait()
    start = 0
    for _, move in receives:
        tensor[move.target_start :][: move.numel].copy_(received[start:][: move.numel])
        start += move.numel

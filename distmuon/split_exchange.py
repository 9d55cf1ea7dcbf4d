"""Orthogonalize split matrices: slices out, Gram matrices in, factors out, pieces back.

Each wave is four all-to-alls. The slices of the first wave are on their way while whole matrices
are orthogonalized, those of every other one while the wave before is; pieces of the update travel
back during the next wave.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distmuon.collectives import Communicator, Pending
from distmuon.failure import Topic
from distmuon.orthogonalize.parts import (
    PartGram,
    Transform,
    apply_transform,
    find_transform,
    part_gram,
)
from distmuon.orthogonalize.stability import Halves
from distmuon.plan import ExchangePlan
from distmuon.split_plan import Block, MessageKind, Part, Route, SplitWave
from distmuon.splits import packed_panels


class SplitJob(NamedTuple):
    """What to do with a split matrix.

    Attributes:
        halves: The schedule, cut in two.
        factor: What the update is multiplied by in the end.
    """

    halves: Halves
    factor: float


class SplitExchange:
    """Runs one flat buffer's split matrices: `begin`, then `finish`. Every rank must call both.

    Attributes:
        dtype: Of the Gram matrices and their transforms.
    """

    def __init__(self, plan: ExchangePlan, communicator: Communicator, dtype: torch.dtype) -> None:
        """Prepare to run a plan's split matrices.

        Args:
            plan: This rank's plan.
            communicator: The group it was made for.
            dtype: Of the Gram matrices and their transforms, float32 or float64.
        """
        self._plan = plan.split
        names = [spec.name for spec in plan.ownership.layout.specs]
        self._names = [_matrices(wave, names) for wave in plan.split.waves]
        self._communicator = communicator
        self.dtype = dtype
        self._arriving: Pending | None = None

    def begin(self, update: Tensor) -> None:
        """Send the first slices on their way.

        Args:
            update: [shard_numel], this rank's pieces of everything that is to be orthogonalized.
        """
        if self._plan.waves:
            self._arriving = self._fetch(0, update)

    def finish(self, update: Tensor, jobs: Mapping[int, SplitJob]) -> set[int]:
        """Orthogonalize all split matrices.

        Args:
            update: The tensor given to `begin`; holds the results in the end.
            jobs: For each split matrix that has a gradient, by index in the layout; the others keep
                what they are, and their messages carry nothing of meaning.

        Returns:
            The matrices that this rank owns and has orthogonalized.
        """
        done: set[int] = set()
        waves = self._plan.waves
        returning: tuple[SplitWave, Pending] | None = None
        for index, wave in enumerate(waves):
            assert self._arriving is not None, "fetched in the round before, or by begin"
            fetched = self._arriving.wait()
            slices = self._assemble(wave, fetched, update)
            last = index + 1 == len(waves)
            self._arriving = None if last else self._fetch(index + 1, update)
            grams = {
                part.split.matrix: part_gram(_wide(part, slices), dtype=self.dtype)
                for part in wave.parts
                if part.split.matrix in jobs
            }
            transforms = self._transforms(index, grams, jobs, update.device)
            for part in wave.parts:
                matrix = part.split.matrix
                if matrix in jobs:
                    value = apply_transform(grams[matrix], transforms[matrix])
                    _wide(part, slices).copy_(value.mul_(jobs[matrix].factor))
                    if part.split.owner == self._plan.rank:
                        done.add(matrix)
            if returning is not None:
                self._deliver(*returning, update)
            returning = wave, self._return(index, fetched, slices, update)
        if returning is not None:
            self._deliver(*returning, update)
        return done

    def _fetch(self, index: int, update: Tensor) -> Pending:
        wave = self._plan.waves[index]
        send = update.new_empty(_total(wave.outgoing))
        for block in wave.outgoing:
            _in_message(block, send).copy_(_in_shard(block, update))
        to, source = self._block_counts(wave)
        return self._communicator.exchange(send, to, source, topic=self._topic("gather", index))

    def _assemble(self, wave: SplitWave, fetched: Tensor, update: Tensor) -> dict[int, Tensor]:
        """The slices of this rank's parts, as they are stored, by matrix."""
        slices = {p.split.matrix: update.new_empty(p.rows, p.columns) for p in wave.parts}
        for block in wave.kept:
            _in_slice(block, slices).copy_(_in_shard(block, update))
        for block in wave.incoming:
            _in_slice(block, slices).copy_(_in_message(block, fetched))
        return slices

    def _return(
        self, index: int, fetched: Tensor, slices: Mapping[int, Tensor], update: Tensor
    ) -> Pending:
        wave = self._plan.waves[index]
        for block in wave.kept:
            _in_shard(block, update).copy_(_in_slice(block, slices))
        for block in wave.incoming:
            _in_message(block, fetched).copy_(_in_slice(block, slices))
        to, source = self._block_counts(wave)
        topic = self._topic("scatter", index)
        return self._communicator.exchange(fetched, source, to, topic=topic)

    def _deliver(self, wave: SplitWave, pending: Pending, update: Tensor) -> None:
        received = pending.wait()
        for block in wave.outgoing:
            _in_shard(block, update).copy_(_in_message(block, received))

    def _transforms(
        self,
        index: int,
        grams: Mapping[int, PartGram],
        jobs: Mapping[int, SplitJob],
        device: torch.device,
    ) -> dict[int, Transform]:
        """Every part's Gram matrix to its owner, and the owner's transform to every part."""
        wave = self._plan.waves[index]
        collected = self._collect(index, grams, device)
        transforms: dict[int, Transform] = {}
        for part in wave.parts:
            matrix, ranks = part.split.matrix, part.split.ranks
            if part.split.owner == self._plan.rank and matrix in jobs:
                # By rank, which is their order along the long side: one order of summation.
                summands = [collected[matrix, rank] for rank in ranks]
                transforms[matrix] = find_transform(
                    [gram for gram, _ in summands],
                    [largest for _, largest in summands],
                    jobs[matrix].halves,
                )
        return self._distribute(index, transforms, jobs, device)

    def _collect(
        self, index: int, grams: Mapping[int, PartGram], device: torch.device
    ) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
        """Gram matrices and their scales, by matrix and rank, for the matrices owned here."""
        wave, topic = self._plan.waves[index], self._topic("gram", index)
        send = self._buffer(wave.to_owners, "gram", device)
        for part, message in _messages(wave.to_owners, "gram", send):
            gram = grams.get(part.split.matrix)
            if gram is not None:
                _pack([gram.gram], gram.largest, message)
        received = self._exchange(send, wave.to_owners, wave.to_parts, "gram", topic)
        found = {(m, self._plan.rank): (each.gram, each.largest) for m, each in grams.items()}
        messages = _messages(wave.to_parts, "gram", received)
        for route, (part, message) in zip(wave.to_parts, messages, strict=True):
            if part.split.matrix in grams:
                (gram_there,), largest = _unpack(message, part.short, 1)
                found[part.split.matrix, route.peer] = gram_there, largest
        return found

    def _distribute(
        self,
        index: int,
        transforms: Mapping[int, Transform],
        jobs: Mapping[int, SplitJob],
        device: torch.device,
    ) -> dict[int, Transform]:
        """Transforms by matrix, for every part here."""
        wave, topic = self._plan.waves[index], self._topic("transform", index)
        send = self._buffer(wave.to_parts, "transform", device)
        for part, message in _messages(wave.to_parts, "transform", send):
            transform = transforms.get(part.split.matrix)
            if transform is not None:
                _pack([transform.first, transform.second], transform.largest, message)
        received = self._exchange(send, wave.to_parts, wave.to_owners, "transform", topic)
        found = dict(transforms)
        for part, message in _messages(wave.to_owners, "transform", received):
            if part.split.matrix in jobs:
                (first, second), largest = _unpack(message, part.short, 2)
                found[part.split.matrix] = Transform(first, second, largest)
        return found

    def _buffer(self, routes: Sequence[Route], kind: MessageKind, device: torch.device) -> Tensor:
        # Zeros, because what is sent for a matrix without a gradient should at least be numbers.
        numel = sum(route.part.message_numel(kind) for route in routes)
        return torch.zeros(numel, dtype=self.dtype, device=device)

    def _exchange(
        self,
        send: Tensor,
        to: Sequence[Route],
        source: Sequence[Route],
        kind: MessageKind,
        topic: Topic,
    ) -> Tensor:
        counts = [[0] * self._communicator.world_size for _ in range(2)]
        for routes, each in zip((to, source), counts, strict=True):
            for route in routes:
                each[route.peer] += route.part.message_numel(kind)
        return self._communicator.exchange(send, *counts, topic=topic).wait()

    def _topic(self, phase: str, index: int) -> Topic:
        return Topic(phase, index, self._names[index])

    def _block_counts(self, wave: SplitWave) -> tuple[list[int], list[int]]:
        counts = [[0] * self._communicator.world_size for _ in range(2)]
        for blocks, each in zip((wave.outgoing, wave.incoming), counts, strict=True):
            for block in blocks:
                each[block.peer] += block.numel
        return counts[0], counts[1]


def _matrices(wave: SplitWave, names: Sequence[str]) -> tuple[str, ...]:
    """Matrices of a wave that this rank holds or needs something of."""
    found = {block.matrix for block in (*wave.outgoing, *wave.incoming)}
    found |= {part.split.matrix for part in wave.parts}
    return tuple(names[matrix] for matrix in sorted(found))


def _messages(
    routes: Iterable[Route], kind: MessageKind, buffer: Tensor
) -> Iterator[tuple[Part, Tensor]]:
    """Each route's part and its piece of a buffer."""
    position = 0
    for route in routes:
        numel = route.part.message_numel(kind)
        yield route.part, buffer[position:][:numel]
        position += numel


def _pack(matrices: Iterable[Tensor], largest: Tensor, message: Tensor) -> None:
    """Write symmetric matrices [m, m] by their lower panels, and a scale behind them."""
    position = 0
    for matrix in matrices:
        for start, stop in packed_panels(matrix.size(0)):
            numel = (stop - start) * stop
            panel = message[position:][:numel].view(stop - start, stop)
            panel.copy_(matrix[start:stop, :stop])
            position += numel
    message[position:].copy_(largest.view(1))


def _unpack(message: Tensor, m: int, count: int) -> tuple[list[Tensor], Tensor]:
    """The symmetric matrices [m, m] and the float32 scale [1, 1] of a message."""
    position, matrices = 0, []
    for _ in range(count):
        matrix = message.new_empty(m, m)
        for start, stop in packed_panels(m):
            numel = (stop - start) * stop
            panel = message[position:][:numel].view(stop - start, stop)
            matrix[start:stop, :stop].copy_(panel)
            matrix[:start, start:stop].copy_(panel[:, :start].mT)
            position += numel
        matrices.append(matrix)
    return matrices, message[position:].float().view(1, 1)


def _wide(part: Part, slices: Mapping[int, Tensor]) -> Tensor:
    """A part's slice as [m, w], a view."""
    stored = slices[part.split.matrix]
    return stored if part.sliced == "columns" else stored.mT


def _in_shard(block: Block, shard: Tensor) -> Tensor:
    return shard.as_strided(
        (block.rows, block.columns),
        (block.shard_stride, 1),
        shard.storage_offset() + block.shard_start,
    )


def _in_slice(block: Block, slices: Mapping[int, Tensor]) -> Tensor:
    return slices[block.matrix].as_strided(
        (block.rows, block.columns), (block.slice_stride, 1), block.slice_start
    )


def _in_message(block: Block, message: Tensor) -> Tensor:
    return message[block.buffer_start :][: block.numel].view(block.rows, block.columns)


def _total(blocks: Iterable[Block]) -> int:
    return sum(block.numel for block in blocks)

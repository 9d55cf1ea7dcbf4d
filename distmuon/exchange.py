"""Bring each matrix together at its owner, and its update back to where its pieces live.

While wave k is being orthogonalized, wave k+1 is on its way in and wave k-1 on its way back; the
matrices that need no message are done while the first wave arrives. The overlap is one generator
in straight-line code: what stands after a `yield` runs when the caller has finished those matrices.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from distmuon.collectives import Communicator, Pending
from distmuon.failure import Topic
from distmuon.kernels.elementwise import scale_into
from distmuon.layout import Segment
from distmuon.orthogonalize.pipeline import stack_numel
from distmuon.plan import ExchangePlan, Transfer, Wave, peer_counts


class Exchange:
    """Runs one flat buffer's plan.

    `gather` yields whole matrices and `scatter` takes each result; when `gather` is exhausted, all
    results have arrived where they belong. A rank that owns nothing takes part in every message.
    """

    def __init__(
        self, plan: ExchangePlan, communicator: Communicator, *, wire: torch.dtype | None = None
    ) -> None:
        """Prepare to run a plan.

        Args:
            plan: This rank's plan.
            communicator: The group it was made for.
            wire: Dtype that pieces travel in; None for that of the update.
        """
        self._plan = plan
        self._wire = wire
        self._communicator = communicator
        self._kept: defaultdict[int, list[Segment]] = defaultdict(list)
        for segment in plan.segments:
            self._kept[segment.tensor].append(segment)
        self._fetched: defaultdict[int, list[Transfer]] = defaultdict(list)
        for wave in plan.waves:
            for transfer in wave.incoming:
                self._fetched[transfer.segment.tensor].append(transfer)
        self._counts = [
            tuple(peer_counts(t, communicator.world_size) for t in (wave.outgoing, wave.incoming))
            for wave in plan.waves
        ]
        names = [_names(plan, wave) for wave in plan.waves]
        self._gathers = [Topic("gather", index, which) for index, which in enumerate(names)]
        self._scatters = [Topic("scatter", index, which) for index, which in enumerate(names)]
        self._incoming: Tensor | None = None

    def gather(self, update: Tensor) -> Iterator[list[tuple[int, Tensor]]]:
        """Bring together the matrices this rank owns, those of one shape and group side by side.

        Args:
            update: [shard_numel], this rank's pieces of everything that is to be orthogonalized.
                When the iteration ends, it holds the scattered results.

        Yields:
            Tensors' indices in the layout and their whole values [..., m, n], all of one shape: one
            on CPUs, as many as may be orthogonalized as one stack elsewhere. Not to be written to:
            they may be views of `update`. An empty list once, between the matrices that no message
            was needed for and those that come in waves.
        """
        waves = self._plan.waves
        arriving = self._fetch(0, update) if waves else None
        yield from self._assemble_alike(self._plan.local, self._plan.batches, update)
        # On every rank, also where there are none: now the local ones are done.
        yield []
        returning: tuple[Wave, Pending] | None = None
        for index, wave in enumerate(waves):
            assert arriving is not None, "fetched in the round before"
            self._incoming = arriving.wait().to(update.dtype)
            arriving = self._fetch(index + 1, update) if index + 1 < len(waves) else None
            yield from self._assemble_alike(wave.tensors, wave.batches, update)
            if returning is not None:
                self._deliver(*returning, update)
            returning = wave, self._return(index, self._incoming)
        if returning is not None:
            self._deliver(*returning, update)
        self._incoming = None

    def scatter(
        self, tensor: int, value: Tensor, factor: float | Tensor = 1.0, *, out: Tensor
    ) -> None:
        """Put the update of a matrix that `gather` yielded last where its pieces belong.

        Args:
            tensor: Index in the layout.
            value: [..., m, n], its update, also in another dtype than `out`.
            factor: What it is multiplied by on the way: a number, or [1] in float32, in which the
                product is then computed.
            out: [shard_numel], the tensor given to `gather`; pieces held elsewhere are sent.
        """
        flat = value.reshape(-1)
        for kept in self._kept[tensor]:
            piece = flat[kept.tensor_start :][: kept.numel]
            _multiply(piece, factor, out[kept.shard_start :][: kept.numel])
        for fetched in self._fetched[tensor]:
            assert self._incoming is not None, "scatter follows the yield of its matrix"
            segment = fetched.segment
            piece = flat[segment.tensor_start :][: segment.numel]
            place = self._incoming[fetched.buffer_start :][: segment.numel]
            _multiply(piece, factor, place)

    def _fetch(self, index: int, update: Tensor) -> Pending:
        outgoing = self._plan.waves[index].outgoing
        pieces = [update[t.segment.shard_start :][: t.segment.numel] for t in outgoing]
        send = torch.cat(pieces) if pieces else update.new_empty(0)
        send = send.to(self._wire or send.dtype)
        to, source = self._counts[index]
        return self._communicator.exchange(send, to, source, topic=self._gathers[index])

    def _return(self, index: int, incoming: Tensor) -> Pending:
        # The buffer of fetched pieces serves twice: `scatter` has put their updates in their place.
        source, to = self._counts[index]
        send = incoming.to(self._wire or incoming.dtype)
        return self._communicator.exchange(send, to, source, topic=self._scatters[index])

    def _deliver(self, wave: Wave, pending: Pending, out: Tensor) -> None:
        received = pending.wait()
        for sent in wave.outgoing:
            piece = received[sent.buffer_start :][: sent.segment.numel]
            out[sent.segment.shard_start :][: sent.segment.numel].copy_(piece)

    def _assemble_alike(
        self, tensors: Sequence[int], batches: Sequence[Sequence[int]], update: Tensor
    ) -> Iterator[list[tuple[int, Tensor]]]:
        most = stack_numel(update.device)
        if not most:
            # A batched product may give other bits than single ones, and which matrices share a
            # rank depends on the number of ranks.
            batches = [(tensor,) for tensor in tensors]
        specs = self._plan.ownership.layout.specs
        for batch in batches:
            count = max(1, most // specs[batch[0]].numel)
            for start in range(0, len(batch), count):
                yield [(t, self._assemble(t, update)) for t in batch[start : start + count]]

    def _assemble(self, tensor: int, update: Tensor) -> Tensor:
        spec = self._plan.ownership.layout.specs[tensor]
        kept, fetched = self._kept[tensor], self._fetched[tensor]
        if not fetched:
            return update[kept[0].shard_start :][: spec.numel].view(spec.shape)
        assert self._incoming is not None, "fetched in this wave"
        whole = update.new_empty(spec.numel)
        for held in kept:
            piece = update[held.shard_start :][: held.numel]
            whole[held.tensor_start :][: held.numel].copy_(piece)
        for transfer in fetched:
            segment = transfer.segment
            piece = self._incoming[transfer.buffer_start :][: segment.numel]
            whole[segment.tensor_start :][: segment.numel].copy_(piece)
        return whole.view(spec.shape)


def _multiply(piece: Tensor, factor: float | Tensor, place: Tensor) -> None:
    if isinstance(factor, Tensor):
        scale_into(piece, factor, place)
    else:
        torch.mul(piece, factor, out=place)


def _names(plan: ExchangePlan, wave: Wave) -> tuple[str, ...]:
    """Matrices of a wave that this rank fetches or holds pieces of."""
    moving = {t.segment.tensor for t in (*wave.incoming, *wave.outgoing)}
    return tuple(plan.ownership.layout.specs[tensor].name for tensor in sorted(moving))

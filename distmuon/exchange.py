"""Bring each matrix together at its owner, and its update back to where its pieces live."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from distmuon.collectives import Communicator
from distmuon.layout import Segment
from distmuon.plan import ExchangePlan, Transfer, peer_counts


class Exchange:
    """Runs one flat buffer's plan.

    `gather` yields whole matrices, `scatter` takes each result, `flush` delivers the pieces that
    belong to other ranks. A rank that owns nothing takes part in both messages all the same.
    """

    def __init__(self, plan: ExchangePlan, communicator: Communicator) -> None:
        """Prepare to run a plan.

        Args:
            plan: This rank's plan.
            communicator: The group it was made for.
        """
        self._plan = plan
        self._communicator = communicator
        world_size = plan.ownership.layout.world_size
        self._outgoing_counts = peer_counts(plan.outgoing, world_size)
        self._incoming_counts = peer_counts(plan.incoming, world_size)
        self._kept: defaultdict[int, list[Segment]] = defaultdict(list)
        for segment in plan.segments:
            self._kept[segment.tensor].append(segment)
        self._fetched: defaultdict[int, list[Transfer]] = defaultdict(list)
        for transfer in plan.incoming:
            self._fetched[transfer.segment.tensor].append(transfer)
        self._incoming: Tensor | None = None

    def gather(self, update: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Fetch the missing pieces of the matrices this rank owns.

        Args:
            update: [shard_numel], this rank's pieces of everything that is to be orthogonalized.

        Yields:
            The tensor's index in the layout and its whole value [..., m, n]. Not to be written to:
            it may be a view of `update`.
        """
        packed = [update[t.segment.shard_start :][: t.segment.numel] for t in self._plan.outgoing]
        send = torch.cat(packed) if packed else update.new_empty(0)
        # The buffer is used twice: a matrix's fetched pieces are free for its update's pieces as
        # soon as the matrix has been put together.
        self._incoming = self._communicator.exchange(
            send, self._outgoing_counts, self._incoming_counts, kind="gather"
        )
        for tensor in self._plan.owned:
            yield tensor, self._assemble(tensor, update, self._incoming)

    def scatter(self, tensor: int, value: Tensor, *, out: Tensor) -> None:
        """Put the update of an owned matrix where its pieces belong.

        Args:
            tensor: Index in the layout.
            value: [..., m, n], its update.
            out: [shard_numel]; the pieces held here are written, the others wait for `flush`.
        """
        assert self._incoming is not None, "scatter comes after gather"
        flat = value.reshape(-1)
        for kept in self._kept[tensor]:
            piece = flat[kept.tensor_start :][: kept.numel]
            out[kept.shard_start :][: kept.numel].copy_(piece)
        for fetched in self._fetched[tensor]:
            segment = fetched.segment
            piece = flat[segment.tensor_start :][: segment.numel]
            self._incoming[fetched.buffer_start :][: segment.numel].copy_(piece)

    def flush(self, *, out: Tensor) -> None:
        """Send the scattered pieces home and receive this rank's own.

        Args:
            out: [shard_numel]; pieces owned elsewhere are overwritten with their update.
        """
        assert self._incoming is not None, "flush comes after gather"
        received = self._communicator.exchange(
            self._incoming, self._incoming_counts, self._outgoing_counts, kind="scatter"
        )
        self._incoming = None
        for sent in self._plan.outgoing:
            piece = received[sent.buffer_start :][: sent.segment.numel]
            out[sent.segment.shard_start :][: sent.segment.numel].copy_(piece)

    def _assemble(self, tensor: int, update: Tensor, incoming: Tensor) -> Tensor:
        spec = self._plan.ownership.layout.specs[tensor]
        kept = self._kept[tensor]
        if not self._fetched[tensor]:
            return update[kept[0].shard_start :][: spec.numel].view(spec.shape)
        whole = update.new_empty(spec.numel)
        for held in kept:
            piece = update[held.shard_start :][: held.numel]
            whole[held.tensor_start :][: held.numel].copy_(piece)
        for fetched in self._fetched[tensor]:
            segment = fetched.segment
            piece = incoming[fetched.buffer_start :][: segment.numel]
            whole[segment.tensor_start :][: segment.numel].copy_(piece)
        return whole.view(spec.shape)

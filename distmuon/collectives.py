"""Every message distmuon sends, in the form the backend is good at, counted in bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from distmuon.failure import Topic
from distmuon.phases import PhaseClock
from distmuon.watched_group import WatchedGroup

Payload = TypeVar("Payload")
Number = TypeVar("Number", int, float)

_OLD_ALL_GATHER = "all_gather_into_tensor"
_PUBLISH = Topic("publish")


class Pending:
    """A message in flight. Its buffers and handles live until it has been waited for."""

    def __init__(
        self,
        communicator: Communicator,
        topic: Topic,
        result: Tensor,
        works: Sequence[dist.Work | None],
        *,
        keep: Tensor | None = None,
    ) -> None:
        """Hold on to everything the message needs.

        Args:
            communicator: Who sent it.
            topic: What it is about.
            result: Where it arrives.
            works: Handles; None where the backend had nothing to do.
            keep: What is being sent, if it is not `result`.
        """
        self._communicator = communicator
        self._topic = topic
        self._result = result
        self._works = works
        self._keep = keep

    def wait(self) -> Tensor:
        """Block until the message has arrived (on CUDA: until the stream may use it).

        Returns:
            The result.

        Raises:
            RankFailure: if it cannot arrive any more.
        """
        communicator, topic = self._communicator, self._topic
        with communicator.clock(f"{topic.phase} wait"), communicator.guarded(topic):
            for work in self._works:
                if work is not None:
                    work.wait()
        self._works, self._keep = (), None
        return self._result

    def settle(self) -> None:
        """Let go of what was sent, if the message has arrived already; blocks for nothing.

        Raises:
            RankFailure: if it cannot arrive any more.
        """
        # The backend's handle holds on to it too, until it has been waited for.
        if self._works and all(work is None or work.is_completed() for work in self._works):
            self.wait()


class Communicator(WatchedGroup):
    """A process group, or the lack of one, behind the few operations that distmuon needs.

    Without a process group, or with a single rank, every operation returns at once: one rank is
    the degenerate case of the same path, not a second one. Every operation raises `RankFailure` if
    it cannot be completed.

    Attributes:
        clock: Measures how long messages are waited for.
        bytes_sent: Payload bytes this rank has sent to other ranks so far, per kind. Collectives
            whose algorithm is the backend's own are counted as the least that any algorithm sends.
    """

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        """Bind to a group.

        Args:
            process_group: The data-parallel group, or None for one process.

        Raises:
            TypeError: if it is something else, or a group that this rank is not part of.
        """
        super().__init__(process_group)
        self.bytes_sent: Counter[str] = Counter()
        self.clock = PhaseClock()

    def exchange(
        self,
        send: Tensor,
        send_counts: Sequence[int],
        receive_counts: Sequence[int],
        *,
        topic: Topic,
    ) -> Pending:
        """Start an all-to-all with uneven counts.

        Args:
            send: [sum(send_counts)], contiguous, packed by destination rank.
            send_counts: Elements for each rank.
            receive_counts: Elements from each rank.
            topic: What it is about; its phase is the name under which the bytes are counted.

        Returns:
            A message in flight; its result is [sum(receive_counts)], packed by source rank.
        """
        if self.world_size == 1:
            return Pending(self, topic, send, [])
        received = send.new_empty(sum(receive_counts))
        with self.guarded(topic):
            work = dist.all_to_all_single(
                received,
                send,
                list(receive_counts),
                list(send_counts),
                group=self._group,
                async_op=True,
            )
        others = send.numel() - send_counts[self.rank]
        self.bytes_sent[topic.phase] += others * send.element_size()
        return Pending(self, topic, received, [work], keep=send)

    def publish(self, flat: Tensor, *, topic: Topic = _PUBLISH) -> Pending:
        """Start an all-gather of equal shards, in place.

        Args:
            flat: [world_size * shard]; this rank's shard is filled in, the others are overwritten.
            topic: What it is about; its phase is the name under which the bytes are counted.

        Returns:
            A message in flight; its result is `flat`.
        """
        if self.world_size == 1:
            return Pending(self, topic, flat, [])
        shards = flat.view(self.world_size, -1)
        mine = shards[self.rank]
        self.bytes_sent[topic.phase] += mine.numel() * flat.element_size() * (self.world_size - 1)
        with self.guarded(topic):
            if dist.get_backend(self._group) == "gloo":
                return Pending(self, topic, flat, self._send_to_all(shards))
            # torch 2.13 renamed the collective; the old name warns there, the new one fails before.
            name = "all_gather_single" if hasattr(dist, "all_gather_single") else _OLD_ALL_GATHER
            work = getattr(dist, name)(flat, mine, group=self._group, async_op=True)
            return Pending(self, topic, flat, [work])

    def publish_part(self, shards: Tensor, *, topic: Topic) -> Pending:
        """Start to give every rank a stretch of every shard, in place.

        Args:
            shards: [world_size, numel], rows contiguous; this rank's is filled in, the others are
                overwritten.
            topic: As in `publish`.

        Returns:
            A message in flight; its result is `shards`.
        """
        if self.world_size == 1:
            return Pending(self, topic, shards, [])
        self.bytes_sent[topic.phase] += shards[self.rank].nbytes * (self.world_size - 1)
        with self.guarded(topic):
            return Pending(self, topic, shards, self._send_to_all(shards))

    def _send_to_all(self, shards: Tensor) -> list[dist.Work]:
        # gloo's own all-gather takes 1.5 to 2.5 times as long as the same bytes sent directly.
        operations = []
        for distance in range(1, self.world_size):
            to = (self.rank + distance) % self.world_size
            source = (self.rank - distance) % self.world_size
            operations.append(
                dist.P2POp(dist.isend, shards[self.rank], group=self._group, group_peer=to)
            )
            operations.append(
                dist.P2POp(dist.irecv, shards[source], group=self._group, group_peer=source)
            )
        works: list[dist.Work] = dist.batch_isend_irecv(operations)
        return works

    def add_up(self, values: Sequence[int], device: torch.device) -> list[int]:
        """Sum of small integers over the ranks; waits for the result.

        Args:
            values: The same number of integers on every rank.
            device: Where the backend expects its tensors.

        Returns:
            The sums, equal on every rank.
        """
        total = self._all_reduce(torch.tensor(values, dtype=torch.int64), device, dist.ReduceOp.SUM)
        return [int(value) for value in total]

    def add_up_reals(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Sum of a few fp64 numbers over the ranks; waits for the result.

        Args:
            values: The same number of reals on every rank.
            device: Where the backend expects its tensors.

        Returns:
            The sums, equal on every rank.
        """
        return self._all_reduce(
            torch.tensor(values, dtype=torch.float64), device, dist.ReduceOp.SUM
        )

    def extreme(
        self, values: Sequence[Number], device: torch.device, *, kind: Literal["min", "max"]
    ) -> list[Number]:
        """Smallest or largest of each number over the ranks; waits for the result.

        Args:
            values: As many on every rank: int64, or fp64 without NaN.
            device: Where the backend expects its tensors.
            kind: Which of the two.

        Returns:
            The extremes, equal on every rank.
        """
        operation = dist.ReduceOp.MIN if kind == "min" else dist.ReduceOp.MAX
        kind_of = type(values[0])
        dtype = torch.int64 if kind_of is int else torch.float64
        found = self._all_reduce(torch.tensor(values, dtype=dtype), device, operation)
        return [kind_of(value) for value in found]

    def _all_reduce(
        self, values: Tensor, device: torch.device, operation: dist.ReduceOp.RedOpType
    ) -> list[float]:
        if self.world_size > 1:
            values = values.to(device)
            with self.guarded():
                dist.all_reduce(values, operation, group=self._group)
            # An all-reduce sends at least 2(N-1)/N of its payload per rank.
            payload = values.numel() * values.element_size()
            self.bytes_sent["agree"] += 2 * (self.world_size - 1) * payload // self.world_size
        result: list[float] = values.tolist()
        return result

    def gather(self, shard: Tensor, *, to: int) -> Tensor | None:
        """Lay the ranks' equal shards end to end on one rank. For saving only.

        Args:
            shard: [n], contiguous; the same n on every rank.
            to: The rank that receives.

        Returns:
            [world_size * n] on rank `to`, None elsewhere.
        """
        if self.world_size == 1:
            return shard
        whole = None
        operations = []
        if self.rank != to:
            self.bytes_sent["consolidate"] += shard.nbytes
            operations.append(dist.P2POp(dist.isend, shard, group=self._group, group_peer=to))
        else:
            whole = shard.new_empty(self.world_size, shard.numel())
            whole[to] = shard
            operations += [
                dist.P2POp(dist.irecv, whole[rank], group=self._group, group_peer=rank)
                for rank in range(self.world_size)
                if rank != to
            ]
        with self.guarded():
            # As a batch, because NCCL would connect each pair anew for single messages.
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        return None if whole is None else whole.view(-1)

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite a tensor with the first rank's. For set-up only.

        Args:
            tensor: Any dtype and device; the same shape on every rank.
        """
        if self.world_size > 1:
            # NCCL cannot send a buffer that the model keeps on the host.
            place = tensor.device if self.backend(tensor.device.type) else self.device
            # As bytes, because backends lack some dtypes; contiguous, because gloo sends anything
            # else as it lies in storage.
            whole = tensor.detach().to(place).contiguous()
            with self.guarded():
                dist.broadcast(whole.reshape(-1).view(torch.uint8), group=self._group, group_src=0)
            tensor.copy_(whole)

    def collect(self, value: Payload) -> list[Payload]:
        """Every rank's small object, in rank order. For set-up and for error messages only.

        Args:
            value: Anything picklable.

        Returns:
            `world_size` objects.
        """
        if self.world_size == 1:
            return [value]
        collected: list[Any] = [None] * self.world_size
        with self.guarded(), self.on_device():
            dist.all_gather_object(collected, value, group=self._group)
        return collected

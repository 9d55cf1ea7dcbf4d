"""Sum gradients that every rank has whole straight into the flat ranges that the ranks hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distmuon.buckets import Bucket
from distmuon.capture import is_capturing
from distmuon.collectives import Communicator, Pending
from distmuon.errors import see
from distmuon.failure import Topic
from distmuon.reduction import Member, ReductionPlan, plan_reduction


class Reducer:
    """Sums gradients straight into the flat ranges: an all-to-all, then a local sum.

    The ranges are a permutation of the parameters, so a set of gradients goes to the ranks in
    uneven parts, which no backend's reduce-scatter takes; gloo's is an all-reduce in disguise
    anyway. Sums are taken in fp32 or wider, in the order of the ranks.
    """

    def __init__(self, buckets: Sequence[Bucket], communicator: Communicator) -> None:
        """Prepare to receive for these buckets."""
        self._buckets = buckets
        self._communicator = communicator
        self._members = {
            parameter: Member(index, tensor)
            for index, bucket in enumerate(buckets)
            for tensor, parameter in enumerate(bucket.spec.parameters)
        }
        self._plans: dict[tuple[Member, ...], ReductionPlan] = {}
        self._flying: dict[tuple[Member, ...], tuple[ReductionPlan, Pending]] = {}
        self._grads: list[Tensor] | None = None

    def start(self, pairs: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        """Send gradients on their way; parameters that are not in the optimizer are ignored.

        Args:
            pairs: Parameters and their whole gradients on this rank; None counts as zeros. Every
                rank gives the same parameters in the same order.

        Raises:
            RuntimeError: while a CUDA graph is captured.
        """
        if is_capturing():
            raise RuntimeError(
                "Gradients were to be sent while a CUDA graph is captured. Replays call no hooks, "
                'so that nothing would be received. Use reduce="ddp" to capture a backward pass.'
                + see("graph-capture")
            )
        known = [(self._members[p], p, grad) for p, grad in pairs if p in self._members]
        if not known:
            return
        members = tuple(member for member, _, _ in known)
        if members not in self._plans:
            layouts = [bucket.spec.layout for bucket in self._buckets]
            self._plans[members] = plan_reduction(members, layouts, self._communicator.rank)
        plan = self._plans[members]
        # reshape copies what is not contiguous: gloo sends the first bytes of storage as they lie.
        flat = {m: (torch.zeros_like(p) if g is None else g).reshape(-1) for m, p, g in known}
        send = torch.cat([flat[m][s.tensor_start :][: s.numel] for m, s in plan.pieces])
        receive_counts = [plan.counts[self._communicator.rank]] * self._communicator.world_size
        for _, flying in self._flying.values():
            flying.settle()  # or the copies of all gradients would be there until the step
        topic = Topic("reduce", None, self._names(members))
        pending = self._communicator.exchange(send, plan.counts, receive_counts, topic=topic)
        replaced = self._flying.pop(members, None)  # a backward pass whose step was left out
        if replaced is not None:
            replaced[1].wait()
        self._flying[members] = (plan, pending)

    def finish(self) -> list[Tensor]:
        """Wait for everything that was sent.

        Returns:
            The averaged gradients of this rank's range, [shard_numel] for each bucket.
        """
        if self._grads is None:
            self._grads = [torch.zeros_like(bucket.shard.master) for bucket in self._buckets]
        world_size = self._communicator.world_size
        for plan, pending in self._flying.values():
            parts = pending.wait().view(world_size, -1)
            for member, segment, start in plan.mine:
                grad = self._grads[member.bucket]
                total = grad[segment.shard_start :][: segment.numel]
                first, *others = parts[:, start : start + segment.numel]
                total.copy_(first)
                for part in others:
                    total.add_(part)
                total.div_(world_size)
        self._flying = {}
        return self._grads

    def drop(self) -> None:
        """Forget this step's gradients; messages in flight are waited for first."""
        for _, pending in self._flying.values():
            pending.wait()
        self._flying, self._grads = {}, None

    def _names(self, members: Sequence[Member]) -> tuple[str, ...]:
        return tuple(self._buckets[m.bucket].spec.layout.specs[m.tensor].name for m in members)

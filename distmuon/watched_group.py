"""A process group with words for its failures, and this rank's device: beneath every message."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist

from distmuon import connections
from distmuon.errors import see
from distmuon.failure import LIMIT_S, RankFailure, RollCall, Topic, Verdict, explain, within


class WatchedGroup:
    """A process group, or the lack of one, whose errors name step, phase, parameters and ranks.

    Attributes:
        step: Number of the step that is being made, from 1, for error messages.
        rank: Rank within the group.
        world_size: Ranks in the group.
        device: Where what is no tensor travels from, if the backend takes GPUs only.
    """

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        """Bind to a group.

        Args:
            process_group: The data-parallel group, or None for one process.

        Raises:
            TypeError: if it is something else, or a group that this rank is not part of.
        """
        if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
            raise TypeError(
                f"Invalid process_group of type {type(process_group).__name__}. Must be a "
                "torch.distributed.ProcessGroup that this rank is a member of, such as "
                "torch.distributed.group.WORLD after init_process_group(), or None."
                + see("bad-option")
            )
        self._group = process_group
        self.rank = 0 if process_group is None else process_group.rank()
        self.world_size = 1 if process_group is None else process_group.size()
        self.step = 0
        self.device = torch.device("cpu")
        self._topic = Topic("setup")

    def locate(self, devices: Iterable[torch.device]) -> None:
        """Learn which device is this rank's.

        Args:
            devices: Where its tensors lie; the first that is not the host is meant.
        """
        self.device = next((each for each in devices if each.type != "cpu"), torch.device("cpu"))

    def on_device(self) -> AbstractContextManager[None]:
        """Make this rank's GPU the current one; without one it does nothing.

        torch sends objects and waits at barriers by way of the current device, which is the first
        GPU for every rank of a program that never called torch.cuda.set_device.
        """
        index = self.device.index if self.device.type == "cuda" else -1
        device: AbstractContextManager[None] = torch.cuda.device(index)
        return device

    @contextmanager
    def during(self, topic: Topic) -> Iterator[None]:
        """Say what the operations inside are about, those with a topic of their own excepted.

        Args:
            topic: For the error if one fails.
        """
        before, self._topic = self._topic, topic
        try:
            yield
        finally:
            self._topic = before

    @contextmanager
    def guarded(self, topic: Topic | None = None) -> Iterator[None]:
        """Turn a backend's error into one that names step, phase, parameters and missing ranks.

        Args:
            topic: What is being sent; None for what `during` says.

        Raises:
            RankFailure: in place of any RuntimeError.
        """
        try:
            yield
        except RankFailure:
            raise
        except RuntimeError as error:
            topic = topic or self._topic
            place = f"step {self.step}, {topic}"
            timed_out = "imed out" in str(error) or "timeout" in str(error)
            found = within(LIMIT_S, lambda: self._investigate(place, timed_out=timed_out))
            verdict = found or Verdict((), "unknown", "")
            explanation = explain(verdict, self.rank, dist.get_process_group_ranks(self._group))
            raise RankFailure(self.step, topic, verdict, explanation) from error

    def abandon(self, error: Exception) -> None:
        """Leave the group for good because of an error that only this rank has.

        The other ranks learn of it at once rather than at the process group's timeout.

        Args:
            error: What they are told.
        """
        if self.world_size > 1 and not isinstance(error, RankFailure):
            notes = getattr(error, "__notes__", [])
            text = "; ".join([f"{type(error).__name__}: {error}", *notes])
            within(LIMIT_S, lambda: self._blame_me(text))

    def _blame_me(self, text: str) -> None:
        roll_call = self._roll_call()
        roll_call.answer(f"step {self.step}", ())
        roll_call.blame_me(text)
        connections.close(self._group, range(self.world_size))

    def _investigate(self, place: str, *, timed_out: bool) -> Verdict:
        # gloo closes all connections of a rank whose timeout has run out: they tell nothing then.
        gone = [] if timed_out else connections.find_closed(self._group)
        roll_call = self._roll_call()
        roll_call.answer(place, gone)
        connections.close(
            self._group, [rank for rank in range(self.world_size) if rank not in gone]
        )
        return roll_call.verdict()

    def _roll_call(self) -> RollCall:
        assert self._group is not None, "one rank sends nothing that could fail"
        return RollCall(self._group.get_group_store(), self.rank, self.world_size)

    def backend(self, kind: str) -> str:
        """Name of the backend that sends tensors of a type of device; empty if there is none."""
        known = dist.get_backend_config(self._group).split(",")
        return dict(entry.split(":") for entry in known).get(kind, "")

    def same_ranks(self, process_group: dist.ProcessGroup) -> bool:
        """Whether another group consists of the same ranks."""
        mine, other = (dist.get_process_group_ranks(g) for g in (self._group, process_group))
        return sorted(mine) == sorted(other)

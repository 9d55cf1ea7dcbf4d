"""The way of one buffer's parameters to all ranks, in parts while others are still computed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from distmuon.collectives import Communicator, Pending
from distmuon.plan import Part
from distmuon.shard import Shard


class Publication:
    """Publishes the parts of a shard as they become final, and the rest at the end.

    All ranks send the same parts in the same order, between the first gather and the second: where
    no rank's shard holds anything of a matrix that is on its way. What is in a part has its final
    values before `send`; the caller applies the update stretch by stretch, as `due` and `rest` say.
    """

    def __init__(self, shard: Shard, parts: Sequence[Part], communicator: Communicator) -> None:
        """Wait for the matrices of each part.

        Args:
            shard: This rank's range.
            parts: Of the plan; none to publish all at once.
            communicator: The group over which the buffer is sharded.
        """
        self._shard = shard
        self._communicator = communicator
        self._parts = tuple(parts)
        self._missing = [set(part.tensors) for part in parts]
        self._messages: list[Pending] = []

    def due(self, done: Iterable[int]) -> Iterator[tuple[int, int]]:
        """The stretches that have become final; each is sent when the iteration goes on.

        Args:
            done: Matrices of this rank whose updates are in place or not wanted.

        Yields:
            Start and stop in the shard, for the update to be applied there first.
        """
        finished = set(done)
        for missing in self._missing:
            missing -= finished
        while (sent := len(self._messages)) < len(self._parts) and not self._missing[sent]:
            part = self._parts[sent]
            yield part.start, part.stop
            self._messages.append(self._shard.publish(self._communicator, part.start, part.stop))

    @property
    def rest(self) -> tuple[tuple[int, int], ...]:
        """The stretches that no part covers, as start and stop."""
        numel = self._shard.layout.shard_numel
        if not self._parts:
            return ((0, numel),)
        around = (0, self._parts[0].start), (self._parts[-1].stop, numel)
        return tuple(span for span in around if span[0] < span[1])

    def finish(self) -> list[Pending]:
        """Send the rest, to which the update has been applied by now.

        Returns:
            All messages in flight.
        """
        if self._parts:
            rest = [self._shard.publish(self._communicator, *span) for span in self.rest]
        else:
            rest = [self._shard.publish(self._communicator)]
        self._shard.finish_step()
        return self._messages + rest

"""When a message fails: which ranks are missing, told alike by every rank that is left.

A failed message says little: gloo's errors name an address, and in a ring only the neighbours of a
dead rank notice it. So each rank that notices leaves a note in the process group's store; the first
of them waits a moment, sees who left none, and writes down one verdict that all of them raise.
Nothing is written to the store as long as nothing fails.
"""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeVar

from typing_extensions import override

from distmuon.errors import Entry, see

T = TypeVar("T")

# What the other ranks get to notice and to leave a note; the first closes its connections to them,
# so that those who wait for it notice at once.
_GRACE_S = 2.0
# All of it together. A rank raises at most this long after the message failed, even if the store
# died with its host and does not answer.
LIMIT_S = 4.0
_LINGER_S = 1.0
_POLL_S = 0.02
_NAMES_SHOWN = 3
_PLACES_SHOWN = 4

_NOTICED, _NOTE, _VERDICT, _READ = (
    f"distmuon/failure/{key}" for key in ("noticed", "note", "verdict", "read")
)


class Store(Protocol):
    """The part of `torch.distributed.Store` that is used here."""

    def set(self, key: str, value: str, /) -> None:
        """Write a value."""

    def get(self, key: str, /) -> bytes:
        """Read a value that is there."""
        ...

    def add(self, key: str, amount: int, /) -> int:
        """Add to a counter and return its value."""
        ...

    def check(self, keys: list[str], /) -> bool:
        """Whether all keys are there."""
        ...


@dataclass(frozen=True, slots=True)
class Topic:
    """What a message is about, for the error if it fails.

    Attributes:
        phase: "setup", "desync", "reduce", "clip", "agree", "gather", "scatter", "publish", ...
        wave: Which wave of a gather or scatter, from 0.
        names: FQNs of the parameters concerned.
    """

    phase: str
    wave: int | None = None
    names: tuple[str, ...] = ()

    @override
    def __str__(self) -> str:
        wave = "" if self.wave is None else f", wave {self.wave}"
        more = len(self.names) - _NAMES_SHOWN
        shown = ", ".join(self.names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
        return f"{self.phase}{wave}" + (f" ({shown})" if shown else "")


class Verdict(NamedTuple):
    """What the ranks found out about a failure.

    Attributes:
        missing: Ranks in the process group without which the others cannot go on.
        reason: "gone": their connections closed. "silent": they did not answer. "raised": they
            stopped with an error of their own. "apart": all answered, but not from the same place.
            "unknown": nobody could be asked.
        text: What there is to say beside that.
    """

    missing: tuple[int, ...]
    reason: Literal["gone", "silent", "raised", "apart", "unknown"]
    text: str


_ENTRIES: dict[str, Entry] = {
    "gone": "rank-lost",
    "silent": "rank-late",
    "raised": "one-rank-stopped",
    "apart": "ranks-apart",
    "unknown": "rank-lost",
}


class RankFailure(RuntimeError):
    """A rank is dead, late, or stopped with an error, so the others cannot go on.

    Raised on every surviving rank. The process group cannot be used any more, and the step that
    failed may be half done: start again from a checkpoint.

    Attributes:
        step: The step that failed, from 1; 0 before the first.
        phase: What was being done: "setup", "reduce", "agree", "gather", "scatter", "publish", ...
        wave: Which wave of a gather or scatter, from 0; None elsewhere.
        names: FQNs of the parameters that the failed message was about.
        missing: Ranks in the process group that are dead, late or stopped, as far as is known.
    """

    def __init__(self, step: int, topic: Topic, verdict: Verdict, explanation: str) -> None:
        """Say where it happened and who is missing.

        Args:
            step: The step.
            topic: Of the message that failed.
            verdict: What the ranks found out.
            explanation: The sentence that says it.
        """
        super().__init__(
            f"Step {step}, {topic}: {explanation} The process group cannot be used any more and "
            "the step may be half done: restart from the last checkpoint."
            + see(_ENTRIES[verdict.reason])
        )
        self.step = step
        self.phase, self.wave, self.names = topic.phase, topic.wave, topic.names
        self.missing = verdict.missing


class RollCall:
    """The notes and the verdict in a process group's store."""

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        """Bind to a store; nothing is written yet.

        Args:
            store: Of the process group.
            rank: This rank in the group.
            world_size: Ranks in the group.
        """
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._turn = 0

    def answer(self, place: str, gone: Collection[int]) -> None:
        """Leave a note. To be left before this rank closes its connections.

        Args:
            place: Where this rank stands.
            gone: Ranks whose connections were found closed.
        """
        note = json.dumps({"place": place, "gone": sorted(gone)})
        self._store.set(f"{_NOTE}/{self._rank}", note)
        self._turn = self._store.add(_NOTICED, 1)

    def blame_me(self, text: str) -> None:
        """Tell the others why this rank stops, unless they know of another reason already.

        Args:
            text: The error.
        """
        if self._turn == 1:
            self._write(Verdict((self._rank,), "raised", text))

    def verdict(self) -> Verdict:
        """What is to be said, the same on every rank. Takes a few seconds at most.

        Returns:
            The verdict of the first rank that noticed.
        """
        if self._turn == 1:
            verdict = self._decide()
            self._write(verdict)
            # The store may live in this process, which the caller will probably end.
            self._wait(
                lambda: self._store.add(_READ, 0) >= self._store.add(_NOTICED, 0) - 1, _LINGER_S
            )
            return verdict
        if not self._wait(lambda: self._store.check([_VERDICT]), _GRACE_S + _LINGER_S):
            return Verdict((), "unknown", "")
        missing, reason, text = json.loads(self._store.get(_VERDICT))
        self._store.add(_READ, 1)
        return Verdict(tuple(missing), reason, text)

    def _write(self, verdict: Verdict) -> None:
        self._store.set(_VERDICT, json.dumps(verdict))

    def _decide(self) -> Verdict:
        self._wait(lambda: self._store.add(_NOTICED, 0) >= self._world_size, _GRACE_S)
        ranks = range(self._world_size)
        notes = {
            rank: json.loads(self._store.get(f"{_NOTE}/{rank}"))
            for rank in ranks
            if self._store.check([f"{_NOTE}/{rank}"])
        }
        closed = {rank for note in notes.values() for rank in note["gone"]}
        gone = tuple(rank for rank in ranks if rank in closed and rank not in notes)
        silent = tuple(rank for rank in ranks if rank not in notes)
        places: defaultdict[str, list[int]] = defaultdict(list)
        for rank, note in notes.items():
            places[note["place"]].append(rank)
        told = [f"ranks {ranks} in {place}" for place, ranks in places.items()]
        text = "; ".join(told[:_PLACES_SHOWN] + (["..."] if len(told) > _PLACES_SHOWN else []))
        if gone:
            return Verdict(gone, "gone", text)
        return Verdict(silent, "silent" if silent else "apart", text)

    def _wait(self, done: Callable[[], bool], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not done():
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True


def explain(verdict: Verdict, rank: int, global_ranks: Sequence[int]) -> str:
    """A verdict as this rank tells it.

    Args:
        verdict: What the ranks found out.
        rank: This rank in the process group.
        global_ranks: Number of each rank in the whole job.

    Returns:
        A sentence.
    """
    who = f"ranks {list(verdict.missing)}"
    elsewhere = [global_ranks[missing] for missing in verdict.missing]
    if elsewhere != list(verdict.missing):
        who += f" of the process group (global ranks {elsewhere})"
    if rank in verdict.missing:
        return (
            f"the other ranks gave up on this rank, which came too late or lost its connections. "
            f"They were: {verdict.text}."
        )
    others = f" Left: {verdict.text}." if ";" in verdict.text else ""
    if verdict.reason == "gone":
        return f"{who} are gone: their connections closed; see their own output for why.{others}"
    if verdict.reason == "silent":
        return (
            f"{who} did not arrive within the process group's timeout: late, stuck, or in another "
            f"part of the program.{others}"
        )
    if verdict.reason == "raised":
        return f"{who} stopped with an error: {verdict.text}."
    if verdict.reason == "apart" and ";" not in verdict.text:
        return (
            f"a message failed, and all ranks stand in the same place: {verdict.text}. One of them "
            "came later than the process group's timeout allows, or the network failed."
        )
    if verdict.reason == "apart":
        return (
            f"a message failed though no rank is missing: {verdict.text}. Either the ranks do not "
            "run the same program, or the network failed."
        )
    return "a message failed, and the ranks could not be asked for the reason."


def within(seconds: float, function: Callable[[], T]) -> T | None:
    """Run a function that may never return.

    Args:
        seconds: How long to wait for it.
        function: What to run, in a thread of its own.

    Returns:
        Its result; None if there was none in time, or it raised.
    """
    results: list[T] = []

    def run() -> None:
        # A store whose host is gone raises whatever its transport raises. The message that failed
        # is what the user is told of, so this second failure has nothing to add.
        try:
            results.append(function())
        except Exception:
            return

    thread = threading.Thread(target=run, name="distmuon-roll-call", daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None

"""Where a step's time goes, when asked."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch
from typing_extensions import override

Profile = Literal["off", "phases"]

_NOTHING: AbstractContextManager[None] = nullcontext()
_MOST_MARKS = 10_000


class PhaseClock:
    """Measures nothing: what every step calls when nobody has asked."""

    def __call__(self, phase: str) -> AbstractContextManager[None]:
        """A context whose time belongs to a phase, that of phases inside it excepted.

        Args:
            phase: Its name.
        """
        return _NOTHING

    def seconds(self) -> dict[str, float]:
        """Time of each phase so far, in seconds."""
        return {}


class HostClock(PhaseClock):
    """Measures the host's time; on CPUs that is the time of the work."""

    def __init__(self) -> None:
        """Start at zero."""
        self._total: defaultdict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    @override
    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._switch()
        self._open.append(phase)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._open:
            self._total[self._open[-1]] += now - self._since
        self._since = now

    @override
    def seconds(self) -> dict[str, float]:
        return dict(self._total)


class CudaClock(HostClock):
    """Measures a device's current stream by events; only `seconds` waits for it."""

    def __init__(self, device: torch.device) -> None:
        """Start at zero.

        Args:
            device: Which, also if another is the current one.
        """
        super().__init__()
        self._device = device
        # From each event to the next the stream worked on this phase; None between steps.
        self._marks: list[tuple[str | None, torch.cuda.Event]] = []

    @override
    def _switch(self) -> None:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        if self._marks:
            self._marks[-1] = (self._open[-1] if self._open else None, self._marks[-1][1])
        self._marks.append((None, event))
        if len(self._marks) > _MOST_MARKS:
            self._fold()

    @override
    def seconds(self) -> dict[str, float]:
        self._fold()
        return super().seconds()

    def _fold(self) -> None:
        if not self._marks:
            return
        self._marks[-1][1].synchronize()
        for (phase, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if phase is not None:
                self._total[phase] += start.elapsed_time(end) / 1e3
        self._marks = self._marks[-1:]


def make_clock(profile: Profile, device: torch.device) -> PhaseClock:
    """The clock for a policy.

    Args:
        profile: "phases" measures.
        device: Where the work is done.

    Returns:
        The clock.
    """
    if profile == "off":
        return PhaseClock()
    return CudaClock(device) if device.type == "cuda" else HostClock()

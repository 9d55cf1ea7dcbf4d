"""SIGTERM and Ctrl-C as a wish to stop, granted where all ranks can grant it together.

[Note: stopping]
A signal reaches the ranks at different moments, or only some of them, so none may act on it alone.
Each remembers it; after every step the ranks compare notes, and if any was signalled all save and
leave. A second signal changes nothing: the launcher and the scheduler often both send one, and one
that struck while a checkpoint is being written would waste it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Literal

STOPPING = (signal.SIGTERM, signal.SIGINT)
NOTICE = b"\nStopping after this step; SIGKILL ends the run at once, without saving.\n"

Handler = Callable[[int, FrameType | None], object] | int | None


class StopSignals:
    """Remembers SIGTERM and SIGINT while it is entered, instead of dying of them.

    Attributes:
        received: number of the first one; 0 before.
    """

    def __init__(self, *, notice: Literal["print", "silent"]) -> None:
        """Nothing is received yet.

        Args:
            notice: whether to tell the user, on standard error, that the wish was heard.
        """
        self.received = 0
        self._notice = notice
        self._previous: dict[int, Handler] = {}

    def __enter__(self) -> StopSignals:
        """Begin to listen. Python lets only the main thread do this; elsewhere nothing happens."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {each: signal.signal(each, self._remember) for each in STOPPING}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the signals back, unless one was received: then the process is about to end well."""
        if not self.received:
            self.release()

    def release(self) -> None:
        """Let signals do again what they did before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            return
        self.received = number
        if self._notice == "print":
            # Not print: the signal may have struck in the middle of one, and a stream is no good
            # to two at a time.
            os.write(2, NOTICE)

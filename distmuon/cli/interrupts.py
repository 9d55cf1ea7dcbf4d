"""Ctrl-C while modules are imported, where nothing is begun yet and nothing has to be undone.

An import that is interrupted tells so in many ways: torch's C++ parts turn the KeyboardInterrupt
into an ImportError, or lose it. So there the signal ends the process itself.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# As a shell counts a program that SIGINT ended.
INTERRUPTED = 130


@contextmanager
def leaving_at_once(name: str = "distmuon") -> Iterator[None]:
    """Let SIGINT end the process, with a line and exit code 130, while this is entered.

    A handler that is not Python's own stays: a shell that runs a program in the background has it
    ignore SIGINT, and a program around this one may have its own plans.

    Args:
        name: Of the command, for the line.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        # Neither print nor sys.exit: this may strike in the middle of anything.
        os.write(2, f"\n{name}: interrupted.\n".encode())
        os._exit(INTERRUPTED)

    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)

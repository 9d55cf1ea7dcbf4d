"""Standard output for programs alone: what libraries write there goes to standard error.

[Note: foreign lines]
DeepSpeed's logger has a handler on standard output, gloo (of torch 2.9) tells its connections
there from C++, and a compiler that is started inherits it. Neither a logger's configuration nor
sys.stdout reaches all of them, so the descriptor itself is turned.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import TextIO


@contextmanager
def objects_alone() -> Iterator[TextIO]:
    """Turn standard output of this process to its standard error: [Note: foreign lines].

    Yields:
        A stream that still leads to the old place, while this is entered.
    """
    out = sys.stdout
    try:
        number, errors = out.fileno(), sys.stderr.fileno()
    except (AttributeError, OSError):  # closed, or caught in memory by whoever called us
        with redirect_stdout(sys.stderr):
            yield out
        return
    out.flush()
    with os.fdopen(os.dup(number), "w", encoding=out.encoding, errors=out.errors) as kept:
        os.dup2(errors, number)
        try:
            # A handler that is made meanwhile keeps the stream that it finds here.
            with redirect_stdout(sys.stderr):
                yield kept
        finally:
            out.flush()
            os.dup2(kept.fileno(), number)


@contextmanager
def somewhere_to_print() -> Iterator[None]:
    """Let a process print into nothing whose standard output or error was closed (`>&-`)."""
    with ExitStack() as stack:
        for stream, redirect in ((sys.stdout, redirect_stdout), (sys.stderr, redirect_stderr)):
            if stream is None:  # typeshed does not say so, Python does
                stack.enter_context(redirect(stack.enter_context(Path(os.devnull).open("w"))))
        yield


def is_of_output(error: BaseException) -> bool:
    """Whether output can take no more: nobody reads the pipe, or a disk is full.

    Args:
        error: Any; one about a file that could not be opened has its name.
    """
    lost = isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ENOSPC)
    return lost and getattr(error, "filename", None) is None


def give_up_output() -> None:
    """Lead standard output nowhere: what is still to be written at exit cannot fail again."""
    with suppress(OSError):  # caught in memory by whoever called us
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)

"""Standard output for programs alone: what libraries write there goes to standard error.

[Note: foreign lines]
DeepSpeed's logger has a handler on standard output, gloo (of torch 2.9) tells its connections
there from C++, and a compiler that is started inherits it. Neither a logger's configuration nor
sys.stdout reaches all of them, so the descriptor itself is turned.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
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

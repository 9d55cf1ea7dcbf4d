"""What never becomes part of a recorded graph: it reads numbers of the host anew at each call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from distmuon.errors import see

P = ParamSpec("P")
T = TypeVar("T")


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    active = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return active and torch.cuda.is_current_stream_capturing()


def refuse_capture(name: str) -> None:
    """Refuse to become part of a CUDA graph.

    Args:
        name: Of the method that is being called.

    Raises:
        RuntimeError: while a CUDA graph is captured.
    """
    if is_capturing():
        raise RuntimeError(
            f"{name}() was called while a CUDA graph is captured. Every replay would repeat this "
            "one step, with its learning rate and its bias correction. Capture the forward and "
            'backward pass alone, with reduce="ddp", and call it after each replay. Nothing was '
            "changed." + see("graph-capture")
        )


def uncompiled(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function that is to run as it is written, each time.

    torch.compile breaks its graph there and leaves everything inside alone.

    Args:
        function: What reads learning rates, counts of steps and the like.

    Returns:
        The function.
    """
    made: list[Callable[P, T]] = []

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        # Not at import: this needs the compiler, which takes as long to import as torch itself. An
        # optimizer's constructor has imported it in any case.
        if not made:
            made.append(torch.compiler.disable(function))  # type: ignore[no-untyped-call]
        return made[0](*args, **kwargs)

    return call

"""Which device a kernel runs on, and what fits there."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

# Programs along a grid's second dimension, where a kernel's batch goes.
MOST_MATRICES = 2**16 - 1


def on_device_of(x: Tensor) -> AbstractContextManager[None]:
    """A context for launches: Triton takes the current device, which need not be a tensor's.

    Args:
        x: On a GPU; for a CPU's tensor nothing happens.
    """
    device: AbstractContextManager[None] = torch.cuda.device_of(x)  # type: ignore[no-untyped-call]
    return device

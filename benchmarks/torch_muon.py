"""torch.optim.Muon without its cast to bfloat16, to compare with it in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.optim import _muon


class _WithoutBfloat16:
    """The module torch, in which bfloat16 means float32."""

    bfloat16 = torch.float32

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def newton_schulz_in_fp32() -> Iterator[None]:
    """Let torch.optim.Muon's Newton-Schulz keep the dtype of its float32 gradients.

    It always casts to bfloat16, which hides differences behind rounding and is emulated on CPUs
    without bf16 units. Up to torch 2.13 the cast reads `grad.bfloat16()`, in torch 2.15
    `grad.to(dtype=torch.bfloat16, copy=True)`; all else stays torch's own code.
    """
    # A copy, as the cast makes one: what follows writes to it.
    with (
        mock.patch.object(Tensor, "bfloat16", Tensor.clone),
        mock.patch.object(_muon, "torch", _WithoutBfloat16()),
    ):
        yield

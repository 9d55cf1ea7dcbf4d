"""torch.optim.Muon, as an oracle in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import _muon


class _InFp32:
    """The module torch, to the eye of one that asks it for bfloat16."""

    bfloat16 = torch.float32

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def without_its_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take out the cast to bfloat16 before Newton-Schulz, which hides what is looked for.

    In torch 2.9 and 2.13 that is `Tensor.bfloat16()`, in 2.15 `Tensor.to(dtype=torch.bfloat16)`.
    """
    monkeypatch.setattr(Tensor, "bfloat16", lambda self: self.clone())
    monkeypatch.setattr(_muon, "torch", _InFp32())

"""What a forecast says of the state is what an optimizer allocates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from distmuon import Muon, build_param_groups
from distmuon.forecast.memory import estimate_memory


def build(dtype: torch.dtype) -> nn.Module:
    sizes = (16, 48), (48, 32), (32, 16)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in sizes), nn.LayerNorm(16)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("matrices", ["muon", "normuon"])
def test_state_is_forecast_for_each_rule(matrices: Any, dtype: torch.dtype) -> None:
    model = build(dtype)
    found = estimate_memory(model, world_size=1, matrices=matrices)["distmuon"]
    optimizer = Muon(build_param_groups(model, matrices=matrices))
    model(torch.ones(3, 16, dtype=dtype)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()["state"].values()
    kept = sum(
        tensor.nbytes for entry in state for key, tensor in entry.items() if "momentum" in key
    )
    assert kept > 0
    assert found.momentum == pytest.approx(kept, rel=0.01)
    assert found.momentum + found.moments + found.master == optimizer.report().state_bytes

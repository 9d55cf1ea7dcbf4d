"""What a forecast says of the state is what an optimizer allocates."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from distmuon import Muon, build_param_groups
from distmuon.buckets import specify
from distmuon.cli.main import main
from distmuon.forecast.memory import estimate_memory
from distmuon.forecast.traffic import state_bytes


def build(dtype: torch.dtype) -> nn.Module:
    sizes = (16, 48), (48, 32), (32, 16)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in sizes), nn.LayerNorm(16)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("matrices", ["muon", "normuon"])
def test_state_is_forecast_for_each_rule(matrices: Any, dtype: torch.dtype) -> None:
    model = build(dtype)
    found = estimate_memory(model, world_size=1, groups={"matrices": matrices})["distmuon"]
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


def test_state_of_a_class_in_adamws_place_is_counted() -> None:
    model = build(torch.float32)
    groups = build_param_groups(model, companion="torch.optim.SGD(momentum=0.9)")
    optimizer = Muon(groups)
    model(torch.ones(3, 16)).sum().backward()
    optimizer.step()
    specs = specify(optimizer.param_groups, optimizer.parameter_names, 1, optimizer.policy)
    assert sum(map(state_bytes, specs)) == optimizer.report().state_bytes


def test_estimate_and_plan_agree_on_normuon(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["configs/tiny.yaml", "optimizer.name=normuon", "--world-size=3", "--json"]
    assert main(["estimate", *arguments]) == 0
    held = json.loads(capsys.readouterr().out)["bytes"]["distmuon"]
    assert main(["plan", *arguments]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert held["momentum"] + held["moments"] == planned["state_bytes"] > 0

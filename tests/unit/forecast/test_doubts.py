"""What `--strict` stops at: routes that were guessed."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import nn

from distmuon import CostModel
from distmuon.forecast.forecast import Forecast, make_forecast
from distmuon.forecast.models import MODELS

RATES = CostModel(latency=1e-5, bandwidth=1e10, flops=1e12)


class Odd(nn.Module):
    """Parameters of which nothing but their shape tells what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 32)
        self.hidden = nn.Linear(32, 32, bias=False)
        self.table = nn.Parameter(torch.empty(64, 32))
        self.stack = nn.Parameter(torch.empty(4, 32, 16))
        self.qkv_proj = nn.Linear(32, 96, bias=False)
        self.again = nn.Linear(32, 96, bias=False)


def forecast(model: nn.Module, overrides: Mapping[str, str] | None = None) -> Forecast:
    groups = {"overrides": overrides}
    return make_forecast("m", model, world_size=2, cost_model=RATES, groups=groups)


def test_guesses_are_told_and_overrides_settle_them() -> None:
    found = forecast(Odd())
    doubts = {row.name: row.doubt for row in found.doubts}
    assert doubts == {
        "table": "a bare parameter of Odd: a matrix, or a table of rows?",
        "stack": "first dimension, 4, taken for the number of matrices",
        "qkv_proj.weight": "several matrices in one parameter are orthogonalized as one",
        "again.weight": "as large as embed: an output head or a second embedding?",
    }
    settled = forecast(Odd(), {name: "muon" for name in doubts} | {"table": "adamw"})
    assert settled.doubts == ()


def test_a_head_found_by_its_shape_alone_is_a_guess() -> None:
    model = nn.Sequential(nn.Embedding(96, 32), nn.Linear(32, 32), nn.Linear(32, 96, bias=False))
    (row,) = forecast(model).doubts
    assert (row.name, row.doubt) == ("2.weight", "taken for the output head by its shape alone")


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"kimi-k2"}))
def test_well_named_models_leave_no_doubt(name: str) -> None:
    assert forecast(MODELS[name]()).doubts == ()

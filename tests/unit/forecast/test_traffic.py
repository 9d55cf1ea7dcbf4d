"""The bytes and loads of all ranks at once are those of each rank's own plan."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distmuon import CostModel, Muon
from distmuon.buckets import BucketSpec, specify
from distmuon.forecast.forecast import make_forecast
from distmuon.forecast.traffic import bytes_per_rank, held_numel, moves
from distmuon.options import Policy

FREE = CostModel(latency=1e-12, bandwidth=1e18, flops=1e9)
SHAPES = ((64, 96), (32, 32), (16, 144), (6, 32, 16), (37, 61))


def optimizer(members: list[int], **options: Any) -> Muon:
    groups: list[dict[str, Any]] = [
        {"params": [], "algorithm": algorithm} for algorithm in ("muon", "adamw")
    ]
    for number, member in enumerate(members):
        dtype = torch.bfloat16 if number % 3 == 2 else torch.float32
        weight = nn.Parameter(torch.empty(SHAPES[member], device="meta", dtype=dtype))
        groups[0]["params"].append((f"w{number}", weight))
    norm = nn.Parameter(torch.empty(33, device="meta"))
    groups[1]["params"].append(("norm", norm))
    return Muon(groups, cost_model=FREE, **options)


def planned(spec: BucketSpec, rank: int, policy: Policy) -> dict[str, int]:
    plan = spec.plan(rank, policy.wave_numel)
    if plan is None:
        return {}
    return {
        "gather": 4 * plan.outgoing_numel,
        "scatter": 4 * plan.incoming_numel,
        "gram": policy.sharing.itemsize * plan.split.sent_numel("gram"),
        "transform": policy.sharing.itemsize * plan.split.sent_numel("transform"),
    }


@given(
    st.lists(st.integers(0, len(SHAPES) - 1), min_size=1, max_size=9),
    st.integers(1, 7),
    st.sampled_from([("flat", 1), ("aligned", 1), ("flat", 4), ("auto", 3)]),
    st.sampled_from(["float32", "float64"]),
)
def test_the_sums_over_ranks_are_each_ranks_plan(
    members: list[int],
    world_size: int,
    how: tuple[Literal["flat", "aligned", "auto"], int],
    split_dtype: Literal["float32", "float64"],
) -> None:
    layout, max_split = how
    muon = optimizer(members, layout=layout, max_split=max_split, split_dtype=split_dtype)
    specs = specify(muon.param_groups, muon.parameter_names, world_size, muon.policy)
    found = bytes_per_rank(specs, muon.policy)
    for rank in range(world_size):
        for kind in ("gather", "scatter", "gram", "transform"):
            expected = sum(planned(spec, rank, muon.policy).get(kind, 0) for spec in specs)
            assert found.get(kind, [0] * world_size)[rank] == expected, (kind, rank)
    sent, received = [0] * world_size, [0] * world_size
    for holder, owner, nbytes in moves(specs, muon.policy):
        assert holder != owner
        sent[holder] += nbytes
        received[owner] += nbytes
    assert sent == found.get("gather", [0] * world_size)
    assert received == found.get("scatter", [0] * world_size)
    for spec in specs:
        segments = [spec.layout.segments(rank) for rank in range(world_size)]
        assert held_numel(spec.layout) == [sum(s.numel for s in each) for each in segments]


def test_gradients_cost_as_the_readme_says() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    whole = 2 * 64 * 64 * 4
    for reduce, share in (("ddp", 3), ("hook", 2), ("owned", 2)):
        found = make_forecast("m", model, world_size=4, cost_model=FREE, options={"reduce": reduce})
        other = ("agree", "gather", "scatter")
        counts = [each for kind, each in found.sent.items() if kind not in other]
        assert [sum(each) for each in zip(*counts, strict=True)] == [share * whole * 3 // 4] * 4
        assert found.adamw.zero1 == found.adamw.all_reduce == 2 * whole * 3 // 4


def test_one_rank_sends_nothing() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    found = make_forecast("m", model, world_size=1, cost_model=FREE)
    assert (found.sent, found.moves, found.sent_by_rank) == ({}, (), (0,))
    assert found.reduce_seconds == 0.0


@pytest.mark.parametrize("world_size", [0, -1])
def test_no_ranks_are_refused(world_size: int) -> None:
    with pytest.raises(ValueError, match="world_size"):
        make_forecast("m", nn.Linear(4, 4), world_size=world_size, cost_model=FREE)

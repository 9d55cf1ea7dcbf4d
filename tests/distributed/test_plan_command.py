"""`distmuon plan` says before what real ranks report after: the same owners, loads and bytes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distmuon import CostModel, Muon, Report, build_param_groups
from distmuon.cli.main import main
from tests.harness import run_ranks

RANKS = 4
STEPS = 2
MOVING, SHARED = frozenset({"gather", "scatter"}), frozenset({"gram", "transform"})
# Messages that cost nothing: balance alone decides, so that much moves however small the matrices.
RATES = {"latency": 1e-12, "bandwidth": 1e18, "flops": 1e9, "measured": {"32x144": 2e-2}}


class Small(nn.Module):
    """A large and several small matrices, an embedding, norms, and a stack of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.large = nn.Linear(64, 96)
        self.small = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(5))
        self.norm = nn.LayerNorm(96)
        self.experts = nn.Parameter(0.1 * torch.ones(6, 16, 24))
        self.wide = nn.Linear(32, 144, bias=False)

    def forward(self) -> torch.Tensor:
        return torch.stack([(p * p).sum() for p in self.parameters()]).sum()


def build() -> nn.Module:
    torch.manual_seed(0)
    return Small()


def train(options: dict[str, Any], dtype: torch.dtype) -> tuple[Report, Counter[str]]:
    model = build().to(dtype)
    companion = options.get("companion", "adamw")
    options = {key: value for key, value in options.items() if key != "companion"}
    reduce = options.get("reduce", "ddp")
    owned = reduce == "owned"
    wrapped: nn.Module = model if owned else DistributedDataParallel(model)
    rates = {**RATES, "measured": {(32, 144): 2e-2}}
    optimizer = Muon(
        build_param_groups(model, companion=companion),
        process_group=dist.group.WORLD,
        cost_model=CostModel(**rates),
        **options,
    )
    if reduce != "ddp":
        optimizer.attach(wrapped)
    before: Counter[str] = Counter()
    for step in range(STEPS + 1):
        optimizer.zero_grad()
        wrapped().backward()
        optimizer.step()
        if step == 0:  # the first one also compares the ranks' setups
            before = Counter(optimizer.report().bytes_sent)
    report = optimizer.report()
    return report, Counter(report.bytes_sent) - before


@pytest.mark.parametrize(
    ("options", "dtype", "kinds"),
    [
        ({"layout": "flat", "reduce": "owned", "wave_bytes": 4096}, torch.bfloat16, MOVING),
        ({"layout": "flat", "reduce": "hook", "max_split": 3}, torch.float32, MOVING | SHARED),
        ({"layout": "auto", "reduce": "ddp"}, torch.float32, frozenset()),
        ({"wire": "bfloat16", "max_split": 3}, torch.float32, MOVING | SHARED),
        ({"companion": "torch.optim.Adafactor"}, torch.float32, MOVING),
        ({"companion": "torch.optim.SGD(momentum=0.9)"}, torch.float32, MOVING),
    ],
)
def test_the_plan_is_what_four_ranks_report(
    options: dict[str, Any],
    dtype: torch.dtype,
    kinds: frozenset[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rates = tmp_path / "rates.json"
    rates.write_text(json.dumps(RATES))
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    dtype_flag = f"--dtype={str(dtype).removeprefix('torch.')}"
    ranks = f"--world-size={RANKS}"
    arguments = [f"{__name__}:build", ranks, dtype_flag, "--cost-model", str(rates), *flags]
    assert main(["plan", *arguments, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)

    reports = run_ranks(RANKS, train, options, dtype)
    owners = Counter(owner for row in planned["parameters"] for owner in row["owners"])
    assert sum(owners.values()) == reports[0][0].matrices == 13
    for rank, (report, sent) in enumerate(reports):
        assert planned["loads"] == list(report.loads)
        assert planned["state_bytes"] == report.state_bytes
        assert owners[rank] == report.matrices_owned
        expected = {
            kind: STEPS * counts[rank]
            for kind, counts in planned["bytes_sent"].items()
            if kind != "all-reduce"  # DDP's own, which the report does not see
        }
        assert {kind: count for kind, count in expected.items() if count} == dict(sent)
    assert set(planned["bytes_sent"]) & (MOVING | SHARED) == kinds
    whole = {each["algorithm"]: each for each in planned["buffers"] if each["cut"] == "whole"}
    ratios = {name: RANKS * b["shard_numel"] / b["numel"] for name, b in whole.items()}
    assert ratios == pytest.approx(dict(reports[0][0].whole))
    for row in planned["parameters"]:
        assert len(row["holders"]) == (row["count"] if row["algorithm"] in whole else 0)

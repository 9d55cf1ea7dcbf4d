"""Matrices that several ranks share, on real gloo ranks, against one process."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distmuon import Muon, Report
from distmuon.plan import ExchangePlan
from tests.harness import run_ranks

# "wide" and "tall" are cut along the columns and along the rows; both have odd sizes.
LARGE = {"wide": (19, 401), "tall": (397, 17), "small": (5, 7), "experts": (2, 6, 150)}
OTHERS = {"bias": (23,)}
STEPS = 5


def train(
    shapes: dict[str, tuple[int, ...]],
    process_group: Any,
    absent: dict[int, tuple[str, ...]] | None = None,
    **options: Any,
) -> tuple[dict[str, Tensor], Muon]:
    generator = torch.Generator().manual_seed(3)
    model = {
        name: nn.Parameter(torch.randn(shape, generator=generator))
        for name, shape in {**shapes, **OTHERS}.items()
    }
    matrices = [(name, model[name]) for name in shapes]
    half = len(matrices) // 2
    groups = [
        {"params": matrices[:half]},
        {"params": matrices[half:], "lr": 5e-3, "nesterov": False, "ns_coefficients": "keller"},
        {"params": [(name, model[name]) for name in OTHERS], "algorithm": "adamw"},
    ]
    optimizer = Muon(groups, lr=2e-2, process_group=process_group, **options)
    for step in range(STEPS):
        for name, parameter in model.items():
            grad = torch.randn(parameter.shape, generator=generator)
            parameter.grad = None if name in (absent or {}).get(step, ()) else grad
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in model.items()}, optimizer


def on_rank(
    shapes: dict[str, tuple[int, ...]],
    options: dict[str, Any],
    absent: dict[int, tuple[str, ...]] | None = None,
) -> tuple[dict[str, Tensor], Report, ExchangePlan]:
    result, optimizer = train(shapes, dist.group.WORLD, absent, **options)
    return result, optimizer.report(), optimizer.plan[0]


def assert_near(
    outcome: list[tuple[dict[str, Tensor], Report, ExchangePlan]],
    reference: dict[str, Tensor],
    tolerance: float,
) -> None:
    start, _ = {}, 0
    del start
    for name, expected in reference.items():
        first = outcome[0][0][name]
        error = float((first - expected).norm() / expected.norm())
        assert error < tolerance, f"{name}: {error}"
        assert all(torch.equal(result[name], first) for result, _, _ in outcome), name

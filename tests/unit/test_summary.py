"""The two lines at the end of a training, and what they say when something is wrong."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from distmuon import Muon, Report, summarize
from distmuon.summary import combine


def report(rank: int, world_size: int, *, calls: int, expected: int, owned: int = 14) -> Report:
    return Report(
        steps=300,
        skipped=2,
        rank=rank,
        world_size=world_size,
        matrices=28,
        matrices_owned=owned,
        newton_schulz_calls=calls,
        newton_schulz_expected=expected,
        newton_schulz_flops=3 * 10**11,
        loads=(5, 5),
        bytes_sent={"agree": 3000, "publish": 3 * 10**8},
        gradient_norms=None,
        diagnostics=None,
        seconds={},
        state_bytes=1000 * (rank + 1),
        muon_parameters=70,
        adamw_parameters=7,
    )


def lines(calls: Sequence[int], expected: Sequence[int]) -> tuple[str, list[str]]:
    rows = zip(calls, expected, strict=True)
    summary = combine(
        [report(i, len(calls), calls=done, expected=due) for i, (done, due) in enumerate(rows)]
    )
    return summary.problem, str(summary).splitlines()


def test_all_is_well_in_two_lines() -> None:
    problem, (matrices, rest) = lines([4200, 4200], [4200, 4200])
    assert problem == ""
    assert matrices == "Muon orthogonalized 28 matrices x 300 steps = 8,400 of 8,400"
    assert rest == (
        "2.00 GFLOP of Newton-Schulz a step; 2 ranks own 14 matrices each; "
        "sent by all of them a step: agree 20 B, publish 2.00 MB, gradients not counted; "
        "state 1.00 kB to 2.00 kB on each rank; 2 steps skipped"
    )


def test_a_matrix_without_a_gradient_is_not_missing() -> None:
    problem, (matrices, _) = lines([4200, 4190], [4200, 4190])
    assert problem == ""
    assert "8,390 of the 8,390 matrices that had a gradient" in matrices
    assert "28 matrices x 300 steps are 8,400" in matrices


def test_a_lost_matrix_is_said_aloud() -> None:
    problem, (matrices, _) = lines([4200, 4199], [4200, 4200])
    assert "rank 1: 4,199 of 4,200" in problem
    assert matrices.startswith("WARNING: ")
    assert "8,399 of 8,400" in matrices
    assert problem in matrices


def test_a_matrix_that_nobody_owns_is_said_aloud() -> None:
    summary = combine([report(0, 1, calls=8100, expected=8100, owned=27)])
    assert summary.problem == "27 of 28 matrices have an owner"
    assert str(summary).startswith("WARNING: ")


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_one_process_sums_up_by_itself(steps: int) -> None:
    model = nn.Linear(6, 5, bias=False)
    optimizer = Muon(model.parameters())
    for _ in range(steps):
        model.weight.grad = torch.randn(5, 6)
        optimizer.step()
    matrices, rest = str(summarize(optimizer)).splitlines()
    count = "1 step" if steps == 1 else f"{steps} steps"
    assert matrices == f"Muon orthogonalized 1 matrix x {count} = {steps} of {steps}"
    assert "rank" not in rest
    assert "sent" not in rest
    assert f"state {4 * 30 + 8 if steps else 0} B" in rest

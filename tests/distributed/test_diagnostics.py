"""Diagnostics: right, the same on every rank, and without any effect on the training."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distmuon import Muon, Report
from distmuon.diagnostics import SAMPLES, Diagnostics, measure_spectrum
from tests.harness import run_ranks

STEPS = 5
SHAPES = {
    "up": (48, 20),
    "down": (20, 48),
    "experts": (3, 16, 24),
    "q": (16, 16),
    "table": (40, 16),
}
Weights = dict[str, Tensor]
Outcome = tuple[Weights, Report]


def gradient(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator)


def train(process_group: Any, **options: Any) -> tuple[Weights, Muon]:
    generator = torch.Generator().manual_seed(1)
    model = {n: nn.Parameter(gradient(torch.empty(s), generator)) for n, s in SHAPES.items()}
    groups = [
        {"params": [(n, model[n]) for n in ("up", "down")]},
        {"params": [(n, model[n]) for n in ("experts", "q")], "lr": 3e-3, "adjust_lr_fn": "mup"},
        {"params": [("table", model["table"])], "algorithm": "adamw"},
    ]
    optimizer = Muon(groups, lr=2e-2, process_group=process_group, **options)
    for step in range(STEPS):
        for name, parameter in model.items():
            grad = gradient(parameter, generator)
            parameter.grad = None if (name, step) == ("q", STEPS - 1) else grad
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in model.items()}, optimizer


def on_rank(options: dict[str, Any]) -> Outcome:
    weights, optimizer = train(dist.group.WORLD, **options)
    return weights, optimizer.report()


def found(report: Report) -> Diagnostics:
    assert report.diagnostics is not None
    return report.diagnostics


@pytest.mark.parametrize("options", [{}, {"layout": "aligned"}, {"wave_bytes": 64}])
def test_looking_changes_no_bit_and_all_ranks_see_what_one_process_sees(
    options: dict[str, Any],
) -> None:
    quiet, _ = train(None)
    alone, optimizer = train(None, diagnostics_every=1)
    assert all(torch.equal(alone[name], quiet[name]) for name in SHAPES)
    expected = found(optimizer.report())
    outcome = run_ranks(3, on_rank, {"diagnostics_every": 1, **options})
    for weights, report in outcome:
        assert all(torch.equal(weights[name], quiet[name]) for name in SHAPES)
        assert found(report) == found(outcome[0][1])
    seen = found(outcome[0][1])
    assert seen.step == expected.step == STEPS
    for group, reference in zip(seen.groups, expected.groups, strict=True):
        # The sums have another order.
        for key in ("gradient_norm", "update_rms", "weight_rms"):
            assert getattr(group, key) == pytest.approx(getattr(reference, key), rel=1e-12)
            group = replace(group, **{key: getattr(reference, key)})
        assert group == reference
    assert sum(seen.owner_flops) == sum(expected.owner_flops)
    assert len(seen.owner_flops) == 3


def test_off_means_no_message() -> None:
    (_, off), (_, on) = (run_ranks(2, on_rank, {"diagnostics_every": n})[0] for n in (0, 2))
    assert off.diagnostics is None
    assert found(on).step == 4
    extra = {kind: on.bytes_sent[kind] - count for kind, count in off.bytes_sent.items()}
    # At steps 1, 2 and 4: three groups, four matrices, two ranks, in fp64.
    assert extra.pop("agree") == 3 * 8 * (3 * 3 + 4 * SAMPLES + 2)
    assert set(extra.values()) == {0}


def test_ranks_must_look_at_the_same_steps() -> None:
    with pytest.raises(Exception, match="diagnostics_every"):
        run_ranks(2, look_apart)


def look_apart() -> None:
    train(dist.group.WORLD, diagnostics_every=dist.get_rank())


def one_step(**options: Any) -> tuple[Diagnostics, nn.Parameter, nn.Parameter, Tensor]:
    torch.manual_seed(0)
    matrix, bias = nn.Parameter(torch.randn(24, 60)), nn.Parameter(torch.randn(50))
    groups = [
        {"params": [("w", matrix)]},
        {"params": [("b", bias)], "algorithm": "adamw", "lr": 0.5, "eps": 0.1},
    ]
    optimizer = Muon(groups, lr=1.0, weight_decay=0.0, diagnostics_every=1, **options)
    before = torch.cat([matrix.detach().flatten(), bias.detach()]).clone()
    for seed in (1, 2):
        torch.manual_seed(seed)
        matrix.grad, bias.grad = torch.randn(24, 60), torch.randn(50)
        if seed == 2:
            before = torch.cat([matrix.detach().flatten(), bias.detach()]).clone()
        optimizer.step()
    return found(optimizer.report()), matrix, bias, before


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def test_every_figure_is_what_it_says() -> None:
    seen, matrix, bias, before = one_step()
    muon, adamw = seen.groups
    moved = torch.cat([matrix.detach().flatten(), bias.detach()]) - before
    assert muon.update_rms == pytest.approx(rms(moved[:1440]), rel=1e-5)
    assert muon.update_rms == pytest.approx(0.2, rel=0.02)
    assert adamw.update_rms == pytest.approx(rms(moved[1440:]) / 0.5, rel=1e-5)
    assert muon.weight_rms == pytest.approx(rms(matrix.detach()))
    assert adamw.weight_rms == pytest.approx(rms(bias.detach()))
    assert (muon.lr, adamw.lr) == (1.0, 0.5)
    assert adamw.ratio == adamw.update_rms / adamw.weight_rms
    assert adamw.effective_lr == 0.5 * adamw.ratio
    assert (muon.algorithm, muon.numel, adamw.numel) == ("muon", 1440, 50)
    assert muon.gradient_norm == pytest.approx(float(matrix.grad.norm()))  # type: ignore[union-attr]
    assert seen.gradient_norms["adamw"] == pytest.approx(float(bias.grad.norm()))  # type: ignore[union-attr]

    (sampled,) = seen.matrices
    values = torch.linalg.svdvals(moved[:1440].view(24, 60).double()) / (0.2 * math.sqrt(60))
    assert (sampled.name, sampled.owner) == ("w", 0)
    assert sampled.least == pytest.approx(float(values[-1]), rel=1e-5)
    assert sampled.most == pytest.approx(float(values[0]), rel=1e-5)
    assert sampled.median == pytest.approx(float(values[11]), rel=1e-5)
    off = (values**2 - 1).square().mean().sqrt()
    assert sampled.orthogonality_error == pytest.approx(float(off), rel=1e-3)
    assert sampled.orthogonality_error < 0.05, "p5 ends within [0.98, 1.01]"


def test_worse_coefficients_show() -> None:
    (p5,), (keller,) = (one_step(ns_coefficients=name)[0].matrices for name in ("p5", "keller"))
    assert keller.orthogonality_error > 5 * p5.orthogonality_error


@pytest.mark.parametrize(
    "options",
    [
        {"algorithm": "normuon"},
        {"adjust_lr_fn": "update_rms"},
        {"adjust_lr_fn": "original", "max_update_rms": 1e-3},
    ],
)
def test_the_spectrum_is_that_of_newton_schulz_whatever_the_update_is_scaled_by(
    options: dict[str, Any],
) -> None:
    torch.manual_seed(0)
    # Rows of unlike size: NorMuon makes them equal, which Newton-Schulz does not.
    grad = torch.randn(24, 60) * torch.logspace(0, 2, 24).view(-1, 1)
    spectra = []
    for chosen in ({}, options):
        matrix = nn.Parameter(torch.zeros(24, 60))
        optimizer = Muon([{"params": [("w", matrix)], **chosen}], diagnostics_every=1)
        for step in range(2):
            matrix.grad = grad.roll(step, 1)
            optimizer.step()
        spectra.append(found(optimizer.report()).matrices)
    assert spectra[0] == spectra[1]
    assert spectra[0][0].orthogonality_error < 0.05


def test_other_matrices_are_sampled_each_time_until_all_were() -> None:
    model = {f"w{i}": nn.Parameter(torch.randn(4, 6)) for i in range(6)}
    optimizer = Muon([{"params": list(model.items())}], diagnostics_every=2)
    names = []
    for _ in range(4):
        for parameter in model.values():
            parameter.grad = torch.randn(4, 6)
        optimizer.step()
        names.append([each.name for each in found(optimizer.report()).matrices])
    assert names[1] != names[0]
    assert names[2] == names[1], "step 3 is not measured"
    assert set(names[0] + names[1] + names[3]) == set(model)


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_a_matrix_that_cannot_be_measured_stops_nothing(value: float) -> None:
    spectrum = measure_spectrum(torch.full((3, 5), value))
    if value == 0.0:
        assert spectrum == (1.0, 0.0, 0.0, 0.0)
    else:
        assert all(math.isnan(each) for each in spectrum)


def test_bfloat16_parameters_are_measured_in_their_masters() -> None:
    matrix = nn.Parameter(torch.randn(8, 8).bfloat16())
    optimizer = Muon([("w", matrix)], lr=1e-4, diagnostics_every=1)
    matrix.grad = torch.randn(8, 8).bfloat16()
    optimizer.step()
    (group,) = found(optimizer.report()).groups
    assert group.update_rms == pytest.approx(0.2, rel=0.05)
    assert group.weight_rms == pytest.approx(rms(matrix.detach().float()), rel=1e-2)


def test_steps_are_counted_on_after_a_restart() -> None:
    first, last = train(None, diagnostics_every=4), train(None, diagnostics_every=4)
    assert found(first[1].report()).step == 4
    last[1].load_state_dict(first[1].state_dict())
    before = found(last[1].report())
    for number in range(6, 9):
        assert found(last[1].report()) is before, f"step {number - 1} is not measured"
        for group in last[1].param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        last[1].step()
    assert found(last[1].report()).step == 8

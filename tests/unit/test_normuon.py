"""NorMuon against its formula, and the update RMS that it promises."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distmuon import Blocks, Muon, build_param_groups, checkpoint, orthogonalize
from distmuon.structure import cut, join
from distmuon.update_rules import cap_, normuon_, rescale_

SHAPES = [(24, 48), (48, 24), (32, 32), (1, 16), (16, 1)]


def updates(
    parameters: list[nn.Parameter], grads: list[list[Tensor]], **options: Any
) -> list[list[Tensor]]:
    """What each step subtracts from each parameter, at lr 1 and without decay."""
    defaults = {"algorithm": "normuon", "weight_decay": 0.0, "ns_coefficients": "p5"}
    options = {**defaults, **options}
    optimizer = Muon([{"params": parameters, **options}], lr=1.0)
    found = []
    for row in grads:
        before = [p.detach().clone() for p in parameters]
        for parameter, grad in zip(parameters, row, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
        found.append([b - p.detach() for b, p in zip(before, parameters, strict=True)])
    return found


@pytest.mark.parametrize("nesterov", [True, False])
def test_three_steps_are_the_papers_formula(nesterov: bool) -> None:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(s, dtype=torch.float64)) for s in SHAPES]
    grads = [[torch.randn(s, dtype=torch.float64) for s in SHAPES] for _ in range(3)]
    found = updates(parameters, grads, nesterov=nesterov, betas=(0.0, 0.9), momentum=0.8)
    for index, (m, n) in enumerate(SHAPES):
        momentum = torch.zeros(m, n, dtype=torch.float64)
        second = torch.zeros(m, dtype=torch.float64)
        for step, row in enumerate(grads):
            momentum = 0.8 * momentum + 0.2 * row[index]
            ahead = 0.8 * momentum + 0.2 * row[index] if nesterov else momentum
            polar = orthogonalize(ahead, coefficients="p5")
            second = 0.9 * second + 0.1 * polar.square().sum(1) / n
            normed = polar / (second.sqrt()[:, None] + 1e-8)
            expected = 0.2 * math.sqrt(m * n) / normed.norm() * normed
            torch.testing.assert_close(found[step][index], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("coefficients", ["p5", "keller"])
def test_oracle_17_the_update_rms_is_exactly_a_fifth_and_first_rows_are_equal(
    coefficients: str,
) -> None:
    torch.manual_seed(1)
    shapes = [(64, 256), (256, 64), (128, 128)]
    parameters = [nn.Parameter(torch.zeros(s)) for s in shapes]
    grads = [[torch.randn(s) * (0.3 + torch.rand(s[0], 1)) for s in shapes] for _ in range(3)]
    # The default eps alone lets rows differ by 1e-6: that of a short row weighs more.
    found = updates(parameters, grads, ns_coefficients=coefficients, eps=1e-12)
    for row in found:
        for update in row:
            rms = update.double().square().mean().sqrt().item()
            assert rms == pytest.approx(0.2, rel=1e-6)
    for update in found[0]:
        norms = update.double().norm(dim=1)
        torch.testing.assert_close(norms, norms.mean().expand_as(norms), rtol=1e-6, atol=0)
    assert found[2][0].norm(dim=1).std() > 1e-4, "later rows differ: the average remembers"


@pytest.mark.parametrize(
    ("mode", "rms"),
    [
        ("match_rms_adamw", 0.2),
        ("original", math.sqrt(2 / 48)),
        ("mup", math.sqrt(2 / 48)),
        ("none", 1 / math.sqrt(48)),
        (lambda rows, cols: 3.0, 3 / math.sqrt(48)),
    ],
)
def test_other_scalings_have_the_rms_that_theirs_have_at_full_rank(mode: Any, rms: float) -> None:
    torch.manual_seed(2)
    (update,) = updates(
        [nn.Parameter(torch.zeros(48, 24))], [[torch.randn(48, 24)]], adjust_lr_fn=mode
    )[0]
    assert update.square().mean().sqrt().item() == pytest.approx(rms, rel=1e-6)


def test_update_rms_is_exact_for_muon_too_and_keeps_the_direction() -> None:
    torch.manual_seed(3)
    rank_one = torch.randn(40, 1) @ torch.randn(1, 30)
    for grad in (rank_one, torch.randn(40, 30)):
        plain, exact = (
            updates(
                [nn.Parameter(torch.zeros(40, 30))], [[grad]], algorithm="muon", adjust_lr_fn=mode
            )[0][0]
            for mode in ("match_rms_adamw", "update_rms")
        )
        assert exact.square().mean().sqrt().item() == pytest.approx(0.2, rel=1e-6)
        assert nn.functional.cosine_similarity(plain.flatten(), exact.flatten(), dim=0) > 1 - 1e-6


def test_experts_are_matrices_of_their_own_and_an_empty_one_stays_put() -> None:
    torch.manual_seed(4)
    stack = nn.Parameter(torch.zeros(3, 12, 8))
    grad = torch.randn(3, 12, 8)
    grad[1] = 0
    (found,) = updates([stack], [[grad]])[0]
    for index in (0, 2):
        (alone,) = updates([nn.Parameter(torch.zeros(12, 8))], [[grad[index]]])[0]
        assert torch.equal(found[index], alone)
    assert not found[1].any()


def test_zero_rows_and_zero_matrices_stay_finite() -> None:
    polar, second = torch.randn(4, 6), torch.zeros(4, 1)
    polar[2] = 0
    normuon_(polar, second, "out_in", beta2=0.95, eps=1e-8)
    rescale_(polar, 0.2)
    assert bool(polar.isfinite().all())
    assert not polar[2].any()
    zero = torch.zeros(4, 6)
    rescale_(zero, 0.2)
    cap_(zero, 0.2)
    assert not zero.any()


def test_cap_only_makes_smaller() -> None:
    torch.manual_seed(5)
    update = torch.randn(30, 20)
    kept = update.clone()
    cap_(update, 10.0)
    assert torch.equal(update, kept)
    cap_(update, 0.5)
    assert update.square().mean().sqrt().item() == pytest.approx(0.5, rel=1e-6)


def test_an_eps_of_zero_is_refused_because_rows_may_be_zero() -> None:
    parameter = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="NorMuon"):
        Muon([{"params": [parameter], "algorithm": "normuon", "eps": 0.0}])
    Muon([{"params": [parameter], "eps": 0.0}])


def test_groups_of_a_model_are_normuons_on_request() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    groups = build_param_groups(model, matrices="normuon")
    assert {group["algorithm"] for group in groups} == {"normuon", "adamw"}
    plain = build_param_groups(model)
    assert [[n for n, _ in g["params"]] for g in groups] == [
        [n for n, _ in g["params"]] for g in plain
    ]
    with pytest.raises(ValueError, match="normuon"):
        build_param_groups(model, matrices="nor_muon")  # type: ignore[arg-type]


def test_state_has_one_value_per_row_named_as_in_the_papers_code() -> None:
    parameters = {"a": nn.Parameter(torch.zeros(8, 4)), "e": nn.Parameter(torch.zeros(2, 8, 4))}
    optimizer = Muon([{"params": list(parameters.items()), "algorithm": "normuon"}])
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    shapes = {
        name: tuple(value.shape) for name, value in optimizer.state_dict()["state"][1].items()
    }
    assert shapes == {"momentum_buffer": (2, 8, 4), "second_momentum_buffer": (2, 8, 1)}
    assert optimizer.report().state_bytes == 4 * (3 * 32 + 24)
    saved = optimizer.state_dict()
    saved["state"][0]["second_momentum_buffer"] = torch.zeros(8)
    with pytest.raises(ValueError, match=r"second_momentum_buffer of a is \[8\].*\[8, 1\]"):
        optimizer.load_state_dict(saved)


def test_blocks_are_matrices_of_their_own_with_the_rows_of_the_fused_one() -> None:
    torch.manual_seed(6)
    grads = [torch.randn(24, 10) for _ in range(2)]
    fused = updates([nn.Parameter(torch.zeros(24, 10))], [[g] for g in grads], blocks=(8, 12, 4))
    parts = [nn.Parameter(torch.zeros(rows, 10)) for rows in (8, 12, 4)]
    apart = updates(parts, [list(g.split((8, 12, 4))) for g in grads])
    for whole, pieces in zip(fused, apart, strict=True):
        assert torch.equal(whole[0], torch.cat(pieces))
    by_head = Blocks((2, 1), repeats=8)  # pieces of a block do not lie together: they are copies
    fused = updates([nn.Parameter(torch.zeros(24, 10))], [[g] for g in grads], blocks=by_head)
    apart = updates(
        [nn.Parameter(torch.zeros(rows, 10)) for rows in (16, 8)],
        [[piece.contiguous() for piece in cut(g, by_head)] for g in grads],
    )
    for whole, pieces in zip(fused, apart, strict=True):
        assert torch.equal(whole[0], join(pieces, (24, 10), by_head))


def test_neurons_are_outputs_however_the_matrix_is_stored() -> None:
    torch.manual_seed(7)
    grads = [torch.randn(20, 12) for _ in range(2)]
    plain = updates([nn.Parameter(torch.zeros(20, 12))], [[g] for g in grads])
    turned = updates(
        [nn.Parameter(torch.zeros(12, 20))], [[g.mT.contiguous()] for g in grads], axes="in_out"
    )
    kernel = updates(
        [nn.Parameter(torch.zeros(20, 3, 2, 2))],
        [[g.view(20, 3, 2, 2)] for g in grads],
        axes="conv",
    )
    for expected, other, conv in zip(plain, turned, kernel, strict=True):
        torch.testing.assert_close(other[0].mT, expected[0], rtol=1e-4, atol=1e-6)
        assert torch.equal(conv[0].view(20, 12), expected[0])


def test_blocks_that_cut_every_neuron_are_refused() -> None:
    group = {"params": [("w", nn.Parameter(torch.zeros(8, 8)))], "blocks": Blocks(2, "columns")}
    Muon([group])
    with pytest.raises(ValueError, match="each row in all of them"):
        Muon([{**group, "algorithm": "normuon"}])
    Muon([{**group, "algorithm": "normuon", "axes": "in_out"}])


def test_checkpoints_hold_the_state_of_every_kind_of_matrix(tmp_path: Path) -> None:
    shapes = {"conv": (20, 3, 2, 2), "turned": (12, 20), "stack": (3, 8, 4)}
    axes = {"conv": "conv", "turned": "in_out", "stack": "out_in"}

    def build() -> Muon:
        torch.manual_seed(8)
        groups = [
            {
                "params": [(name, nn.Parameter(torch.randn(shape)))],
                "algorithm": "normuon",
                "axes": axes[name],
            }
            for name, shape in shapes.items()
        ]
        return Muon(groups, lr=0.1)

    def step(optimizer: Muon, seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.randn(parameter.shape)
        optimizer.step()
        return [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]

    first = build()
    weights = step(first, 1)
    checkpoint.save(tmp_path / "saved", first)
    second = build()
    checkpoint.load(tmp_path / "saved", second)
    parameters = [p for g in second.param_groups for p in g["params"]]
    with torch.no_grad():
        for parameter, value in zip(parameters, weights, strict=True):
            parameter.copy_(value)
    for mine, other in zip(step(first, 2), step(second, 2), strict=True):
        assert torch.equal(mine, other)
    checkpoint.reshard(tmp_path / "saved", tmp_path / "two", 2)
    third = build()
    checkpoint.load(tmp_path / "two", third)
    moments = [s["second_momentum_buffer"] for s in third.state_dict()["state"].values()]
    assert [tuple(m.shape) for m in moments] == [(20, 1), (1, 20), (3, 8, 1)]

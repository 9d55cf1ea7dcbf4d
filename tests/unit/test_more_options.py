"""Cautious weight decay and the bound on an update's root mean square."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distmuon import Muon
from distmuon.adapters.deepspeed import ZeroOrtho
from distmuon.update_rules import adamw_, apply_, decay_


def test_cautious_decay_leaves_alone_what_the_update_makes_larger() -> None:
    torch.manual_seed(0)
    param, update = torch.randn(500), torch.randn(500)
    before, plain = param.clone(), param.clone()
    apply_(param, update, lr=0.1, weight_decay=0.5, decay_rule="cautious")
    apply_(plain, update, lr=0.1, weight_decay=0.5)
    agree = update * before >= 0
    assert 200 < int(agree.sum()) < 300
    assert torch.equal(param[agree], plain[agree]), "decayed ones as ever, bit for bit"
    assert torch.equal(param[~agree], before[~agree].sub(update[~agree], alpha=0.1))


def test_cautious_adamw_looks_at_its_own_update() -> None:
    torch.manual_seed(1)
    param, grad = torch.randn(300), torch.randn(300)
    first, second = torch.randn(300), torch.rand(300)
    found = []
    for rule, decay in (("cautious", 0.5), ("decoupled", 0.5), ("decoupled", 0.0)):
        p, m, v = param.clone(), first.clone(), second.clone()
        adamw_(
            p,
            grad,
            m,
            v,
            step=3,
            lr=0.1,
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=decay,
            decay_rule=rule,
        )  # type: ignore[arg-type]
        found.append(p)
    agree = (0.9 * first + 0.1 * grad) * param >= 0
    assert not torch.equal(agree, grad * param >= 0), "the first moment decides, not the gradient"
    assert torch.equal(found[0][agree], found[1][agree])
    assert torch.equal(found[0][~agree], found[2][~agree])


def test_pieces_of_a_cautious_decay_have_the_same_bits() -> None:
    torch.manual_seed(2)
    param, update = torch.randn(70001), torch.randn(70001)
    whole = param.clone()
    decay_(whole, update, lr=1e-2, weight_decay=0.1, decay_rule="cautious")
    for start, stop in [(0, 1), (3, 20), (5, 40007), (69990, 70001)]:
        piece = param[start:stop].clone()
        decay_(piece, update[start:stop], lr=1e-2, weight_decay=0.1, decay_rule="cautious")
        assert torch.equal(piece, whole[start:stop])


@pytest.mark.parametrize("algorithm", ["muon", "normuon", "adamw"])
def test_every_algorithm_takes_the_rule_from_the_optimizer_or_its_group(algorithm: str) -> None:
    torch.manual_seed(3)
    start, grad = torch.randn(16, 16), torch.randn(16, 16)
    found: list[Tensor] = []
    for optimizer_wide in (True, False):
        parameter = nn.Parameter(start.clone())
        other = nn.Parameter(torch.zeros(4, 4))  # Muon wants a matrix
        options = {"decay_rule": "cautious"}
        groups: list[dict[str, Any]] = [
            {"params": [parameter], "algorithm": algorithm, **({} if optimizer_wide else options)},
            {"params": [other]},
        ]
        keywords: Any = options if optimizer_wide else {}
        optimizer = Muon(groups, lr=0.1, weight_decay=1.0, **keywords)
        parameter.grad, other.grad = grad.clone(), torch.ones(4, 4)
        optimizer.step()
        found.append(parameter.detach())
        assert optimizer.param_groups[0]["decay_rule"] == "cautious"
    plain = nn.Parameter(start.clone())
    groups = [{"params": [plain], "algorithm": algorithm}, {"params": [other]}]
    optimizer = Muon(groups, lr=0.1, weight_decay=1.0)
    plain.grad, other.grad = grad.clone(), torch.ones(4, 4)
    optimizer.step()
    assert torch.equal(found[0], found[1])
    same = found[0] == plain.detach()
    assert 0.2 < same.float().mean().item() < 0.8
    assert bool((found[0].abs()[~same] > plain.detach().abs()[~same]).float().mean() > 0.9)


@pytest.mark.parametrize(("bound", "expected"), [(0.05, 0.05), (5.0, 0.2)])
def test_an_update_is_scaled_down_to_the_bound_and_never_up(bound: float, expected: float) -> None:
    torch.manual_seed(4)
    parameter = nn.Parameter(torch.zeros(64, 32))
    optimizer = Muon([parameter], lr=1.0, weight_decay=0.0, max_update_rms=bound)
    parameter.grad = torch.randn(64, 32)
    optimizer.step()
    rms = parameter.detach().square().mean().sqrt().item()
    assert rms == pytest.approx(expected, rel=1e-6 if expected == bound else 0.02)


def test_max_dim_with_a_bound_of_a_fifth_is_moonlights_scaling() -> None:
    torch.manual_seed(5)
    grad = torch.randn(48, 24)
    found = []
    for options in ({"adjust_lr_fn": "max_dim", "max_update_rms": 0.2}, {}):
        parameter = nn.Parameter(torch.zeros(48, 24))
        keywords: Any = options
        optimizer = Muon([parameter], lr=1.0, weight_decay=0.0, **keywords)
        parameter.grad = grad.clone()
        optimizer.step()
        found.append(parameter.detach())
    torch.testing.assert_close(found[0], found[1], rtol=0.01, atol=0.0)


BAD = [
    ({"decay_rule": "careful"}, ValueError, "decay_rule='careful'"),
    ({"max_update_rms": 0.0}, ValueError, "max_update_rms=0.0"),
    ({"max_update_rms": math.inf}, ValueError, "max_update_rms=inf"),
    ({"max_update_rms": "0.2"}, TypeError, "max_update_rms='0.2'"),
    ({"max_update_rms": True}, TypeError, "max_update_rms=True"),
]


@pytest.mark.parametrize(("options", "kind", "message"), BAD)
def test_wrong_values_are_refused(
    options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    for build in (Muon, ZeroOrtho):
        group = {"params": [("w", nn.Parameter(torch.zeros(4, 4)))], "algorithm": "muon"}
        with pytest.raises(kind, match=message):
            build([group], **options)
        with pytest.raises(kind, match=rf"{message}.*group 0"):
            build([{**group, **options}])


def test_a_class_that_decays_by_itself_cannot_be_cautious() -> None:
    sgd = "torch.optim.SGD(momentum=0.9)"
    groups = [
        {"params": [nn.Parameter(torch.zeros(4, 4))]},
        {"params": [nn.Parameter(torch.zeros(4))], "algorithm": sgd},
    ]
    message = r"decay_rule='cautious' in group 1: torch\.optim\.SGD\(momentum=0\.9\) decays"
    with pytest.raises(ValueError, match=message):
        Muon(groups, decay_rule="cautious")
    groups[1]["decay_rule"] = "decoupled"
    optimizer = Muon(groups, decay_rule="cautious")
    optimizer.param_groups[1]["decay_rule"] = "cautious"
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.ones_like(group["params"][0])
    with pytest.raises(ValueError, match=message):
        optimizer.step()


@pytest.mark.parametrize("algorithm", ["adamw", "torch.optim.SGD(momentum=0.9)"])
def test_a_bound_is_refused_where_it_would_do_nothing(algorithm: str) -> None:
    def groups(**more: float) -> list[dict[str, Any]]:
        return [
            {"params": [("w", nn.Parameter(torch.zeros(4, 4)))], "algorithm": "muon"},
            {"params": [("b", nn.Parameter(torch.zeros(4)))], "algorithm": algorithm, **more},
        ]

    builders = (Muon, ZeroOrtho) if algorithm == "adamw" else (Muon,)
    for build in builders:
        with pytest.raises(ValueError, match=r"max_update_rms=0\.2 in group 1 with algorithm="):
            build(groups(max_update_rms=0.2))
        with pytest.raises(ValueError, match=r"max_update_rms=0\.2 in group 1 with algorithm="):
            build(groups(max_update_rms=0.2), max_update_rms=0.1)
        # The constructor's is for the matrices, and None says that there is none.
        optimizer = build(groups(), max_update_rms=0.2)
        assert build(groups(max_update_rms=None), max_update_rms=0.2)  # type: ignore[arg-type]
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()  # ZeroOrtho builds a Muon from its groups, as in DeepSpeed's stage 0
        if build is Muon:
            again = [{**group} for group in optimizer.param_groups]
            assert Muon(again, max_update_rms=0.2)


def test_a_class_without_weight_decay_takes_none() -> None:
    weight = nn.Parameter(torch.ones(4))
    groups = [
        {"params": [nn.Parameter(torch.zeros(4, 4))]},
        {"params": [weight], "algorithm": "torch.optim.Rprop"},
    ]
    with pytest.raises(ValueError, match=r"weight_decay=0\.1 in group 1: torch\.optim\.Rprop has"):
        Muon(groups, weight_decay=0.1)
    groups[1]["weight_decay"] = 0.0
    optimizer = Muon(groups, lr=0.01)
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.ones_like(group["params"][0])
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((4,), 0.99))


def test_unknown_arguments_and_misspelt_keys_are_refused() -> None:
    parameter = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(TypeError, match="'decay_rul'"):
        Muon([parameter], decay_rul="cautious")  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="Did you mean 'max_update_rms'"):
        Muon([{"params": [parameter], "max_update_rm": 0.2}])


def test_groups_saved_before_there_were_these_options_load() -> None:
    parameter = nn.Parameter(torch.zeros(4, 4))
    optimizer = Muon([parameter], decay_rule="cautious")
    saved = optimizer.state_dict()
    for key in ("decay_rule", "max_update_rms"):
        del saved["param_groups"][0][key]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["decay_rule"] == "cautious"

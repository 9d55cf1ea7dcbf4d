"""Presets that run as they are, and conversions that leave a matrix's step as it was."""

import inspect
import json
import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from distmuon import Muon, build_param_groups, recipes
from distmuon.adapters.deepspeed import ZeroOrtho, from_model
from distmuon.recipes import Recipe, convert_lr
from distmuon.update_rules import AdjustLrMode

PRESETS: dict[str, Callable[[], Recipe]] = {
    "moonlight": recipes.moonlight,
    "kimi_k2": recipes.kimi_k2,
    "keller": recipes.keller,
    "mup": lambda: recipes.mup(width=64),
    "normuon": recipes.normuon,
}


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(32, 64), nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 32)
    )


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains_as_it_is_and_is_plain_data(name: str) -> None:
    recipe = PRESETS[name]()
    assert recipe.name == name
    assert json.loads(json.dumps(recipe.keywords)).keys() == recipe.keywords.keys()
    model = build()
    groups = build_param_groups(model, **recipe.groups)
    optimizer = Muon(groups, **recipe.optimizer)
    hidden = model[1].weight
    assert isinstance(hidden, Tensor)
    before = hidden.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    (group,) = (g for g in optimizer.param_groups if any(p is hidden for p in g["params"]))
    lr, decay = group["lr"], group["weight_decay"]
    update = (before * (1 - lr * decay) - hidden.detach()) / lr
    rms = update.square().mean().sqrt().item()
    # Of a square matrix: 0.2 to match AdamW, else 1/sqrt(64); Keller's five steps fall short of it.
    full = 0.2 if lr < 0.01 else 1 / 8
    assert 0.65 * full < rms < 1.05 * full
    # The companion trains too, with a learning rate like AdamW's.
    adamw = [g for g in optimizer.param_groups if g["algorithm"] == "adamw"]
    assert all(1e-4 <= g["lr"] <= 1e-3 for g in adamw)


def test_the_same_keywords_fit_deepspeeds_optimizer() -> None:
    accepted = {*inspect.signature(from_model).parameters}
    accepted |= {*inspect.signature(ZeroOrtho).parameters}
    for name, make in PRESETS.items():
        unknown = make().keywords.keys() - accepted
        assert unknown == ({"matrices"} if name == "normuon" else set())


def test_moonlight_decays_norms_and_kimi_does_not() -> None:
    for recipe, decay in ((recipes.moonlight(), 0.1), (recipes.kimi_k2(), 0.0)):
        groups = build_param_groups(build(), **recipe.groups)
        (norm,) = (g["weight_decay"] for g in groups for n, _ in g["params"] if n == "2.weight")
        assert norm == decay


def test_a_recipe_can_be_changed_and_the_next_is_fresh() -> None:
    recipe = recipes.moonlight(lr=1e-3)
    recipe.optimizer["ns_coefficients"] = "p5"
    recipe.groups["overrides"] = {"*.router.weight": "adamw"}
    assert recipe.keywords["ns_coefficients"] == "p5"
    assert recipes.moonlight().keywords.keys() == recipe.keywords.keys() - {"overrides"}
    assert recipes.moonlight().optimizer["ns_coefficients"] == "keller"


@pytest.mark.parametrize("shape", [(48, 24), (24, 48), (32, 32)])
@pytest.mark.parametrize("target", ["max_dim", "original", "mup", "none", "update_rms"])
def test_converted_rates_make_the_same_steps(target: str, shape: tuple[int, int]) -> None:
    rates = {
        "match_rms_adamw": (3e-3, 0.1),
        target: convert_lr(3e-3, source="adamw", target=target, shape=shape, weight_decay=0.1),
    }
    found = []
    for mode, (lr, decay) in rates.items():
        torch.manual_seed(1)
        parameter = nn.Parameter(torch.randn(shape))
        optimizer = Muon([parameter], lr=lr, weight_decay=decay, adjust_lr_fn=mode)
        for _ in range(3):
            parameter.grad = torch.randn(shape)
            optimizer.step()
        found.append(parameter.detach())
    # "update_rms" makes up for what Newton-Schulz leaves, here under 1% of a step.
    tolerance = 5e-5 if target == "update_rms" else 1e-6
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=tolerance)


@pytest.mark.parametrize(("width", "factor"), [(1024, 6.4), (2048, 9.05), (4096, 12.8)])
def test_unscaled_updates_need_an_lr_larger_by_a_fifth_of_the_root(
    width: int, factor: float
) -> None:
    rates = convert_lr(1e-3, source="adamw", target="none", shape=(width, width), weight_decay=0.1)
    assert rates.lr == pytest.approx(1e-3 * factor, rel=1e-3)
    assert rates.weight_decay == pytest.approx(0.1 / factor, rel=1e-3)
    assert rates.lr * rates.weight_decay == pytest.approx(1e-4, rel=1e-12)
    back = convert_lr(
        rates.lr,
        source="none",
        target="match_rms_adamw",
        shape=(width, width),
        weight_decay=rates.weight_decay,
    )
    assert back == pytest.approx((1e-3, 0.1), rel=1e-12)


def test_moonlights_own_rate_needs_no_conversion_from_adamw_and_a_callable_is_a_scaling() -> None:
    for shape in ((7, 5), (5, 700)):
        assert convert_lr(2e-4, source="adamw", target="match_rms_adamw", shape=shape).lr == 2e-4
    # Moonlight's "Baseline": 0.2*sqrt(H) for every matrix; four times as wide, the step is halved.
    rates = convert_lr(
        1.0,
        source="match_rms_adamw",
        target=lambda rows, cols: 0.2 * math.sqrt(64),
        shape=(64, 256),
    )
    assert rates.lr == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"shape": (0, 4)}, "rows and columns"),
        ({"shape": (4, 4, 4)}, "rows and columns"),
        ({"target": "adam"}, "target='adam' is neither \"adamw\" nor an adjust_lr_fn"),
        ({"source": "keller"}, "The recipe 'keller' has \"original\""),
    ],
)
def test_nonsense_is_refused(change: dict[str, object], message: str) -> None:
    good = {"lr": 1.0, "source": "adamw", "target": "mup", "shape": (4, 4)}
    with pytest.raises(ValueError, match=message):
        convert_lr(**{**good, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": "3e-4"}, "lr='3e-4' of type str"),
        ({"lr": True}, "lr=True of type bool"),
        ({"weight_decay": None}, "weight_decay=None of type NoneType"),
        ({"shape": 1024}, "shape=1024. Must be two integers"),
        ({"shape": (2.5, 4)}, "Must be two integers"),
        ({"shape": ("2", "4")}, "Must be two integers"),
        ({"source": None}, "source=None is neither"),
        ({"source": lambda rows, cols: "x"}, "it returned 'x' for a 4 x 4 matrix"),
    ],
)
def test_wrong_types_are_refused(change: dict[str, object], message: str) -> None:
    good = {"lr": 1.0, "source": "adamw", "target": "mup", "shape": (4, 4)}
    with pytest.raises(TypeError, match=message):
        convert_lr(**{**good, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lr": "0.1"}, TypeError, "lr='0.1' of type str"),
        ({"lr": math.nan}, ValueError, "lr=nan"),
        ({"weight_decay": -1}, ValueError, "weight_decay=-1"),
        ({"adam_lr": None}, TypeError, "adam_lr=None"),
        ({"width": 64.0}, TypeError, "width=64.0. Must be an integer"),
        ({"width": 0}, ValueError, "width=0. Must be >= 1"),
    ],
)
def test_a_preset_refuses_what_is_wrong_before_anything_is_built(
    change: dict[str, object], error: type[Exception], message: str
) -> None:
    presets: list[Callable[..., Recipe]] = [
        recipes.moonlight,
        recipes.kimi_k2,
        recipes.keller,
        recipes.normuon,
        recipes.mup,
    ]
    for preset in presets:
        accepted = inspect.signature(preset).parameters
        given = {"width": 64} if "width" in accepted else {}
        if change.keys() <= accepted.keys():
            with pytest.raises(error, match=message):
                preset(**{**given, **change})


@pytest.mark.parametrize("source", [*get_args(AdjustLrMode), "adamw"])
@pytest.mark.parametrize("target", [*get_args(AdjustLrMode), "adamw"])
def test_there_and_back_is_where_it_began(source: Any, target: Any) -> None:
    there = convert_lr(3e-4, source=source, target=target, shape=(1024, 256), weight_decay=0.1)
    back = convert_lr(
        there.lr, source=target, target=source, shape=(1024, 256), weight_decay=there.weight_decay
    )
    assert back == pytest.approx((3e-4, 0.1), rel=1e-12)
    assert there.lr * there.weight_decay == pytest.approx(3e-5, rel=1e-12)

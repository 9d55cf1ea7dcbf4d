"""Schedules that would blow up are refused before use; the Gram form starts anew in time."""

import math

import pytest
import torch

from distmuon.orthogonalize import orthogonalize, stability
from distmuon.orthogonalize.coefficients import PRESETS, preset
from distmuon.orthogonalize.policy import Method
from distmuon.orthogonalize.schedule import Schedule
from distmuon.orthogonalize.stability import Arithmetic

ARITHMETICS: tuple[Arithmetic, ...] = ("float64", "float32", "tf32", "float16", "bfloat16")
# Coefficients that peers ship, and that fail without what they were made with.
CANS = (
    (8.4703, -25.1081, 18.6293),
    (4.1828, -3.1087, 0.5806),
    (3.9619, -2.9541, 0.5630),
    (3.2866, -2.4647, 0.5074),
    (2.2737, -1.6447, 0.4162),
)
AOL = (
    (4.0098, -7.0585, 2.4635),
    (3.4585, -5.5479, 2.5959),
    (2.7573, -3.2939, 1.4254),
    (2.7215, -3.0494, 1.3169),
)


def custom(coefficients: tuple[tuple[float, float, float], ...]) -> Schedule:
    return Schedule("custom", coefficients, "frobenius", 1.0, "a peer")


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("name", PRESETS)
def test_presets_pass(name: str, arithmetic: Arithmetic) -> None:
    stability.check(preset(name), arithmetic)


def test_coefficients_without_safety_are_refused_in_half_precision() -> None:
    stability.check(custom(CANS), "float32")
    for arithmetic in ("float16", "bfloat16"):
        with pytest.raises(ValueError, match=r"'custom' lets singular values grow.*s = 1.02"):
            stability.check(custom(CANS), arithmetic)
    with pytest.raises(ValueError, match="grow"):
        orthogonalize(torch.randn(4, 8), coefficients=CANS, dtype=torch.bfloat16)


def test_a_sign_flip_is_refused() -> None:
    # On a rank-1 matrix the first step multiplies the singular value 1 by -0.585.
    assert sum(AOL[0]) < 0
    with pytest.raises(ValueError, match="zero or negative in step 1"):
        orthogonalize(torch.randn(4, 8), coefficients=AOL)


@pytest.mark.parametrize("steps", [1, 5, 50])
def test_a_schedule_that_explodes_is_refused(steps: int) -> None:
    with pytest.raises(ValueError, match="grow"):
        orthogonalize(torch.randn(4, 8), coefficients=(10.0, -3.0, 0.5), steps=steps)


def test_exact_methods_do_not_mind_coefficients_that_they_do_not_use() -> None:
    assert orthogonalize(torch.randn(4, 8), method="svd", coefficients=AOL).isfinite().all()


@pytest.mark.parametrize(
    ("name", "arithmetic", "lengths"),
    [
        ("p5", "float32", [5]),
        ("p5", "float16", [2, 3]),
        ("keller", "float32", [5]),
        ("keller", "float16", [2, 2, 1]),
        ("polar_express", "float16", [2, 3]),
        ("deepseek_v4", "float32", [6, 4]),
        ("deepseek_v4", "float64", [10]),
    ],
)
def test_windows(name: str, arithmetic: Arithmetic, lengths: list[int]) -> None:
    cut = stability.windows(preset(name), arithmetic)
    assert [len(window) for window in cut] == lengths
    assert sum(cut, ()) == preset(name).coefficients


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("name", PRESETS)
def test_no_window_amplifies_past_the_limit(name: str, arithmetic: Arithmetic) -> None:
    spurious = {"float64": 1e-15, "float32": 1e-7, "tf32": 4e-4, "float16": 4e-4}
    if arithmetic == "bfloat16":
        with pytest.raises(ValueError, match=r"'.*' in bfloat16.*method='newton_schulz'"):
            stability.windows(preset(name), arithmetic)
        return
    for window in stability.windows(preset(name), arithmetic):
        slope = math.prod(a for a, _, _ in window)
        assert slope**2 * spurious[arithmetic] < 0.5


@pytest.mark.parametrize("method", ["gram", "coupled"])
def test_forms_on_the_gram_matrix_refuse_bfloat16(method: Method) -> None:
    with pytest.raises(ValueError, match="amplify"):
        orthogonalize(torch.randn(8, 64), method=method, dtype=torch.bfloat16)


def test_the_coupled_form_refuses_what_needs_a_restart() -> None:
    with pytest.raises(ValueError, match=r"'deepseek_v4' in float32.*torch.float64"):
        orthogonalize(torch.randn(8, 64), method="coupled", coefficients="deepseek_v4")
    x = torch.randn(8, 64).double()
    assert orthogonalize(x, method="coupled", coefficients="deepseek_v4").isfinite().all()


def test_the_gram_form_refuses_a_step_that_is_too_steep_alone() -> None:
    steep = Schedule("custom", ((40.0, -60.0, 25.0), (1.5, -0.5, 0.0)), "frobenius", 1.0, "test")
    with pytest.raises(ValueError, match="amplify"):
        stability.windows(steep, "float16")

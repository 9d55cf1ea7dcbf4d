"""Range, memory and non-finite values: what the result may not depend on."""

import pytest
import torch
from torch import Tensor

from distmuon.orthogonalize import orthogonalize, orthogonalize_checked
from distmuon.orthogonalize.coefficients import PRESETS
from distmuon.orthogonalize.guards import largest_entry, power_of_two, prescale
from distmuon.orthogonalize.policy import Method

METHODS: tuple[Method, ...] = ("newton_schulz", "gram", "coupled", "svd", "eigh")
SHAPES = [(16, 16), (12, 40), (40, 12), (1, 7), (7, 1), (1, 1)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_powers_of_two_change_no_bit(method: Method, shape: tuple[int, int]) -> None:
    x = random(*shape)
    for name in ("keller", "p5"):
        expected = orthogonalize(x, method=method, coefficients=name)
        for exponent in (-100, -37, -1, 1, 64, 100):
            scaled = orthogonalize(x * 2.0**exponent, method=method, coefficients=name)
            assert torch.equal(scaled, expected), exponent


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("method", ["newton_schulz", "gram"])
def test_powers_of_two_change_no_bit_of_any_preset(method: Method, name: str) -> None:
    x = random(24, 40)
    expected = orthogonalize(x, method=method, coefficients=name)
    for exponent in (-100, 100):
        assert torch.equal(
            orthogonalize(x * 2.0**exponent, method=method, coefficients=name), expected
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_powers_of_two_change_no_bit_of_other_dtypes(dtype: torch.dtype) -> None:
    x = random(16, 48).to(dtype)
    exponents = (-100, 100) if dtype != torch.float16 else (-3, 10)
    for exponent in exponents:
        assert torch.equal(orthogonalize(x * 2.0**exponent), orthogonalize(x))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_the_function_is_odd(method: Method, shape: tuple[int, int]) -> None:
    x = random(*shape)
    assert torch.equal(orthogonalize(-x, method=method), -orthogonalize(x, method=method))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 4, 8), (2, 96, 100)])
def test_zero_gives_zero(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for method in METHODS if dtype == torch.float32 else ("auto",):
        out = orthogonalize(torch.zeros(shape), method=method, dtype=dtype)
        assert torch.equal(out, torch.zeros(shape))


@pytest.mark.parametrize("method", METHODS)
def test_zero_rows_and_columns_stay_zero(method: Method) -> None:
    x = random(12, 30)
    x[3] = 0
    x[:, [0, 17]] = 0
    out = orthogonalize(x, method=method, coefficients="p5")
    assert torch.equal(out[3], torch.zeros(30))
    assert torch.equal(out[:, [0, 17]], torch.zeros(12, 2))
    assert float(out.norm()) == pytest.approx(11**0.5, rel=1e-2)


@pytest.mark.parametrize("method", METHODS)
def test_a_zero_matrix_in_a_batch_leaves_the_others_alone(method: Method) -> None:
    x = random(3, 8, 20)
    x[1] = 0
    out = orthogonalize(x, method=method)
    assert torch.equal(out[1], torch.zeros(8, 20))
    torch.testing.assert_close(out[2], orthogonalize(x[2], method=method), rtol=0, atol=2e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e-36, 1e-20, 1e20, 1e36])
def test_extreme_scales_give_the_same_update(method: Method, scale: float) -> None:
    x = random(16, 64)
    x = x / x.abs().max()
    # Down there the input itself has few bits left.
    tolerance = 0.2 if scale < 1e-40 else 5e-5
    scaled = orthogonalize(x * scale, method=method, coefficients="p5")
    expected = orthogonalize(x, method=method, coefficients="p5")
    torch.testing.assert_close(scaled, expected, rtol=0, atol=tolerance)


def test_the_largest_and_the_smallest_float() -> None:
    info = torch.finfo(torch.float32)
    smallest = torch.tensor(1, dtype=torch.int32).view(torch.float32)
    for value in (info.max, info.tiny, float(smallest)):
        x = torch.full((2, 3), value)
        out = orthogonalize(x, coefficients="p5")
        assert float(out.norm()) == pytest.approx(0.995, abs=5e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(12, 12), (12, 40), (40, 12), (3, 12, 40)])
def test_the_input_is_not_modified(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = random(*shape).to(dtype)
    copy = x.clone()
    for method in METHODS:
        for nonfinite in ("propagate", "zero"):
            out = orthogonalize(x, method=method, nonfinite=nonfinite)
            assert torch.equal(x, copy)
            assert out.dtype == dtype
            assert out.shape == x.shape
            assert out.is_contiguous()
            out.zero_()
            assert torch.equal(x, copy)


def test_memory_layout_and_alignment_change_no_bit() -> None:
    x = random(33, 70)
    base = torch.zeros(33 * 70 + 3)
    unaligned = base[3:].view(33, 70).copy_(x)
    strided = torch.zeros(66, 140)[::2, ::2].copy_(x)
    transposed = x.T.contiguous().T
    for method in METHODS:
        expected = orthogonalize(x, method=method)
        for view in (unaligned, strided, transposed):
            assert torch.equal(orthogonalize(view, method=method), expected)


def test_repeated_calls_agree_whatever_else_is_allocated() -> None:
    x = random(65, 130)
    expected = orthogonalize(x)
    kept = []
    for i in range(20):
        kept.append(torch.empty(17 * i + 5))
        assert torch.equal(orthogonalize(x), expected)


def test_autocast_and_gradients_do_not_reach_inside() -> None:
    x = random(16, 48).requires_grad_()
    expected = orthogonalize(x.detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = orthogonalize(x)
    assert torch.equal(out, expected)
    assert not out.requires_grad


@pytest.mark.parametrize("method", ["auto", *METHODS])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(6, 6), (6, 20), (20, 6)])
def test_non_finite_entries(method: Method, value: float, shape: tuple[int, int]) -> None:
    x = random(*shape)
    x[2, 3] = value
    propagated = orthogonalize_checked(x, method=method)
    assert propagated.update.isnan().all()
    assert not propagated.finite
    zeroed = orthogonalize_checked(x, method=method, nonfinite="zero")
    assert torch.equal(zeroed.update, torch.zeros(shape))
    assert not zeroed.finite


def test_flags_of_a_batch() -> None:
    for shape in ((2, 2, 6, 8), (2, 2, 96, 100)):
        x = random(*shape)
        x[0, 1, 2, 3] = torch.nan
        result = orthogonalize_checked(x, nonfinite="zero")
        assert result.finite.tolist() == [[True, False], [True, True]]
        assert torch.equal(result.update[0, 1], torch.zeros(shape[-2:]))
        torch.testing.assert_close(result.update[1, 1], orthogonalize(x[1, 1]), rtol=0, atol=2e-6)


def test_power_of_two_is_exact_and_brings_the_largest_entry_near_one() -> None:
    amax = torch.tensor([3.0, 0.4, 1.0, 2.0**-126, 2.0**100 * 1.7])[:, None, None]
    power = power_of_two(amax)
    assert torch.equal(torch.frexp(power).mantissa, torch.full_like(power, 0.5))
    assert bool(((power * amax >= 0.5) & (power * amax < 1)).all())
    assert power_of_two(torch.tensor([[torch.inf]])).isnan().all()
    assert power_of_two(torch.tensor([[torch.nan]])).isnan().all()


def test_largest_entry_sees_both_signs_and_nan() -> None:
    x = torch.tensor([[[1.0, -5.0]], [[4.0, 2.0]], [[1.0, torch.nan]]])
    largest = largest_entry(x)[:, 0, 0]
    assert largest[:2].tolist() == [5.0, 4.0]
    assert largest[2].isnan()


def test_prescale_widens_half_precision() -> None:
    x = random(4, 4).bfloat16()
    assert prescale(x, largest_entry(x)).dtype == torch.float32

"""Matrices in parts: accuracy against the exact polynomial, scale, zeros, refusals."""

import pytest
import torch
from torch import Tensor

from distmuon.orthogonalize import orthogonalize
from distmuon.orthogonalize.coefficients import resolve
from distmuon.orthogonalize.parts import (
    PartGram,
    apply_transform,
    check_parts,
    find_transform,
    part_gram,
)
from distmuon.orthogonalize.schedule import AnySchedule, Schedule
from tests.unit.orthogonalize.spectra import Known, image, relative_error

FP32, FP64 = torch.float32, torch.float64
# 300 is above the 128 rows of a panel, 400 above the size from which products are cut into panels.
SHAPES = [(40, 200), (300, 520), (400, 520)]
CPU = torch.device("cpu")


def in_parts(x: Tensor, k: int, dtype: torch.dtype, coefficients: str | Schedule = "p5") -> Tensor:
    """What k ranks would do, in one process."""
    long = 1 if x.size(0) <= x.size(1) else 0
    slices = [part.clone() for part in x.tensor_split(k, long)]
    halves = check_parts(coefficients, None, dtype, CPU, x.shape)
    parts = [part_gram(s if long else s.mT, dtype=dtype) for s in slices]
    transform = find_transform([p.gram for p in parts], [p.largest for p in parts], halves)
    done = [apply_transform(part, transform) for part in parts]
    return torch.cat([d if long else d.mT for d in done], long)


def exact(x: Tensor, schedule: AnySchedule) -> Tensor:
    """The schedule's function of the singular values that the float32 input has."""
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    return (u * image(s, schedule)) @ vh


@pytest.mark.parametrize("preset", ["halley", "p5", "keller", "polar_express", "you"])
@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("kind", ["power_law", "condition_1e2", "condition_1e3", "uniform"])
def test_float32_is_within_1e_4_of_the_exact_polynomial(
    preset: str, m: int, n: int, kind: str
) -> None:
    x = Known(m, n, kind).matrix.float()
    assert relative_error(in_parts(x, 3, FP32, preset), exact(x, resolve(preset, None))) < 1e-4


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("kind", ["rank_1", "rank_8", "two_levels", "condition_1e8"])
@pytest.mark.parametrize("name", ["halley", "p5"])
def test_float32_stays_small_where_rank_is_missing(name: str, m: int, n: int, kind: str) -> None:
    x = Known(m, n, kind).matrix.float()
    assert relative_error(in_parts(x, 4, FP32, name), exact(x, resolve(name, None))) < 1e-3


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize(
    "kind", ["power_law", "condition_1e4", "condition_1e8", "rank_1", "rank_8", "two_levels"]
)
@pytest.mark.parametrize("name", ["halley", "p5"])
def test_float64_is_within_1e_6_everywhere(name: str, m: int, n: int, kind: str) -> None:
    x = Known(m, n, kind).matrix.float()
    assert relative_error(in_parts(x, 4, FP64, name), exact(x, resolve(name, None))) < 1e-6


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("shape", [(7, 61), (61, 7), (33, 33), (1, 9), (129, 257)])
def test_any_number_of_parts_agrees_with_the_whole(shape: tuple[int, int], k: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(k))
    whole = orthogonalize(x, method="newton_schulz")
    assert relative_error(in_parts(x, k, FP32), whole.double()) < 5e-5


@pytest.mark.parametrize("dtype", [FP32, FP64])
def test_scale_does_not_matter_and_powers_of_two_not_by_a_bit(dtype: torch.dtype) -> None:
    x = torch.randn(24, 80, generator=torch.Generator().manual_seed(0))
    expected = in_parts(x, 3, dtype)
    for power in (-100, -60, 60, 100):
        assert torch.equal(in_parts(x * 2.0**power, 3, dtype), expected)
    for scale in (1e-20, 1e20):
        assert relative_error(in_parts(x * scale, 3, dtype), expected.double()) < 1e-4


def test_parts_of_unequal_scale_keep_their_share() -> None:
    x = torch.randn(24, 80, generator=torch.Generator().manual_seed(0))
    x[:, :27] *= 1e-3
    x[:, 27:54] *= 1e2
    assert relative_error(in_parts(x, 3, FP32), exact(x, resolve("p5", None))) < 1e-4
    x[:, 54:] = 1e-38
    result = in_parts(x, 3, FP32)
    assert bool(result.isfinite().all())
    assert float(result[:, 54:].abs().max()) < 1e-30


def test_zero_parts_and_a_zero_matrix_give_zeros() -> None:
    x = torch.randn(24, 80, generator=torch.Generator().manual_seed(0))
    x[:, :40] = 0
    result = in_parts(x, 2, FP32)
    assert not result[:, :40].any()
    assert relative_error(result, exact(x, resolve("p5", None))) < 1e-4
    assert not in_parts(torch.zeros(24, 80), 2, FP32).any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_one_bad_entry_is_seen_by_every_part(bad: float) -> None:
    x = torch.ones(6, 20)
    x[2, 3] = bad
    assert bool(in_parts(x, 4, FP32).isnan().all())


def test_a_transposed_view_and_odd_memory_change_no_bit() -> None:
    x = torch.randn(30, 48, generator=torch.Generator().manual_seed(1))
    padded = torch.empty(30 * 48 + 3)[3:].view(30, 48).copy_(x)
    first, second = part_gram(x, dtype=FP32), part_gram(padded, dtype=FP32)
    assert torch.equal(first.gram, second.gram)
    assert torch.equal(first.scaled, second.scaled)
    tall = x.mT.contiguous()
    turned = part_gram(tall.mT, dtype=FP32)
    torch.testing.assert_close(turned.gram, first.gram)
    assert turned.scaled.mT.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_grams_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"Must be torch.float32 or torch.float64"):
        check_parts("p5", None, dtype, CPU, (40, 200))


def test_a_schedule_too_steep_for_one_float32_gram_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'deepseek_v4' would amplify .* float32 Gram"):
        check_parts("deepseek_v4", None, FP32, CPU, (40, 200))
    x = Known(40, 200, "condition_1e8").matrix.float()
    assert (
        relative_error(in_parts(x, 2, FP64, "deepseek_v4"), exact(x, resolve("deepseek_v4", None)))
        < 1e-5
    )


def test_one_step_needs_no_second_half() -> None:
    x = Known(40, 200, "uniform").matrix.float()
    halves = check_parts("taylor", 1, FP32, CPU, x.shape)
    assert halves.second == ()
    part = part_gram(x, dtype=FP32)
    transform = find_transform([part.gram], [part.largest], halves)
    assert torch.equal(transform.second, torch.eye(40))
    assert relative_error(apply_transform(part, transform), exact(x, halves.schedule)) < 1e-5


def test_factors_are_exactly_symmetric() -> None:
    part: PartGram = part_gram(torch.randn(400, 520), dtype=FP32)
    halves = check_parts("p5", None, FP32, CPU, (400, 520))
    transform = find_transform([part.gram], [part.largest], halves)
    assert torch.equal(transform.first, transform.first.mT)
    assert torch.equal(transform.second, transform.second.mT)

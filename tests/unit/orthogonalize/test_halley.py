"""Halley's weighted iteration: the exact function of the singular values, range, refusals."""

import pytest
import torch

from distmuon.orthogonalize import halley, orthogonalize, orthogonalize_checked, policy
from distmuon.orthogonalize.coefficients import preset, resolve
from distmuon.orthogonalize.products import symmetric_product
from distmuon.orthogonalize.schedule import Rational
from tests.unit.orthogonalize.spectra import (
    SPECTRA,
    Known,
    largest_singular_value,
    orthonormal,
    relative_error,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# 400 is above the size from which products are cut into panels.
SHAPES = [(48, 48), (40, 160), (160, 40), (1, 9), (9, 1), (1, 1), (400, 520)]
HALLEY = halley.schedule()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_weights_take_the_interval_as_near_to_one_as_it_goes() -> None:
    grid = torch.logspace(-3, 0, 20_001, dtype=torch.float64) * 3
    grid = grid[grid <= 1]
    s = HALLEY.image(grid)
    assert float(s.min()) == pytest.approx(0.99166, abs=1e-4)
    assert float(s.max()) == pytest.approx(1.00834, abs=1e-4)
    # Three steps are at the end of what float64 can show.
    assert halley.schedule(3).coefficients[-1] == pytest.approx((3.0, 1.0, 3.0), rel=3e-2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_float64_is_the_exact_function(shape: tuple[int, int], steps: int) -> None:
    for kind in SPECTRA:
        known = Known(*shape, kind)
        actual = orthogonalize(known.matrix, coefficients="halley", steps=steps)
        assert relative_error(actual, known.image(halley.schedule(steps))) < 1e-10, kind


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_is_near_the_exact_function_also_where_rank_is_missing(
    shape: tuple[int, int],
) -> None:
    for kind in SPECTRA:
        known = Known(*shape, kind)
        actual = orthogonalize(known.matrix.float(), coefficients="halley")
        tolerance = 1e-4 if kind in ("flat", "condition_1e2", "uniform") else 2e-3
        assert relative_error(actual, known.image(HALLEY)) < tolerance, kind
        assert largest_singular_value(actual) <= 1.01


def test_two_products_for_the_next_gram_matrix_would_be_far_worse() -> None:
    # The reason for `halley._next_gram`, see its note.
    known = Known(400, 600, "rank_1")
    x = known.matrix.float()
    r = symmetric_product(x, x.T)
    first, second = HALLEY.coefficients
    z = halley.transform(r, [first])
    z2 = halley.transform(symmetric_product(symmetric_product(r, z), z), [second])
    naive = symmetric_product(z, z2) @ x
    assert relative_error(naive, known.image(HALLEY)) > 1e-2
    assert relative_error(orthogonalize(x), known.image(HALLEY)) < 1e-3


@pytest.mark.parametrize("shape", [(16, 16), (12, 40), (40, 12), (1, 7), (3, 12, 40), (2, 96, 100)])
def test_powers_of_two_and_the_sign_change_no_bit(shape: tuple[int, ...]) -> None:
    x = random(*shape)
    expected = orthogonalize(x, coefficients="halley")
    for exponent in (-100, -37, 1, 100):
        assert torch.equal(orthogonalize(x * 2.0**exponent, coefficients="halley"), expected)
    assert torch.equal(orthogonalize(-x, coefficients="halley"), -expected)
    assert float((expected * x).sum()) > 0


def test_memory_layout_changes_no_bit() -> None:
    x = random(33, 70)
    expected = orthogonalize(x, coefficients="halley")
    unaligned = torch.zeros(33 * 70 + 3)[3:].view(33, 70).copy_(x)
    for view in (unaligned, x.T.contiguous().T):
        assert torch.equal(orthogonalize(view, coefficients="halley"), expected)


@pytest.mark.parametrize("shape", [(24, 24), (24, 60), (60, 24), (1, 40), (2, 2)])
def test_no_singular_value_overshoots(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    rank = min(shape)
    worst = 0.0
    for i in range(100):
        decades = 8 * torch.rand(1, generator=generator, dtype=torch.float64)
        s = 10 ** (-decades * torch.rand(rank, generator=generator, dtype=torch.float64))
        s[0] = 1.0
        if i % 4 == 1:
            s[1 + int(torch.randint(rank, (1,), generator=generator)) :] = 0
        u, v = orthonormal(shape[0], rank, generator), orthonormal(shape[1], rank, generator)
        x = ((u * s) @ v.T * 10.0 ** ((i * 7) % 73 - 36)).float()
        worst = max(worst, largest_singular_value(orthogonalize(x, coefficients="halley")))
    assert worst <= 1.01


def test_zeros_stay_zero() -> None:
    assert not orthogonalize(torch.zeros(5, 9), coefficients="halley").any()
    x = random(2, 12, 30)
    x[0, 3] = 0
    x[0, :, 17] = 0
    x[1] = 0
    out = orthogonalize(x, coefficients="halley")
    assert not out[0, 3].any()
    assert not out[0, :, 17].any()
    assert not out[1].any()
    assert float(out[0].norm()) == pytest.approx(11**0.5, rel=1e-2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_matrix_is_all_nan_or_zero_and_its_neighbour_untouched(value: float) -> None:
    x = random(2, 6, 20)
    x[0, 2, 3] = value
    propagated = orthogonalize_checked(x, coefficients="halley")
    assert propagated.update[0].isnan().all()
    assert propagated.finite.tolist() == [False, True]
    zeroed = orthogonalize(x, coefficients="halley", nonfinite="zero")
    assert not zeroed[0].any()
    assert torch.equal(zeroed[1], propagated.update[1])
    assert relative_error(zeroed[1], orthogonalize(x[1], method="svd").double()) < 2e-2


@pytest.mark.parametrize("shape", [(24, 24), (24, 72)])
def test_rotations_and_transposes_go_through(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    left, right = (orthonormal(n, n, generator).float() for n in shape)
    x = Known(*shape, "condition_1e2").matrix.float()
    out = orthogonalize(x, coefficients="halley")
    rotated = orthogonalize(left @ x @ right, coefficients="halley")
    torch.testing.assert_close(rotated, left @ out @ right, rtol=0, atol=1e-4)
    transposed = orthogonalize(x.T, coefficients="halley")
    torch.testing.assert_close(transposed, out.T, rtol=0, atol=1e-4)


# Those that are nearly square are the hardest; of those for which "auto" is halley, (384, 384).
SMALL = [(24, 24), (24, 72), (48, 192)]
LARGE = [(384, 384), (512, 512), (1024, 1024), (128, 136), (160, 170), (384, 400), (128, 512)]


@pytest.mark.parametrize("shape", [*SMALL, *LARGE])
def test_orthogonal_equivariance(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    left, right = (orthonormal(n, n, generator).float() for n in shape)
    x = torch.randn(shape, generator=generator)
    rotated = orthogonalize(left @ x @ right, coefficients="halley")
    expected = left @ orthogonalize(x, coefficients="halley") @ right
    torch.testing.assert_close(rotated, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["flat", "uniform", "power_law", "condition_1e2"])
@pytest.mark.parametrize("shape", [(48, 48), (64, 256), (256, 64), (100, 100)])
def test_the_matched_rms_means_what_it_says(kind: str, shape: tuple[int, int]) -> None:
    out = orthogonalize(Known(*shape, kind).matrix.float(), coefficients="halley")
    assert 0.98 <= float(out.square().mean().mul(max(shape)).sqrt()) <= 1.02


def test_auto_is_halley_for_larger_matrices_on_a_cpu_and_p5_elsewhere() -> None:
    def choose(*shape: int, **changes: object) -> str:
        arguments = {"method": "auto", "requested": None, "device": CPU, **changes}
        return policy.for_device("auto", None, shape=shape, **arguments).name  # type: ignore[arg-type]

    assert choose(384, 384) == choose(7, 136, 128) == choose(4096, 128) == "halley"
    assert choose(383, 383) == choose(128, 135) == choose(127, 4096) == choose(8, 8) == "p5"
    assert choose(512, 512, requested=torch.float64) == "halley"
    for other in ({"device": CUDA}, {"requested": torch.bfloat16}, {"method": "gram"}):
        assert choose(512, 512, **other) == "p5"
    whole = {"requested": None, "device": CPU, "shape": (512, 512)}
    assert policy.for_device("auto", 5, method="auto", **whole) == preset("p5")  # type: ignore[arg-type]
    for name, shape in (("halley", (128, 200)), ("p5", (100, 200))):
        x = random(*shape)
        assert torch.equal(orthogonalize(x), orthogonalize(x, coefficients=name))
    torch.set_float32_matmul_precision("high")
    try:
        assert choose(512, 512) == "p5"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_half_precision_inputs_are_computed_in_float32() -> None:
    x = random(8, 30).bfloat16()
    expected = orthogonalize(x.float(), coefficients="halley").bfloat16()
    assert torch.equal(orthogonalize(x, coefficients="halley"), expected)


def test_what_it_cannot_do_is_refused() -> None:
    x = random(4, 6)
    with pytest.raises(ValueError, match="needs an inverse in each step"):
        orthogonalize(x, coefficients="halley", method="gram")
    with pytest.raises(ValueError, match="full float32 or float64"):
        orthogonalize(x, coefficients="halley", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="has 5 steps"):
        orthogonalize(x, coefficients="auto", steps=3)
    with pytest.raises(ValueError, match="three positive finite numbers"):
        Rational("mine", ((1.0, 0.0, 1.0),), "schatten4", 1.0, "")
    assert isinstance(resolve("halley", 3), Rational)

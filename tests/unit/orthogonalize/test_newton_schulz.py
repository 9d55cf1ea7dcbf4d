"""Every preset and form against the exact polynomial of the singular values in float64."""

import pytest
import torch
from torch import Tensor

from distmuon.orthogonalize import newton_schulz, orthogonalize, stability
from distmuon.orthogonalize.coefficients import PRESETS, preset
from distmuon.orthogonalize.policy import Method
from tests.unit.orthogonalize.spectra import (
    SPECTRA,
    Known,
    largest_singular_value,
    orthonormal,
    relative_error,
)

FORMS: tuple[Method, ...] = ("newton_schulz", "gram", "coupled")
SHAPES = [(48, 48), (40, 160), (160, 40), (1, 9), (9, 1), (1, 1)]


def keller_reference(x: Tensor) -> Tensor:
    """torch.optim.Muon's formulation without its cast to bfloat16."""
    tall = x.size(0) > x.size(1)
    y = x.T if tall else x
    y = y / y.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = y @ y.T
        update = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        y = torch.addmm(y, update, y, beta=3.4445)
    return y.T if tall else y


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", FORMS)
def test_keller_is_torch_optim_muon_in_float32(shape: tuple[int, int], method: Method) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    actual = orthogonalize(x, method=method, coefficients="keller")
    # On the Gram matrix, small singular values lose as many digits as the condition number has.
    tolerance = 5e-6 if method == "newton_schulz" else 5e-5
    torch.testing.assert_close(actual, keller_reference(x), rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", FORMS)
@pytest.mark.parametrize("name", PRESETS)
def test_float64_is_the_exact_polynomial(name: str, method: Method, shape: tuple[int, int]) -> None:
    for kind in SPECTRA:
        known = Known(*shape, kind)
        actual = orthogonalize(known.matrix, method=method, coefficients=name)
        error = relative_error(actual, known.image(preset(name)))
        # Without a restart an error of 1e-16 grows by the squared slope, (8e4)**2 here.
        tolerance = 1e-6 if name == "deepseek_v4" else 1e-10
        assert error < tolerance, f"{kind}: {error}"


@pytest.mark.parametrize("shape", [(48, 48), (40, 160), (160, 40), (1, 9)])
@pytest.mark.parametrize("name", PRESETS)
def test_float32_is_the_exact_polynomial_where_that_is_well_conditioned(
    name: str, shape: tuple[int, int]
) -> None:
    for kind in ("flat", "power_law", "condition_1e2", "uniform"):
        known = Known(*shape, kind)
        for method in FORMS:
            if (method, name) == ("coupled", "deepseek_v4"):
                continue  # refused: see test_stability
            x = known.matrix.float()
            actual = orthogonalize(x, method=method, coefficients=name)
            assert relative_error(actual, known.image(preset(name))) < 1e-4, (kind, method)


@pytest.mark.parametrize("shape", [(48, 48), (40, 160)])
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("method", ["newton_schulz", "gram"])
def test_float32_stays_near_the_exact_polynomial_where_rank_is_missing(
    name: str, method: Method, shape: tuple[int, int]
) -> None:
    # deepseek_v4 multiplies what rounding leaves in the null space by 8e4, the others by 1e3.
    tolerance = 3e-2 if name == "deepseek_v4" else 2e-3
    for kind in ("condition_1e4", "condition_1e8", "rank_1", "rank_8", "two_levels"):
        known = Known(*shape, kind)
        actual = orthogonalize(known.matrix.float(), method=method, coefficients=name)
        assert relative_error(actual, known.image(preset(name))) < tolerance, kind


@pytest.mark.parametrize(
    ("dtype", "method", "tolerance"),
    [
        (torch.float16, "newton_schulz", 1e-2),
        (torch.float16, "gram", 1e-2),
        (torch.bfloat16, "newton_schulz", 8e-2),
    ],
)
@pytest.mark.parametrize("name", PRESETS)
def test_half_precision_is_near_the_exact_polynomial(
    name: str, dtype: torch.dtype, method: Method, tolerance: float
) -> None:
    for kind in ("flat", "power_law", "condition_1e2", "uniform"):
        known = Known(32, 96, kind)
        actual = orthogonalize(known.matrix.float(), method=method, coefficients=name, dtype=dtype)
        assert actual.dtype == torch.float32
        assert relative_error(actual, known.image(preset(name))) < tolerance, kind


@pytest.mark.parametrize("method", ["newton_schulz", "gram"])
def test_cut_products_give_the_exact_polynomial(method: Method) -> None:
    known = Known(400, 520, "condition_1e2")
    tolerance = 1e-5 if method == "newton_schulz" else 1e-3
    for matrix, image in (
        (known.matrix, known.image(preset("p5"))),
        (known.matrix.T, known.image(preset("p5")).T),
    ):
        actual = orthogonalize(matrix.float(), method=method, coefficients="p5")
        assert relative_error(actual, image) < tolerance


@pytest.mark.parametrize("name", ["p5", "polar_express", "keller", "you"])
@pytest.mark.parametrize("kind", ["rank_1", "rank_8", "two_levels"])
def test_cut_products_keep_the_gram_form_near_where_rank_is_missing(name: str, kind: str) -> None:
    # Diagonal blocks symmetric only up to rounding made this 0.1 with p5, 0.7 with polar_express.
    known = Known(400, 600, kind)
    actual = orthogonalize(known.matrix.float(), method="gram", coefficients=name)
    assert relative_error(actual, known.image(preset(name))) < 1e-2


def test_a_bfloat16_gram_without_restarts_blows_up_and_a_float32_one_does_not() -> None:
    # The reason for `stability.windows`: the same matrix, the same steps, only the dtype differs.
    schedule = preset("p5")
    x = Known(128, 512, "condition_1e4").matrix
    whole = (schedule.coefficients,)
    assert largest_singular_value(newton_schulz.on_gram(x.bfloat16(), schedule, whole)) > 3
    assert largest_singular_value(newton_schulz.on_gram(x.float(), schedule, whole)) < 1.01


def test_a_float16_gram_needs_its_restart() -> None:
    schedule = preset("p5")
    x = Known(64, 256, "condition_1e4").matrix.half()
    cut = stability.windows(schedule, "float16")
    whole = (schedule.coefficients,)
    assert largest_singular_value(newton_schulz.on_gram(x, schedule, whole)) > 3
    assert largest_singular_value(newton_schulz.on_gram(x, schedule, cut)) < 1.03


@pytest.mark.parametrize(
    ("shape", "method"),
    [((24, 24), "newton_schulz"), ((24, 24), "auto"), *(((24, 72), form) for form in FORMS)],
)
def test_orthogonal_equivariance(method: Method, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    m, n = shape
    left = orthonormal(m, m, generator).float()
    right = orthonormal(n, n, generator).float()
    x = torch.randn(shape, generator=generator)
    for name in ("keller", "p5"):
        rotated = orthogonalize(left @ x @ right, method=method, coefficients=name)
        expected = left @ orthogonalize(x, method=method, coefficients=name) @ right
        torch.testing.assert_close(rotated, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["auto", *FORMS, "svd", "eigh"])
def test_transpose_of_a_square(method: Method) -> None:
    # Condition 100: a Gaussian square's smallest singular value is lost in its Gram matrix.
    x = Known(24, 24, "condition_1e2").matrix.float()
    tolerance = 1e-5 if method in ("auto", "newton_schulz", "svd") else 1e-4
    torch.testing.assert_close(
        orthogonalize(x.T, method=method), orthogonalize(x, method=method).T, rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("coefficients", ["p5", "halley", "keller"])
@pytest.mark.parametrize("shape", [(24, 72), (17, 19), (64, 80), (400, 520), (3, 16, 40)])
def test_transpose_to_the_bit(shape: tuple[int, ...], coefficients: str) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(8))
    out = orthogonalize(x, coefficients=coefficients)
    assert torch.equal(orthogonalize(x.mT, coefficients=coefficients), out.mT)
    assert torch.equal(orthogonalize(x.mT.contiguous(), coefficients=coefficients), out.mT)


@pytest.mark.parametrize("method", [*FORMS, "svd", "eigh"])
def test_every_form_transposes_to_the_bit(method: Method) -> None:
    x = torch.randn(17, 30, generator=torch.Generator().manual_seed(8))
    assert torch.equal(orthogonalize(x.T, method=method), orthogonalize(x, method=method).T)


@pytest.mark.parametrize(
    "shape",
    [(5, 12, 12), (64, 4, 4), (7, 17, 19), (9, 5, 39), (5, 16, 40), (2, 3, 40, 16), (3, 96, 128)],
)
@pytest.mark.parametrize("method", ["auto", *FORMS, "svd", "eigh"])
def test_a_batch_is_a_loop(method: Method, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    x[0] *= 1e20
    batch = orthogonalize(x, method=method, coefficients="p5")
    flat = x.reshape(-1, *shape[-2:])
    loop = torch.stack([orthogonalize(one, method=method, coefficients="p5") for one in flat])
    assert torch.equal(batch, loop.reshape(shape))


@pytest.mark.parametrize("coefficients", ["halley", "cubic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_of_other_schedules_is_a_loop(coefficients: str, dtype: torch.dtype) -> None:
    x = torch.randn(9, 17, 19, dtype=dtype, generator=torch.Generator().manual_seed(5))
    loop = torch.stack([orthogonalize(one, coefficients=coefficients) for one in x])
    assert torch.equal(orthogonalize(x, coefficients=coefficients), loop)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_batches_in_half_precision_do_not_blow_up(dtype: torch.dtype) -> None:
    # torch's batched product rounds before it adds: this had become infinite.
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 64, 1, generator=generator) @ torch.randn(2, 1, 64, generator=generator)
    out = orthogonalize(x, coefficients="cubic", dtype=dtype)
    assert torch.equal(out[1], orthogonalize(x[1], coefficients="cubic", dtype=dtype))
    assert float(torch.linalg.matrix_norm(out, 2).max()) < 1.25


def test_a_large_matrix_of_a_batch_has_the_same_bits_alone() -> None:
    x = torch.randn(3, 96, 128, generator=torch.Generator().manual_seed(6))
    assert torch.equal(orthogonalize(x)[1], orthogonalize(x[1]))
    assert torch.equal(orthogonalize(x[1:])[0], orthogonalize(x[1]))


@pytest.mark.parametrize("kind", ["flat", "uniform", "power_law", "condition_1e2"])
@pytest.mark.parametrize("shape", [(48, 48), (64, 256), (256, 64), (100, 100)])
def test_p5_makes_the_matched_rms_mean_what_it_says(kind: str, shape: tuple[int, int]) -> None:
    x = Known(*shape, kind).matrix.float()
    scaled_rms = orthogonalize(x, coefficients="p5").square().mean().mul(max(shape)).sqrt()
    assert 0.98 <= float(scaled_rms) <= 1.02
    values = torch.linalg.svdvals(orthogonalize(x, coefficients="p5").double())
    assert 0.98 <= float(values.min())
    assert float(values.max()) <= 1.01
    keller = orthogonalize(x, coefficients="keller").square().mean().mul(max(shape)).sqrt()
    assert 0.65 <= float(keller) <= 1.15


def test_keller_falls_short_of_the_matched_rms_on_gaussian_matrices() -> None:
    x = torch.randn(128, 512, generator=torch.Generator().manual_seed(7))
    scaled_rms = orthogonalize(x, coefficients="keller").square().mean().mul(512).sqrt()
    assert 0.7 <= float(scaled_rms) <= 0.9


def test_float16_form_keeps_matrices_longer_than_its_range() -> None:
    # 70,000 equal entries: X Xᵀ of entries near 1 would be past float16's 65,504.
    x = torch.ones(1, 70_000)
    out = orthogonalize(x, dtype=torch.float16, coefficients="p5")
    assert float(out.double().norm()) == pytest.approx(0.995, abs=5e-3)

"""What holds for every finite matrix."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distmuon.orthogonalize import orthogonalize
from distmuon.orthogonalize.coefficients import PRESETS
from distmuon.orthogonalize.policy import Method
from tests.unit.orthogonalize.spectra import largest_singular_value, orthonormal

FORMS: tuple[Method, ...] = ("newton_schulz", "gram")
DEFAULTS = [*(("p5", form) for form in FORMS), ("halley", "auto")]


def adversarial(count: int, m: int, n: int, seed: int) -> Tensor:
    """[count, m, n] float64 of norm about 1: gaps, clusters, rank 1, condition 1e8."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(m, n)
    matrices = []
    for i in range(count):
        decades = 8 * torch.rand(1, generator=generator, dtype=torch.float64)
        s = 10 ** (-decades * torch.rand(rank, generator=generator, dtype=torch.float64))
        s[0] = 1.0
        if i % 4 == 1:  # few directions, the others exactly absent
            s[1 + int(torch.randint(rank, (1,), generator=generator)) :] = 0
        if i % 4 == 2:  # a cluster at the top, at which rounding pushes out of the interval
            s[: 1 + rank // 2] = 1.0
        u, v = orthonormal(m, rank, generator), orthonormal(n, rank, generator)
        matrices.append((u * s) @ v.T)
    return torch.stack(matrices)


@pytest.mark.parametrize("shape", [(24, 24), (24, 60), (60, 24), (1, 40), (2, 2)])
@pytest.mark.parametrize(("name", "method"), DEFAULTS)
def test_the_defaults_never_overshoot(name: str, method: Method, shape: tuple[int, int]) -> None:
    spectra = adversarial(200, *shape, seed=0)
    worst = 0.0
    for decade in (*range(-30, 31, 4), -36, 36):
        x = (spectra * 10.0**decade).float()
        out = orthogonalize(x, method=method, coefficients=name)
        worst = max(worst, largest_singular_value(out))
        assert bool(((out.double() * spectra).sum(dim=(-2, -1)) > 0).all())
    assert worst <= 1.01


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(24, 60), (48, 48), (1, 40)])
@pytest.mark.parametrize(("name", "method"), DEFAULTS)
def test_the_defaults_never_overshoot_at_any_of_sixty_decades(
    name: str, method: Method, shape: tuple[int, int]
) -> None:
    spectra = adversarial(200, *shape, seed=1)
    for decade in (*range(-30, 31), -36, 36):
        x = (spectra * 10.0**decade).float()
        out = orthogonalize(x, method=method, coefficients=name)
        assert largest_singular_value(out) <= 1.01
        assert bool(((out.double() * spectra).sum(dim=(-2, -1)) > 0).all())


@pytest.mark.parametrize(
    ("dtype", "method"),
    [(torch.float16, "newton_schulz"), (torch.float16, "gram"), (torch.bfloat16, "newton_schulz")],
)
@pytest.mark.parametrize("shape", [(24, 24), (24, 60), (1, 40)])
def test_p5_hardly_overshoots_in_half_precision(
    dtype: torch.dtype, method: Method, shape: tuple[int, int]
) -> None:
    spectra = adversarial(60, *shape, seed=2)
    for scale in (1e-36, 1.0, 1e36):
        out = orthogonalize(
            (spectra * scale).float(), method=method, coefficients="p5", dtype=dtype
        )
        assert largest_singular_value(out) <= 1.03
        assert bool(((out.double() * spectra).sum(dim=(-2, -1)) > 0).all())


shapes = st.tuples(st.integers(1, 20), st.integers(1, 40)).flatmap(
    lambda s: st.sampled_from([s, s[::-1]])
)
methods = st.sampled_from([*FORMS, "svd", "eigh"])


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    seed=st.integers(0, 2**31),
    exponent=st.integers(-100, 100),
    method=methods,
    name=st.sampled_from(PRESETS),
)
def test_scale_sign_and_direction(
    shape: tuple[int, int], seed: int, exponent: int, method: Method, name: str
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    out = orthogonalize(x, method=method, coefficients=name)
    assert torch.equal(orthogonalize(x * 2.0**exponent, method=method, coefficients=name), out)
    assert torch.equal(orthogonalize(-x, method=method, coefficients=name), -out)
    assert float((out * x).sum()) > 0
    assert out.shape == x.shape


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(
        st.lists(
            st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=4, max_size=4
        ),
        min_size=3,
        max_size=3,
    ),
    method=methods,
)
def test_any_finite_matrix(values: list[list[float]], method: Method) -> None:
    x = torch.tensor(values)
    out = orthogonalize(x, method=method, coefficients="p5")
    assert bool(out.isfinite().all())
    assert largest_singular_value(out) <= 1.01
    if not bool(x.any()):
        assert torch.equal(out, x * 0)
    rows_absent = ~(x != 0).any(dim=1)
    assert not bool(out[rows_absent].any())


@given(st.integers(1, 40), st.integers(1, 200), st.integers(1, 9), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_a_small_batch_is_a_loop_and_transposes(m: int, n: int, count: int, seed: int) -> None:
    x = torch.randn(count, m, n, generator=torch.Generator().manual_seed(seed))
    out = orthogonalize(x)
    assert torch.equal(out, torch.stack([orthogonalize(one) for one in x]))
    if m != n:
        assert torch.equal(orthogonalize(x.mT), out.mT)

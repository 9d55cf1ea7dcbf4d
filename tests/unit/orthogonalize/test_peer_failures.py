"""Failures found in other implementations, each as a test of ours."""

import pytest
import torch

from distmuon.orthogonalize import orthogonalize
from distmuon.orthogonalize.coefficients import PRESETS
from distmuon.orthogonalize.policy import Method

FORMS: tuple[Method, ...] = ("newton_schulz", "gram", "eigh", "svd")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-20, 1e-10, 1e4, 1e6, 1e20])
def test_scaled_gradients_vanish_or_turn_to_nan(scale: float, dtype: torch.dtype) -> None:
    """Every peer tried gives 0 at 1e20 and nearly 0 at 1e-20; one gave NaN from 1e6 on."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * scale
    norm = orthogonalize(x, coefficients="p5", dtype=dtype).norm() / 64**0.5
    assert float(norm) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("method", FORMS)
@pytest.mark.parametrize("name", PRESETS)
def test_a_zero_matrix_gives_nan_or_noise(name: str, method: Method) -> None:
    """A norm taken in double gave NaN; an SVD gave spurious ones."""
    out = orthogonalize(torch.zeros(8, 24), method=method, coefficients=name)
    assert torch.equal(out, torch.zeros(8, 24))


def test_a_bfloat16_momentum_buffer_is_normalized_in_place() -> None:
    """`x.bfloat16()` of a bfloat16 tensor is x itself, and `div_` then wrote to the buffer."""
    buffer = torch.randn(32, 64, generator=torch.Generator().manual_seed(1)).bfloat16() * 7
    copy = buffer.clone()
    for method in FORMS:
        orthogonalize(buffer, method=method)
        assert torch.equal(buffer, copy)


def test_a_float32_input_is_overwritten() -> None:
    """Where no cast is needed, an in-place normalization reaches the caller's tensor."""
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(2))
    copy = x.clone()
    for method in FORMS:
        orthogonalize(x, method=method, dtype=torch.float32)
        assert torch.equal(x, copy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 512), (512, 1), (64, 256), (64, 64)])
@pytest.mark.parametrize("name", PRESETS)
def test_rank_one_updates_change_sign_or_blow_up(
    name: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Coefficients kept without the rescaling or the safety factor that they need.

    The cosine had been -1 with the gradient, or the norm 2e11.
    """
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(shape[0], 1, generator=generator) @ torch.randn(
        1, shape[1], generator=generator
    )
    out = orthogonalize(x, coefficients=name, dtype=dtype)
    direction = x / x.norm()
    assert 0.6 < float((out * direction).sum()) < 1.25
    assert float(torch.linalg.matrix_norm(out, 2)) < 1.25


def test_an_infinity_raises_inside_lapack() -> None:
    """LAPACK raises on non-finite input, on one rank only; we say so in the result instead."""
    x = torch.ones(4, 4)
    x[0, 0] = torch.inf
    assert orthogonalize(x, method="svd").isnan().all()
    assert torch.equal(orthogonalize(x, method="eigh", nonfinite="zero"), torch.zeros(4, 4))

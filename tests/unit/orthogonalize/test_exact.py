"""The exact methods: precision, damping, and what happens when LAPACK gives up."""

import pytest
import torch
from torch import Tensor

from distmuon.orthogonalize import exact, orthogonalize
from distmuon.orthogonalize.policy import Method
from tests.unit.orthogonalize.spectra import Known, largest_singular_value, relative_error


@pytest.mark.parametrize("shape", [(48, 48), (32, 96), (96, 32), (1, 9), (1, 1)])
@pytest.mark.parametrize("method", ["svd", "eigh"])
def test_well_conditioned_matrices_are_orthogonalized_exactly(
    method: Method, shape: tuple[int, int]
) -> None:
    known = Known(*shape, "uniform")
    assert relative_error(orthogonalize(known.matrix.float(), method=method), known.polar()) < 1e-4
    assert relative_error(orthogonalize(known.matrix, method=method), known.polar()) < 1e-11


@pytest.mark.parametrize("method", ["svd", "eigh"])
@pytest.mark.parametrize("kind", ["rank_1", "rank_8"])
def test_missing_rank_is_not_invented(method: Method, kind: str) -> None:
    known = Known(40, 120, kind)
    out = orthogonalize(known.matrix.float(), method=method)
    assert relative_error(out, known.polar()) < 2e-3


def test_eigh_damps_what_rounding_hides() -> None:
    known = Known(40, 120, "condition_1e8")
    threshold = exact.damping(torch.float32)
    damped = (known.s / threshold).clamp(max=1)
    expected = (known.u * (1.5 * damped - 0.5 * damped**3)) @ known.v.T
    out = orthogonalize(known.matrix.float(), method="eigh")
    assert relative_error(out, expected) < 3e-2
    assert largest_singular_value(out) < 1.01


@pytest.mark.parametrize("kind", ["condition_1e3", "condition_1e4", "condition_1e8", "rank_1"])
@pytest.mark.parametrize("shape", [(48, 48), (40, 160), (400, 400)])
def test_eigh_never_overshoots(kind: str, shape: tuple[int, int]) -> None:
    for scale in (1e-36, 1.0, 1e36):
        x = (Known(*shape, kind).matrix * scale).float()
        assert largest_singular_value(orthogonalize(x, method="eigh")) < 1.0001


@pytest.mark.parametrize("failures", [1, 2])
def test_eigh_falls_back_when_lapack_does_not_converge(
    failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Known(16, 40, "uniform")
    original = torch.linalg.eigh
    seen: list[torch.dtype] = []

    def failing(matrix: Tensor) -> object:
        seen.append(matrix.dtype)
        if len(seen) <= failures:
            raise torch.linalg.LinAlgError("did not converge")  # type: ignore[attr-defined]
        return original(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    out = orthogonalize(known.matrix.float(), method="eigh")
    assert seen == [torch.float32, torch.float64]
    assert relative_error(out, known.polar()) < 1e-4


def test_eigh_falls_back_when_the_result_is_no_contraction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = Known(16, 40, "uniform")
    original = torch.linalg.eigh

    def wrong(matrix: Tensor) -> object:
        values, vectors = original(matrix)
        return (values, vectors * (3 if matrix.dtype == torch.float32 else 1))

    monkeypatch.setattr(torch.linalg, "eigh", wrong)
    out = orthogonalize(known.matrix.float(), method="eigh")
    assert relative_error(out, known.polar()) < 1e-5


@pytest.mark.parametrize("method", ["svd", "eigh"])
def test_half_precision_inputs_are_decomposed_in_float32(method: Method) -> None:
    known = Known(16, 40, "uniform")
    x = known.matrix.bfloat16()
    out = orthogonalize(x, method=method, dtype=torch.bfloat16)
    assert out.dtype == torch.bfloat16
    expected = orthogonalize(x.float(), method=method).bfloat16()
    assert torch.equal(out, expected)


def test_the_matched_scale_of_the_exact_update() -> None:
    # 0.2 * sqrt(max(A, B)) times the update has RMS 0.2 * sqrt(rank / min(A, B)).
    for shape, kind, rank in (((32, 96), "uniform", 32), ((96, 32), "rank_8", 8)):
        out = orthogonalize(Known(*shape, kind).matrix, method="svd")
        rms = (0.2 * max(shape) ** 0.5 * out).square().mean().sqrt()
        assert float(rms) == pytest.approx(0.2 * (rank / min(shape)) ** 0.5, abs=1e-5)

"""Bad input: an error that says what to do."""

import pytest
import torch

from distmuon.orthogonalize import orthogonalize


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.ones(3, 4, dtype=torch.int32), TypeError, r"int32.*x\.float\(\)"),
        (torch.ones(3, 4, dtype=torch.bool), TypeError, "bool"),
        (torch.ones(3, 4, dtype=torch.complex64), TypeError, "complex64.*real and imaginary"),
        (torch.ones(3, 4).to(torch.float8_e4m3fn), TypeError, "float8"),
        (torch.ones(3, 4).to_sparse(), TypeError, r"sparse.*to_dense\(\)"),
        (torch.ones(4), ValueError, r"\[4\].*\[\.\.\., m, n\].*AdamW"),
        (torch.tensor(1.0), ValueError, r"\[\]"),
        (torch.ones(0, 4), ValueError, "at least one element"),
        (torch.ones(2, 4, 0), ValueError, "at least one element"),
        (torch.ones(0, 4, 4), ValueError, "at least one element"),
        ([[1.0, 2.0]], TypeError, "list.*torch.Tensor"),
        ([torch.ones(2, 2)], TypeError, "list.*one torch.Tensor"),
        (None, TypeError, "NoneType"),
    ],
)
def test_bad_matrices(x: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        orthogonalize(x)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"method": "qr"}, ValueError, "Unknown method='qr'.*newton_schulz.*eigh"),
        ({"nonfinite": "skip"}, ValueError, "'propagate' or 'zero'"),
        ({"coefficients": "p6"}, ValueError, "Unknown coefficients='p6'"),
        ({"dtype": "float32"}, TypeError, "torch.dtype"),
        ({"dtype": torch.int8}, ValueError, "int8"),
        ({"dtype": torch.complex64}, ValueError, "complex64"),
        ({"steps": -1}, ValueError, "between 1 and 99"),
        ({"method": "svd", "steps": 5}, ValueError, "steps=5.*'svd'.*steps=None"),
        ({"method": "eigh", "steps": 5}, ValueError, "steps=None"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        orthogonalize(torch.ones(2, 3), **arguments)  # type: ignore[arg-type]


def test_everything_but_the_matrix_is_by_keyword() -> None:
    with pytest.raises(TypeError, match="positional"):
        orthogonalize(torch.ones(2, 3), "svd")  # type: ignore[call-arg]


def test_parameters_and_views_are_fine() -> None:
    x = torch.nn.Parameter(torch.randn(4, 6))
    assert orthogonalize(x[:, ::2]).shape == (4, 3)
    assert orthogonalize(x).shape == (4, 6)
    assert type(orthogonalize(x)) is torch.Tensor

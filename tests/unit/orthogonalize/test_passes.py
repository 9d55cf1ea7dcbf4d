"""How often half precision reads and writes the entries of a matrix beside the products.

Counted on this machine with the code that a GPU runs, symmetric products by torch's operations.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distmuon.kernels.symmetric import symmetric_backend
from distmuon.orthogonalize import orthogonalize, orthogonalize_checked, pipeline
from distmuon.orthogonalize.api import orthogonalize_each

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")
HALF = (torch.float16, torch.bfloat16)


class Traffic(TorchDispatchMode):
    """Adds up the bytes that operations other than products read and write of large tensors."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.bytes = least, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        name = function.name().split("::")[1].split(".")[0]
        views = function.is_view or name in ("empty", "_unsafe_view", "detach", "new_empty")
        if not views and name not in PRODUCTS:
            given = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)]
            made = [x for x in (result,) if isinstance(x, Tensor)]
            # What is written in place, or into memory that was given, is among both.
            written = {x.data_ptr() for x in made}
            read = [x for x in given if x.data_ptr() not in written or name.endswith("_")]
            for x in (*read, *made):
                self.bytes += x.numel() * x.element_size() if x.numel() >= self.least else 0
        return result


def count(shape: tuple[int, int], dtype: torch.dtype, matrices: int, *, known: bool) -> float:
    """Bytes of each entry between the momenta and the results that are to be copied."""
    xs = [torch.randn(shape) for _ in range(matrices)]
    largest = [x.abs().max().view(1) if known else None for x in xs]
    with symmetric_backend("torch"), Traffic(xs[0].numel()) as traffic:
        polar = orthogonalize_each(xs, dtype=dtype, largest=largest)
    assert polar.values.dtype == dtype
    return traffic.bytes / (matrices * xs[0].numel())


@pytest.fixture(autouse=True)
def _every_matrix_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_ALONE_ENTRIES", 1)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [(16, 512), (512, 16)])
@pytest.mark.parametrize("matrices", [1, 3])
def test_one_pass_is_made_beside_the_products(
    matrices: int, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    # float32 is read and half precision written. In the plain form the normalization is one more.
    least = 4 + 2 if dtype == torch.float16 else 4 + 2 + 2 * 2
    assert count(shape, dtype, matrices, known=True) == least
    # The largest entries, if nobody knows them, are another reading; on CPUs two.
    assert count(shape, dtype, matrices, known=False) == least + 2 * 4


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (30, 32), (32, 30)])
def test_matrices_apart_give_what_they_give_in_a_batch(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    x[1] = 0
    x[2, 3, 4] = torch.inf
    with symmetric_backend("torch"):
        expected = orthogonalize_checked(x, dtype=dtype)
        for largest in ([None] * 3, [y.abs().max().view(1) for y in x]):
            polar = orthogonalize_each(list(x), dtype=dtype, largest=largest)
            found = polar.finish(torch.float32)
            torch.testing.assert_close(found, expected.update, rtol=0, atol=5e-3, equal_nan=True)
            assert polar.finite[:, 0, 0].tolist() == expected.finite.tolist() == [True, True, False]


@pytest.mark.parametrize("dtype", HALF)
def test_a_tall_matrix_is_taken_as_it_lies(dtype: torch.dtype) -> None:
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(0))
    copied = orthogonalize(x, dtype=dtype)
    with symmetric_backend("torch"):
        torch.testing.assert_close(orthogonalize(x, dtype=dtype), copied, rtol=0, atol=5e-3)

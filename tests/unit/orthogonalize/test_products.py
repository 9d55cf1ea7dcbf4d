"""Symmetric products cut into row panels."""

import pytest
import torch

from distmuon.orthogonalize.products import (
    PANEL,
    SMALLEST_CUT,
    product_add,
    symmetric_product,
    symmetric_product_add,
)

SIZES = [SMALLEST_CUT - 1, SMALLEST_CUT, SMALLEST_CUT + 1, 3 * PANEL + 77, 5 * PANEL]


@pytest.mark.parametrize("m", SIZES)
def test_a_cut_gram_matrix_is_the_whole_one(m: int) -> None:
    x = torch.randn(m, m + 50, generator=torch.Generator().manual_seed(0))
    actual = symmetric_product(x, x.mT)
    torch.testing.assert_close(actual.double(), x.double() @ x.double().mT, rtol=0, atol=2e-3)
    assert torch.equal(actual, symmetric_product(x.clone(), x.clone().mT))
    if m >= SMALLEST_CUT:
        assert torch.equal(actual, actual.mT)


@pytest.mark.parametrize("m", SIZES)
def test_a_transposed_view_needs_no_copy(m: int) -> None:
    x = torch.randn(m + 50, m, generator=torch.Generator().manual_seed(1)).mT
    torch.testing.assert_close(
        symmetric_product(x, x.mT).double(), x.double() @ x.double().mT, rtol=0, atol=2e-3
    )


@pytest.mark.parametrize("m", SIZES)
def test_the_fused_product_is_the_polynomial(m: int) -> None:
    x = torch.randn(m, m, generator=torch.Generator().manual_seed(2)) / m**0.5
    r = symmetric_product(x, x.mT)
    copy = r.clone()
    actual = symmetric_product_add(r, r, r, beta=-1.7, alpha=0.4)
    expected = -1.7 * r.double() + 0.4 * r.double() @ r.double()
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-4)
    assert torch.equal(r, copy)
    if m >= SMALLEST_CUT:
        assert torch.equal(actual, actual.mT)


def test_batches_go_through_whole() -> None:
    x = torch.randn(3, 20, 30, generator=torch.Generator().manual_seed(3))
    r = symmetric_product(x, x.mT)
    actual = product_add(r, r, r, beta=2.0, alpha=0.5)
    torch.testing.assert_close(actual, 2 * r + 0.5 * r @ r)


@pytest.mark.parametrize("m", SIZES[1:4])
def test_non_finite_values_reach_the_mirror(m: int) -> None:
    x = torch.ones(m, m)
    x[m - 1, 0] = torch.nan
    out = symmetric_product(x, x.mT)
    assert out[m - 1].isnan().all()
    assert out[:, m - 1].isnan().all()

"""Matrix products for [m, n] and [batch, m, n], symmetric ones at about half the work."""

from __future__ import annotations

import torch
from torch import Tensor

from distmuon.kernels import symmetric
from distmuon.kernels.symmetric import Factor
from distmuon.kernels.tiles import Scaled

# Rows of one panel, and the smallest matrix cut into panels: measured, docs/numerics.md.
PANEL = 128
SMALLEST_CUT = 384


def product(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Product a @ b for [m, k] x [k, n], or for batches of them; into `out` if there is one."""
    return torch.matmul(a, b, out=out)


def product_add(
    y: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    beta: float,
    alpha: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """Compute beta * y + alpha * a @ b, accumulated in the product's own epilogue."""
    if y.dim() == 2:
        return torch.addmm(y, a, b, beta=beta, alpha=alpha, out=out)
    return torch.baddbmm(y, a, b, beta=beta, alpha=alpha, out=out)


def symmetric_product(a: Tensor, b: Tensor, *, by: Tensor | None = None) -> Tensor:
    """Product a @ b that is known to be symmetric: b is a's transpose, or both commute.

    Args:
        a: [m, k] or [batch, m, k].
        b: [k, m] or [batch, k, m].
        by: factor for each matrix in the device's memory; only where `symmetric.folds`.

    Returns:
        A new [m, m] or [batch, m, m], exactly symmetric where it was cut into panels or a kernel
        computed it, otherwise up to rounding.
    """
    if symmetric.takes(a):
        return symmetric.sym_gemm(a, b, alpha=Scaled(1.0, by))
    assert by is None, "nothing else takes it"
    if not _cut(a):
        return product(a, b)
    out = a.new_empty(a.size(0), a.size(0))
    for start, stop in _panels(a.size(0)):
        torch.mm(a[start:stop], b[:, :stop], out=out[start:stop, :stop])
    return _mirror_(out)


def gram(x: Tensor) -> tuple[Tensor, Tensor]:
    """The Gram matrix x @ x.mT and its Frobenius norm, from one pass where a kernel has both.

    Args:
        x: [m, n] or [batch, m, n].

    Returns:
        [..., m, m], and [..., 1, 1] accumulated in at least float32.
    """
    if symmetric.takes(x):
        return symmetric.sym_gemm_norm(x, x.mT)
    r = symmetric_product(x, x.mT)
    wide = torch.promote_types(r.dtype, torch.float32)
    return r, torch.linalg.vector_norm(r, dim=(-2, -1), keepdim=True, dtype=wide)


def symmetric_product_add(
    y: Tensor, a: Tensor, b: Tensor, *, beta: Factor, alpha: Factor = 1.0
) -> Tensor:
    """Compute beta * y + alpha * a @ b where y and the product are symmetric.

    Args:
        y: [m, m] or [batch, m, m].
        a: as in `symmetric_product`.
        b: likewise.
        beta: factor on y; in the device's memory only where `symmetric.folds`.
        alpha: factor on the product; likewise.

    Returns:
        A new tensor, symmetric like that of `symmetric_product`.
    """
    if symmetric.takes(a):
        return symmetric.sym_gemm(a, b, y, alpha=alpha, beta=beta)
    assert isinstance(alpha, (int, float)), "nothing else takes them"
    assert isinstance(beta, (int, float)), "nothing else takes them"
    if not _cut(a):
        return product_add(y, a, b, beta=beta, alpha=alpha)
    out = torch.empty_like(y)
    for start, stop in _panels(a.size(0)):
        torch.addmm(
            y[start:stop, :stop],
            a[start:stop],
            b[:, :stop],
            beta=beta,
            alpha=alpha,
            out=out[start:stop, :stop],
        )
    return _mirror_(out)


def _cut(x: Tensor) -> bool:
    return x.dim() == 2 and x.size(0) >= SMALLEST_CUT and x.device.type == "cpu"


def _panels(rows: int) -> list[tuple[int, int]]:
    return [(start, min(start + PANEL, rows)) for start in range(0, rows, PANEL)]


def _mirror_(out: Tensor) -> Tensor:
    for start, stop in _panels(out.size(0)):
        out[:start, start:stop].copy_(out[start:stop, :start].mT)
        # A diagonal block that is symmetric only up to rounding, among others that are exactly so,
        # makes the Gram form amplify the difference: to 10% of the update at rank 1.
        block = out[start:stop, start:stop]
        block.copy_((block + block.mT).mul_(0.5))
    return out

"""Newton-Schulz iterations towards the polar factor: on the matrix, on its Gram matrix, coupled.

All compute the same polynomial of the singular values. They differ in cost and in how rounding
errors grow; docs/numerics.md has both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distmuon.orthogonalize.guards import nonzero
from distmuon.orthogonalize.products import (
    gram,
    product,
    product_add,
    symmetric_product_add,
)
from distmuon.orthogonalize.schedule import Schedule, Triple


def inverse_norm(r: Tensor, schedule: Schedule) -> Tensor:
    """1 / (safety * norm of X) from R = X Xᵀ, so that no pass over X is spent on it.

    Args:
        r: [..., m, m].
        schedule: says which norm.

    Returns:
        [..., 1, 1], accumulated in at least float32; 1 / safety for a zero matrix.
    """
    wide = torch.promote_types(r.dtype, torch.float32)
    if schedule.normalization == "schatten4":
        square = torch.linalg.vector_norm(r, dim=(-2, -1), keepdim=True, dtype=wide)
    else:
        square = r.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=wide)[..., None, None]
    return nonzero(square).rsqrt() / schedule.safety


def plain(x: Tensor, schedule: Schedule) -> Tensor:
    """Iterate on the matrix itself: R = X Xᵀ, X <- a X + (b R + c R²) X.

    The stable form in every dtype: each step starts from a fresh R, so a rounding error is never
    amplified by more than the polynomials themselves do.

    Args:
        x: [..., m, n] with m <= n, entries at most 1. Overwritten.
        schedule: coefficients and normalization.

    Returns:
        [..., m, n].

    Source: https://kellerjordan.github.io/posts/muon/
    """
    r = gram(x)
    scale = inverse_norm(r, schedule)
    r.mul_((scale * scale).to(r.dtype))
    x.mul_(scale.to(x.dtype))
    for step, (a, b, c) in enumerate(schedule.coefficients):
        if step:
            r = gram(x)
        z = symmetric_product_add(r, r, r, beta=b, alpha=c)
        x = product_add(x, z, x, beta=a)
    return x


def on_gram(x: Tensor, schedule: Schedule, windows: Sequence[Sequence[Triple]]) -> Tensor:
    """Iterate on R = X Xᵀ alone and multiply by X once a window: X <- Q(R) X.

    Args:
        x: [..., m, n] with m <= n, entries at most 1; may be a transposed view. Overwritten.
        schedule: normalization.
        windows: the schedule's coefficients, cut where R is formed anew (`stability.windows`).

    Returns:
        [..., m, n], with x's memory order.

    Source: https://tridao.me/blog/2026/gram-newton-schulz/
    """
    for number, triples in enumerate(windows):
        r = gram(x)
        scale = inverse_norm(r, schedule) if number == 0 else None
        if scale is not None:
            r.mul_((scale * scale).to(r.dtype))
        q = _transform(r, triples)
        if scale is not None:
            q.mul_(scale.to(q.dtype))
        # Q is symmetric: multiplying from the other side keeps a transposed view's memory order.
        x = product(q, x) if x.stride(-1) == 1 else product(x.mT, q).mT
    return x


def _transform(r: Tensor, triples: Sequence[Triple]) -> Tensor:
    """Q with Q X = the given steps on X, from R = X Xᵀ. Every matrix here is a polynomial of R."""
    q: Tensor | None = None
    for step, (a, b, c) in enumerate(triples):
        z = symmetric_product_add(r, r, r, beta=b, alpha=c)
        if step + 1 < len(triples):
            # a stays out of z: in half precision a + z would round away z's small entries.
            rz = symmetric_product_add(r, r, z, beta=a)
            r = symmetric_product_add(rz, rz, z, beta=a)
        if q is None:
            q = z
            q.diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            q = symmetric_product_add(q, q, z, beta=a)
    assert q is not None
    return q


def coupled(x: Tensor, schedule: Schedule) -> Tensor:
    """The coupled inverse square root: Z -> (X Xᵀ)^(-1/2), Y -> (X Xᵀ)^(1/2), result Z X.

    A reference for the Gram form, written as in the textbooks and without its shortcuts.

    Args:
        x: [..., m, n] with m <= n, entries at most 1. Not modified.
        schedule: coefficients and normalization.

    Returns:
        [..., m, n].

    Source: Higham, Functions of Matrices (2008), section 6.7.
    """
    r = product(x, x.mT)
    scale = inverse_norm(r, schedule).to(x.dtype)
    identity = torch.eye(r.size(-1), dtype=r.dtype, device=r.device)
    y, z = r * (scale * scale), identity.expand_as(r)
    for a, b, c in schedule.coefficients:
        p = product(z, y)
        w = a * identity + b * p + c * product(p, p)
        y, z = product(y, w), product(w, z)
    return product(z, x * scale)

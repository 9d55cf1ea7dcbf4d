"""Newton-Schulz iterations towards the polar factor: on the matrix, on its Gram matrix, coupled.

All compute the same polynomial of the singular values. They differ in cost and in how rounding
errors grow; docs/numerics.md has both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distmuon.kernels.symmetric import folds
from distmuon.kernels.tiles import Scaled
from distmuon.orthogonalize.guards import nonzero
from distmuon.orthogonalize.products import (
    gram,
    product,
    product_add,
    symmetric_product,
    symmetric_product_add,
)
from distmuon.orthogonalize.schedule import AnySchedule, Schedule, Triple

# Where a I + Z may be one matrix, which saves a copy of X a step. In half precision the diagonal
# would round Z's away: 8 + 0.01 == 8 in bfloat16.
_FOLDING = (torch.float32, torch.float64)


def inverse_norm(r: Tensor, schedule: AnySchedule) -> Tensor:
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


def _gram_and_scale(x: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """X Xᵀ and what X has to be multiplied by to be normalized."""
    if schedule.normalization == "schatten4":
        r, square = gram(x)
        return r, nonzero(square).rsqrt() / schedule.safety
    r = symmetric_product(x, x.mT)
    return r, inverse_norm(r, schedule)


class _Scale(NamedTuple):
    """What X and R = X Xᵀ are to be multiplied by, where a kernel does it in passing.

    Attributes:
        x: [..., 1, 1], float32.
        r: Its square.
    """

    x: Tensor
    r: Tensor


class _Factor(NamedTuple):
    """The matrix `shift * I + matrix`, symmetric."""

    matrix: Tensor
    shift: float

    def times(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        """The factor times x [..., m, n], in memory like x's if there is some to spare."""
        left, right = self.matrix, x
        turned = x.stride(-1) != 1 and x.stride(-2) == 1
        if turned:
            # From the other side, as the matrix is symmetric: the result lies in memory as x does.
            left, right, out = x.mT, self.matrix, None if out is None else out.mT
        if self.shift == 0.0:
            result = product(left, right, out=out)
        else:
            result = product_add(left if turned else right, left, right, beta=self.shift, out=out)
        return result.mT if turned else result

    def times_symmetric(self, r: Tensor, *, by: Tensor | None = None) -> Tensor:
        """The factor times a polynomial of the same matrix, [..., m, m], times a scale."""
        if self.shift == 0.0:
            return symmetric_product(r, self.matrix, by=by)
        alpha, beta = (1.0, self.shift) if by is None else (Scaled(1.0, by), Scaled(self.shift, by))
        return symmetric_product_add(r, r, self.matrix, alpha=alpha, beta=beta)


def _factor(r: Tensor, triple: Triple, scale: _Scale | None = None) -> _Factor:
    """The matrix a I + b R + c R² that one step multiplies by, of R times its scale."""
    a, b, c = triple
    if scale is None:
        z = symmetric_product_add(r, r, r, beta=b, alpha=c)
    else:
        alpha, beta = Scaled(c, scale.r * scale.r), Scaled(b, scale.r)
        z = symmetric_product_add(r, r, r, beta=beta, alpha=alpha)
    if r.dtype not in _FOLDING:
        return _Factor(z, a)
    z.diagonal(dim1=-2, dim2=-1).add_(a)
    return _Factor(z, 0.0)


def plain(x: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor | None]:
    """Iterate on the matrix itself: R = X Xᵀ, X <- (a I + b R + c R²) X.

    The stable form in every dtype: each step starts from a fresh R, so a rounding error is never
    amplified by more than the polynomials themselves do.

    Args:
        x: [..., m, n] with m <= n, entries at most 1. Overwritten.
        schedule: coefficients and normalization.

    Returns:
        [..., m, n], and what it is still to be multiplied by: [..., 1, 1] in float32 where the
        Triton kernel took part, None elsewhere.

    Source: https://kellerjordan.github.io/posts/muon/
    """
    r, scale = _gram_and_scale(x, schedule)
    square = scale * scale
    if folds(r):
        # X keeps its own scale to the end, where it is undone in a pass that is needed anyway.
        scales: _Scale | None = _Scale(scale, square)
        for step, triple in enumerate(schedule.coefficients):
            if step:
                r, scales = symmetric_product(x, x.mT, by=square), None
            x = _factor(r, triple, scales).times(x)
        return x, scale
    # By float32 numbers: a rounded scale, or one that float16 does not have, would be another.
    r.mul_(square)
    x.mul_(scale)
    spare: Tensor | None = None
    for step, triple in enumerate(schedule.coefficients):
        if step:
            r = symmetric_product(x, x.mT)
        x, spare = _factor(r, triple).times(x, out=spare), x
    return x, None


def on_gram(x: Tensor, schedule: Schedule, windows: Sequence[Sequence[Triple]]) -> Tensor:
    """Iterate on R = X Xᵀ alone and multiply by X once a window: X <- Q(R) X.

    Args:
        x: [..., m, n] with m <= n, entries at most 1. Not modified.
        schedule: normalization.
        windows: the schedule's coefficients, cut where R is formed anew (`stability.windows`).

    Returns:
        [..., m, n].

    Source: https://tridao.me/blog/2026/gram-newton-schulz/
    """
    scale: Tensor | None = None
    for triples in windows:
        if scale is None:
            r, scale = _gram_and_scale(x, schedule)
            if folds(r) and len(triples) > 1:
                q = _transform(r, triples, _Scale(scale, scale * scale))
            else:
                r.mul_(scale * scale)
                q = gram_transform(r, triples).mul_(scale)
        else:
            q = gram_transform(symmetric_product(x, x.mT), triples)
        x = _Factor(q, 0.0).times(x)
    return x


def gram_transform(r: Tensor, triples: Sequence[Triple]) -> Tensor:
    """Q with Q X = the given steps on X, from R = X Xᵀ. Every matrix here is a polynomial of R.

    Args:
        r: [..., m, m], symmetric up to rounding, of an X that is normalized. Not modified.
        triples: the coefficients of the steps; none give the identity.

    Returns:
        [..., m, m], symmetric up to rounding.
    """
    if not triples:
        return torch.eye(r.size(-1), dtype=r.dtype, device=r.device).expand_as(r)
    return _transform(r, triples, None)


def _transform(r: Tensor, triples: Sequence[Triple], scale: _Scale | None) -> Tensor:
    """`gram_transform`; with a scale of at least two steps, on R and X that are not normalized."""
    first = _factor(r, triples[0], scale)
    factor = first
    q = first.matrix
    if first.shift:
        q = first.matrix.clone()
        q.diagonal(dim1=-2, dim2=-1).add_(first.shift)
    by_r, by_x = (None, None) if scale is None else (scale.r, scale.x)
    for step, triple in enumerate(triples[1:], 2):
        r = factor.times_symmetric(factor.times_symmetric(r, by=by_r))
        factor, by_r = _factor(r, triple), None
        q = factor.times_symmetric(q, by=by_x if step == len(triples) else None)
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

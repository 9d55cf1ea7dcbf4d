"""Halley's iteration towards the polar factor, dynamically weighted, on the Gram matrix.

A step takes a singular value s to s (a + b s²) / (1 + c s²). With weights made for [lower, 1] two
such steps reach what five quintics do, and on the m x m Gram matrix a step costs one inverse of a
positive definite matrix, which LAPACK finds in about the time of one and a half products. It needs
float32: see [Note: why this does not blow up].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from distmuon.orthogonalize.newton_schulz import inverse_norm
from distmuon.orthogonalize.products import product, symmetric_product, symmetric_product_add
from distmuon.orthogonalize.schedule import Rational, Triple

# The smallest singular value, relative to the norm, that two steps bring near 1: p5's. A smaller
# one would make 1 + c R too ill-conditioned for float32.
LOWER = 3e-3
STEPS = 2

# A random matrix that is as good as square has singular values down to 1/m of the largest, whose
# squares float32 loses beside the largest's: f(Q X) misses Q f(X) by 1e-5 at m = 512. Formed in
# float64 the Gram matrix halves that, and is a tenth of the work; from this many rows on the
# largest entry of the error is below 1e-5 in any case (docs/numerics.md).
_FLOAT32_GRAM = 768

# [Note: why this does not blow up] R' = R Z² with Z = alpha I + beta W, W = (I + c R)^-1, is the
# Gram matrix of the next step. As two products it multiplies the rounding errors of R by up to a²,
# a = 121 here, and loses its symmetry on the way: the result is wrong by 0.1 at rank 1. But
# c R W = I - W, so that R' is a combination of R, W and W², in which nothing is amplified by more
# than beta²/c = 4; and W, of norm 1, is known to a few 1e-6 as c R has norm 4e3 at most.
# (docs/numerics.md has the measured errors.)


@cache
def schedule(steps: int = STEPS) -> Rational:
    """Weights of some steps for [3e-3, 1], centred: they miss 1 by as much below as above.

    Args:
        steps: number of steps, at least 1. Two leave singular values in [0.992, 1.008].

    Returns:
        The schedule.

    Source: Nakatsukasa, Bai and Gygi, Optimizing Halley's iteration for computing the matrix polar
        decomposition, SIAM J. Matrix Anal. Appl. 31 (2010), section 3.
    """
    lower, triples = LOWER, []
    for _ in range(steps):
        a, b, c = _weights(lower)
        triples.append((a, b, c))
        lower = min(lower * (a + b * lower * lower) / (1 + c * lower * lower), 1.0)
    centre = 2 / (1 + lower)
    a, b, c = triples.pop()
    return Rational(
        name="halley",
        coefficients=(*triples, (a * centre, b * centre, c)),
        normalization="schatten4",
        safety=1.0,
        source="https://doi.org/10.1137/090774999",
    )


def _weights(lower: float) -> Triple:
    """The (a, b, c) that take [lower, 1] into the interval [L, 1] with the largest L."""
    square = lower * lower
    d = math.cbrt(4 * (1 - square) / (square * square))
    root = math.sqrt(1 + d)
    a = root + 0.5 * math.sqrt(8 - 4 * d + 8 * (2 - square) / (square * root))
    b = (a - 1) ** 2 / 4
    return a, b, a + b - 1


def on_gram(x: Tensor, rational: Rational) -> Tensor:
    """All steps on R = X Xᵀ, and one product with X.

    Args:
        x: [..., m, n] with m <= n, finite float32 or float64, entries at most 1. Not modified.
        rational: weights and normalization.

    Returns:
        [..., m, n].
    """
    m, n = x.shape[-2:]
    wide = x.double() if m < _FLOAT32_GRAM and nearly_square(m, n) else x
    r = symmetric_product(wide, wide.mT)
    del wide
    scale = inverse_norm(r, rational)
    r = r.mul_(scale * scale).to(x.dtype)
    q = transform(r, rational.coefficients).mul_(scale.to(x.dtype))
    return product(q, x)


def nearly_square(m: int, n: int) -> bool:
    """Whether random matrices [m, n], m <= n, have very small singular values: n below 17/16 m."""
    return 16 * n < 17 * m


def transform(r: Tensor, triples: Sequence[Triple]) -> Tensor:
    """Q with Q X = the given steps on X, from R = X Xᵀ. Every matrix here is a function of R.

    Args:
        r: [..., m, m] float32 or float64, symmetric, of norm at most 1. Overwritten.
        triples: the weights of the steps; none give the identity.

    Returns:
        [..., m, m], symmetric up to rounding. Meaningless where R has a NaN or an infinity.
    """
    if not triples:
        return torch.eye(r.size(-1), dtype=r.dtype, device=r.device).expand_as(r)
    q: Tensor | None = None
    for step, (a, b, c) in enumerate(triples):
        alpha, beta = b / c, a - b / c
        if step + 1 < len(triples):
            w = _inverse(_add_identity_(r * c, 1.0))
            r = _next_gram_(r, w, alpha, beta, c)
        else:
            w = _inverse(_add_identity_(r.mul_(c), 1.0))
            del r
        if q is None:
            q = _add_identity_(w.mul_(beta), alpha)
        else:
            q = symmetric_product_add(q, q, w, beta=alpha, alpha=beta)
    assert q is not None, "there is a step"
    return q


def _inverse(shifted: Tensor) -> Tensor:
    """The inverse of I + c R, exactly symmetric."""
    # The check would wait for the device; R >= -1e-6 as computed, and c is at most 4e3.
    factor = torch.linalg.cholesky_ex(shifted, check_errors=False).L
    return torch.cholesky_inverse(factor, out=factor)


def _next_gram_(r: Tensor, w: Tensor, alpha: float, beta: float, c: float) -> Tensor:
    """alpha² R + 2 alpha beta (I - W) / c + beta² (W - W²) / c; R is overwritten."""
    mixed, square = 2 * alpha * beta / c, beta * beta / c
    known = _add_identity_(r.mul_(alpha * alpha).add_(w, alpha=square - mixed), mixed)
    return symmetric_product_add(known, w, w, beta=1.0, alpha=-square)


def _add_identity_(x: Tensor, scale: float) -> Tensor:
    x.diagonal(dim1=-2, dim2=-1).add_(scale)
    return x

"""Polar factors by decomposition: the references, and on CPUs no dearer than five steps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distmuon.orthogonalize.guards import nonzero
from distmuon.orthogonalize.products import product, symmetric_product


def svd(x: Tensor) -> Tensor:
    """U Vᵀ over the singular values above rounding; the others are noise and give zero.

    Args:
        x: [..., m, n], finite float32 or float64.

    Returns:
        [..., m, n]. Zero rows and columns stay zero.
    """
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    floor = torch.finfo(x.dtype).eps * max(x.shape[-2:]) * s[..., :1]
    return _keep_zeros(product(u * (s > floor).to(u.dtype)[..., None, :], vh), x)


def damping(dtype: torch.dtype) -> float:
    """Singular values below this times the largest are lost in the rounding of X Xᵀ."""
    return math.sqrt(8 * torch.finfo(dtype).eps)


def eigh(x: Tensor) -> Tensor:
    """(X Xᵀ)^(-1/2) X by eigenvalues, those below the rounding error of X Xᵀ raised to it.

    A singular value s below t = `damping` times the largest becomes s / t instead of 1: what would
    be amplified there is rounding. Near t that rounding still leaves values up to a fourth too
    large (docs/numerics.md), so one cubic Newton-Schulz step follows: it takes [0, sqrt(3)] into
    [0, 1] and squares what error there is elsewhere. A decomposition that fails or does not
    orthogonalize is repeated in float64, then by `svd`. Synchronizes with the host.

    Args:
        x: [..., m, n] with m <= n, finite float32 or float64.

    Returns:
        [..., m, n]. Zero rows and columns stay zero.
    """
    for dtype in dict.fromkeys((x.dtype, torch.float64)):
        wide = x.to(dtype)
        try:
            out = _polished(_damped(wide))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        if _within_unit_ball(out):
            return _keep_zeros(out.to(x.dtype), x)
    return svd(x)


def _damped(x: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(symmetric_product(x, x.mT))
    floor = nonzero(damping(x.dtype) ** 2 * values[..., -1:])
    weights = torch.maximum(values, floor).rsqrt()
    return product(product(vectors * weights[..., None, :], vectors.mT), x)


def _polished(x: Tensor) -> Tensor:
    half_gram = symmetric_product(x, x.mT).mul_(-0.5)
    half_gram.diagonal(dim1=-2, dim2=-1).add_(1.5)
    return product(half_gram, x)


def _within_unit_ball(out: Tensor) -> bool:
    """Whether no row is longer than 1, which holds for every contraction; False for NaN."""
    longest = torch.linalg.vector_norm(out, dim=-1).amax()
    return bool(longest <= 1 + 1e-2)


def _keep_zeros(out: Tensor, x: Tensor) -> Tensor:
    rows = (x != 0).any(dim=-1, keepdim=True)
    columns = (x != 0).any(dim=-2, keepdim=True)
    return torch.where(rows & columns, out, 0.0)

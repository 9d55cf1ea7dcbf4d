"""A matrix in parts along its long side: a Gram matrix of each part, one transform for all of them.

With X = [X_1 ... X_k] every odd polynomial of X is Q(R) X, R = X_1 X_1ᵀ + ... + X_k X_kᵀ. So each
part forms its own summand of R, one place adds them up and finds the transform, and each part
multiplies by it. Between the parts travel m x m matrices only.

R cannot be formed anew halfway, and its small eigenvalues drown in rounding errors long before the
singular values of X do. Three things keep the result as accurate as the plain form in float32
(docs/numerics.md): the summands are accumulated in float64 and rounded once; the steps are cut in
two, and the Gram matrix of the second half is computed in float64 from the first half's transform;
and the transform stays a product of two symmetric factors, because the rounding errors of their
product are not symmetric.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distmuon.errors import see
from distmuon.orthogonalize import halley, newton_schulz, policy, stability
from distmuon.orthogonalize.coefficients import Coefficients
from distmuon.orthogonalize.guards import largest_entry, power_of_two, prescale
from distmuon.orthogonalize.newton_schulz import inverse_norm
from distmuon.orthogonalize.products import product, symmetric_product
from distmuon.orthogonalize.schedule import AnySchedule, Rational, Schedule, Triple
from distmuon.orthogonalize.stability import Halves

GRAM_DTYPES = (torch.float32, torch.float64)


class PartGram(NamedTuple):
    """A part's summand of the Gram matrix.

    Attributes:
        scaled: [m, w] float32 in memory of its own: the part times a power of two.
        gram: [m, m], the Gram matrix of `scaled`, in the dtype that was asked for.
        largest: [1, 1] float32, the part's largest absolute value; NaN if one is NaN.
    """

    scaled: Tensor
    gram: Tensor
    largest: Tensor


class Transform(NamedTuple):
    """What every part multiplies by: `second @ first`, from the left.

    Attributes:
        first: [m, m], exactly symmetric.
        second: [m, m], exactly symmetric.
        largest: [1, 1] float32, the whole matrix's largest absolute value.
    """

    first: Tensor
    second: Tensor
    largest: Tensor


def check_parts(
    coefficients: Coefficients,
    steps: int | None,
    dtype: torch.dtype,
    device: torch.device,
    shape: Sequence[int],
) -> Halves:
    """Cut a schedule in two, or refuse it for matrices in parts.

    Args:
        coefficients: as in `orthogonalize`.
        steps: likewise.
        dtype: of the Gram matrix, float32 or float64.
        device: where the products run.
        shape: (m, n) of the whole matrix; "auto" depends on it.

    Returns:
        The schedule and its halves.

    Raises:
        TypeError: `coefficients` is of a wrong type.
        ValueError: the dtype is a narrower one, an argument is out of range, or rounding errors of
            the Gram matrix would be amplified past the result.
    """
    if dtype not in GRAM_DTYPES:
        raise ValueError(
            f"Invalid {dtype=} for the Gram matrix of a matrix in parts. Must be torch.float32 or "
            "torch.float64: small eigenvalues of a narrower one turn negative, and are amplified."
            + see("unsafe-coefficients")
        )
    schedule = policy.for_device(
        coefficients, steps, method="auto", requested=dtype, device=device, shape=shape
    )
    products = policy.arithmetic(dtype, device)
    if isinstance(schedule, Schedule):
        stability.check(schedule, products)
    gram = "float64" if dtype == torch.float64 else "float32"
    return stability.halves(schedule, gram=gram, products=products)


@torch.no_grad()
def part_gram(x: Tensor, *, dtype: torch.dtype) -> PartGram:
    """Form one part's summand.

    Args:
        x: [m, w] float32, a contiguous slice of the long side or its transposed view. Not modified.
        dtype: of the result, float32 or float64; it is accumulated in float64 in either case.

    Returns:
        The scaled part and its Gram matrix. Like `orthogonalize`, independent of x's memory.
    """
    largest = largest_entry(x)
    scaled = prescale(x, largest) if x.stride(-1) == 1 else prescale(x.mT, largest).mT
    with torch.autocast(x.device.type, enabled=False):
        wide = scaled.double()
        return PartGram(scaled, symmetric_product(wide, wide.mT).to(dtype), largest)


@torch.no_grad()
def find_transform(grams: Sequence[Tensor], largest: Sequence[Tensor], halves: Halves) -> Transform:
    """Add the summands up and evaluate the polynomial.

    Args:
        grams: [m, m] of each part, all float32 or all float64, only whose lower triangles count up
            to rounding.
        largest: [1, 1] of each part.
        halves: from `check_parts`.

    Returns:
        The transform in the dtype of `grams`. NaN where a part has a NaN or an infinity.
    """
    dtype = grams[0].dtype
    whole = torch.stack(tuple(largest)).amax(0)
    r = torch.zeros_like(grams[0], dtype=torch.float64)
    for gram, amax in zip(grams, largest, strict=True):
        ratio = _ratio(amax, whole)
        r.add_(gram.double() * (ratio * ratio))
    with torch.autocast(r.device.type, enabled=False):
        scale = inverse_norm(r, halves.schedule)
        scaled = (r * (scale * scale)).to(dtype)
        first = _symmetric(_transform(scaled, halves.schedule, halves.first))
        first.mul_(scale.to(dtype))
        wide = first.double()
        # Not of the exact first half, but of the one that will be applied: what rounding did to it
        # is then part of the matrix that the second half starts from. Only the second product is
        # symmetric by construction; the first would lose that to rounding.
        fresh = symmetric_product(product(wide, r), wide)
        second = _symmetric(_transform(fresh.to(dtype), halves.schedule, halves.second))
    return Transform(first, second, whole)


@torch.no_grad()
def apply_transform(part: PartGram, transform: Transform) -> Tensor:
    """One part of the result.

    Args:
        part: from `part_gram`.
        transform: from `find_transform`.

    Returns:
        [m, w] float32, in the memory order of `part.scaled`.
    """
    x = (part.scaled * _ratio(part.largest, transform.largest)).to(transform.first.dtype)
    with torch.autocast(x.device.type, enabled=False):
        for factor in (transform.first, transform.second):
            # From the other side where that keeps the memory order: the factors are symmetric.
            x = product(factor, x) if x.stride(-1) == 1 else product(x.mT, factor).mT
    return x.float()


def _transform(r: Tensor, schedule: AnySchedule, triples: Sequence[Triple]) -> Tensor:
    """Some steps of a schedule as a matrix, from the Gram matrix before them."""
    if isinstance(schedule, Rational):
        return halley.transform(r, triples)
    return newton_schulz.gram_transform(r, triples)


def _ratio(largest: Tensor, whole: Tensor) -> Tensor:
    """How much a part's own power of two is above the whole's: a power of two, at most 1."""
    return power_of_two(whole) / power_of_two(largest)


def _symmetric(q: Tensor) -> Tensor:
    return (q + q.mT).mul_(0.5)

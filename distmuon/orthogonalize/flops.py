"""How many operations the matrix products of an orthogonalization take, in the form it really has.

A multiplication and an addition count as two. Symmetric products that are cut into panels, or
computed by a GPU kernel in tiles, count what those do, which is a little over half. What is
elementwise is not counted.

LAPACK's inverse of a symmetric m x m matrix counts m³, which torch's counter leaves out. A new form
needs a branch here and a case in the test, which compares these counts with that counter.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch

from distmuon.kernels import symmetric
from distmuon.orthogonalize import policy, products, stability
from distmuon.orthogonalize.coefficients import Coefficients
from distmuon.orthogonalize.policy import Form
from distmuon.orthogonalize.schedule import Rational, Schedule
from distmuon.orthogonalize.stability import Arithmetic, Halves


def count_flops(
    shape: Sequence[int],
    *,
    coefficients: Coefficients = "auto",
    steps: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device,
) -> int:
    """Operations of `orthogonalize` on one float32 matrix, with method "auto".

    Args:
        shape: (m, n), in either orientation.
        coefficients: as in `orthogonalize`.
        steps: likewise.
        dtype: likewise, of the products.
        device: where they run; it decides the form and whether products are cut.

    Returns:
        A count.

    Raises:
        TypeError: as in `orthogonalize`.
        ValueError: as in `orthogonalize`.
    """
    m, n = sorted(shape)
    schedule = policy.for_device(
        coefficients, steps, method="auto", requested=dtype, device=device, shape=shape
    )
    if isinstance(schedule, Rational):
        square, long = (_symmetric(m, k, device.type) for k in (m, n))
        count, inverses = _rational_transform(schedule.steps)
        return long + count * square + inverses * m**3 + 2 * m * m * n
    # Of this shape and device, without its memory.
    like = torch.empty((), device=device).expand(m, n)
    work = policy.working_dtype(like, "auto", dtype, schedule)
    precision = policy.arithmetic(work, device)
    form = policy.choose_form(like, schedule, precision)
    square, long = (_symmetric(m, k, device.type) for k in (m, n))
    by_kernel = [symmetric.computed_entries(m, k, work, device) for k in (m, n)]
    if by_kernel[0] is not None:
        square = 2 * by_kernel[0] * m
    if by_kernel[1] is not None:
        long = 2 * by_kernel[1] * n
    counts = _products(schedule, form, precision)
    return counts.long * long + counts.square * square + counts.rectangular * 2 * m * m * n


class _Products(NamedTuple):
    """How many there are of X Xᵀ, of m x m ones, and of those that give an X."""

    long: int
    square: int
    rectangular: int


@cache
def _products(schedule: Schedule, form: Form, precision: Arithmetic) -> _Products:
    if form == "gram":
        windows = stability.windows(schedule, precision)
        return _Products(len(windows), sum(_transform(len(w)) for w in windows), len(windows))
    # R = X Xᵀ, its square, and the factor times X, in every step.
    return _Products(schedule.steps, schedule.steps, schedule.steps)


def count_part_flops(short: int, width: int, halves: Halves | None, device: torch.device) -> int:
    """Operations of one rank for its part of a matrix that several ranks share.

    Args:
        short: the matrix's shorter side, m.
        width: the part's share of the longer one.
        halves: the schedule, for the rank that finds the transform; None for the others.
        device: where the products run.

    Returns:
        A count: the part's Gram matrix, both factors times the part, and the transform.
    """
    flops = _symmetric(short, width, device.type) + 2 * (2 * short * short * width)
    if halves is not None:
        square = _symmetric(short, short, device.type)
        flops += square + 2 * short**3
        for steps in (len(halves.first), len(halves.second)):
            if isinstance(halves.schedule, Rational):
                count, inverses = _rational_transform(steps)
            else:
                count, inverses = _transform(steps), 0
            flops += count * square + inverses * short**3
    return flops


def _transform(steps: int) -> int:
    """Symmetric products of `gram_transform`: one in its first step, four in each other."""
    return 4 * steps - 3 if steps else 0


def _rational_transform(steps: int) -> tuple[int, int]:
    """Symmetric products of `halley.transform`, and its inverses."""
    return max(2 * steps - 2, 0), steps


def _symmetric(m: int, k: int, device_type: str) -> int:
    """Operations of `symmetric_product` of [m, k] and [k, m]."""
    if device_type != "cpu" or m < products.SMALLEST_CUT:
        return 2 * m * m * k
    starts = range(0, m, products.PANEL)
    stops = [min(start + products.PANEL, m) for start in starts]
    return sum(2 * (stop - start) * stop * k for start, stop in zip(starts, stops, strict=True))

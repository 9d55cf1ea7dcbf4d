"""Which schedules survive rounding, in which dtype, and where the Gram form must start anew."""

from __future__ import annotations

import math
from functools import cache
from typing import Literal, NamedTuple, TypeAlias

import torch

from distmuon.errors import see
from distmuon.orthogonalize.schedule import AnySchedule, Schedule, Triple

Arithmetic: TypeAlias = Literal["float64", "float32", "tf32", "float16", "bfloat16"]

# How far one rounded step may push the largest singular value past its exact place.
_OVERSHOOT: dict[Arithmetic, float] = {
    "float64": 1e-12,
    "float32": 1e-6,
    "tf32": 4e-3,
    "float16": 4e-3,
    "bfloat16": 1e-2,
}
# Size of the spurious eigenvalues, some of them negative, of a computed X Xᵀ of norm 1.
_SPURIOUS: dict[Arithmetic, float] = {
    "float64": 1e-15,
    "float32": 1e-7,
    "tf32": 4e-4,
    "float16": 4e-4,
    "bfloat16": 4e-3,
}
_SPURIOUS_LIMIT = 0.5
_LARGEST = 1.5
_GRID = 4001


def check(schedule: Schedule, arithmetic: Arithmetic) -> None:
    """Refuse a schedule that would blow up or turn a direction around.

    Follows the interval of possible singular values through the steps, each widened by rounding.

    Args:
        schedule: what to check.
        arithmetic: precision of the products.

    Raises:
        ValueError: a singular value could pass 1.5 at the end, or become zero or negative.
    """
    problem = _problem(schedule, arithmetic)
    if problem:
        raise ValueError(
            f"Invalid coefficients: schedule {schedule.name!r} {problem} in {arithmetic}. Deflate "
            "it (a/s, b/s**3, c/s**5 with s = 1.02), give the norm it was made for, or take "
            "`coefficients.generate(lower, steps)`." + see("unsafe-coefficients")
        )


@cache
def _problem(schedule: Schedule, arithmetic: Arithmetic) -> str:
    grid = torch.linspace(0.0, 1.0, _GRID, dtype=torch.float64)[1:]
    widening = 1 + _OVERSHOOT[arithmetic]
    top = widening / schedule.safety
    for step, (a, b, c) in enumerate(schedule.coefficients):
        square = (grid * top) ** 2
        # The factor, not the value: its sign says whether the direction is kept.
        factor = a + square * (b + square * c)
        if not bool((factor > 0).all()):
            return f"turns singular values to zero or negative in step {step + 1}"
        top = float((factor * grid).max()) * top * widening
        if not math.isfinite(top) or top > 1e3:
            return f"lets singular values grow past 1000 by step {step + 1}"
    return f"lets singular values grow to {top:.3g}" if top > _LARGEST else ""


@cache
def windows(schedule: Schedule, arithmetic: Arithmetic) -> tuple[tuple[Triple, ...], ...]:
    """Cut a schedule where the Gram form must form X Xᵀ anew.

    A spurious eigenvalue of size d grows by a**2 each step that is done on the Gram matrix alone,
    so a window of steps with slopes a, b, ... stays harmless while d * (a * b * ...)**2 < 1/2.

    Args:
        schedule: coefficients.
        arithmetic: precision of the products.

    Returns:
        The coefficients, cut into the fewest such windows from the left.

    Raises:
        ValueError: no window can hold even two steps, or one step alone is past the limit: the
            Gram form has no advantage then, and the plain form no such problem.
    """
    limit = math.sqrt(_SPURIOUS_LIMIT / _SPURIOUS[arithmetic])
    cut: list[list[Triple]] = []
    growth = math.inf
    for triple in schedule.coefficients:
        slope = abs(triple[0])
        if slope >= limit:
            raise ValueError(_refusal(schedule, arithmetic) + see("unsafe-coefficients"))
        if growth * slope >= limit:
            cut.append([])
            growth = 1.0
        cut[-1].append(triple)
        growth *= slope
    if len(cut) == schedule.steps > 1 or arithmetic == "bfloat16":
        raise ValueError(_refusal(schedule, arithmetic) + see("unsafe-coefficients"))
    return tuple(tuple(window) for window in cut)


class Halves(NamedTuple):
    """A schedule, cut in two.

    Attributes:
        schedule: the whole.
        first: its first coefficients, at least one triple.
        second: the others; may be none.
    """

    schedule: AnySchedule
    first: tuple[Triple, ...]
    second: tuple[Triple, ...]


@cache
def halves(schedule: AnySchedule, *, gram: Arithmetic, products: Arithmetic) -> Halves:
    """Cut a schedule for a Gram matrix that is formed only once, as a sum over several places.

    Args:
        schedule: coefficients.
        gram: precision of that Gram matrix.
        products: precision of the products that iterate on it.

    Returns:
        The halves whose products of slopes are the most alike.

    Raises:
        ValueError: rounding errors of the Gram matrix over the whole schedule, or of the products
            over one half, would be amplified past the result.
    """
    slopes = [abs(a) for a, _, _ in schedule.coefficients]
    cut = min(
        range(1, schedule.steps + 1),
        key=lambda i: max(math.prod(slopes[:i]), math.prod(slopes[i:])),
    )
    steepest = max(math.prod(slopes[:cut]), math.prod(slopes[cut:]))
    for growth, precision in ((math.prod(slopes), gram), (steepest, products)):
        if growth**2 * _SPURIOUS[precision] >= _SPURIOUS_LIMIT:
            raise ValueError(
                f"Invalid coefficients for a split matrix: schedule {schedule.name!r} would "
                f"amplify the rounding errors of a {precision} Gram matrix past the result. Use "
                "split_dtype='float64', a schedule with smaller slopes, or split no matrix."
                + see("unsafe-coefficients")
            )
    coefficients = schedule.coefficients
    return Halves(schedule, coefficients[:cut], coefficients[cut:])


def check_without_restart(schedule: Schedule, arithmetic: Arithmetic) -> None:
    """Refuse what only restarts would keep stable, for the form that has none.

    Args:
        schedule: coefficients.
        arithmetic: precision of the products.

    Raises:
        ValueError: `windows` cuts the schedule, or refuses it.
    """
    if len(windows(schedule, arithmetic)) > 1:
        raise ValueError(_refusal(schedule, arithmetic) + see("unsafe-coefficients"))


def _refusal(schedule: Schedule, arithmetic: Arithmetic) -> str:
    return (
        f"Invalid method for schedule {schedule.name!r} in {arithmetic}: iterating on the Gram "
        "matrix would amplify its rounding errors past the result. Use method='newton_schulz', or "
        "dtype=torch.float32 or torch.float64."
    )

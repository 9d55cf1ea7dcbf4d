"""The public functions: validation, scaling, dispatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from distmuon.errors import see
from distmuon.orthogonalize import policy, stability
from distmuon.orthogonalize.coefficients import Coefficients
from distmuon.orthogonalize.pipeline import EXACT, NonFinite, Plan, Polar, polar_batch, polar_each
from distmuon.orthogonalize.policy import Method
from distmuon.orthogonalize.schedule import Schedule

_METHODS: tuple[str, ...] = get_args(Method)
_INPUT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Orthogonalized(NamedTuple):
    """A result and which of its matrices had only finite entries.

    Attributes:
        update: [..., m, n] in the input's dtype.
        finite: bool [...], on the input's device; nothing waits for it.
    """

    update: Tensor
    finite: Tensor


def orthogonalize(
    x: Tensor,
    *,
    method: Method = "auto",
    coefficients: Coefficients = "auto",
    steps: int | None = None,
    dtype: torch.dtype | None = None,
    nonfinite: NonFinite = "propagate",
    largest: Tensor | None = None,
) -> Tensor:
    """Approximate polar factor U Vᵀ of each matrix U S Vᵀ.

    The result depends on the matrix's values alone: bitwise not on its scale by powers of two, its
    memory layout or its alignment. On CPUs, to the bit, a batch is a loop over its matrices, and
    the transpose of a matrix that is not square gives the transposed result.

    Args:
        x: [..., m, n], float64, float32, float16 or bfloat16. Never modified.
        method: "newton_schulz" iterates on the matrix, "gram" on its m x m Gram matrix, "auto"
            takes the faster of the two that is stable; "coupled" is their textbook reference.
            "svd" and "eigh" are exact and leave `coefficients` aside.
        coefficients: "auto", a preset's name, a schedule, one (a, b, c) repeated `steps` times, or
            one (a, b, c) a step. "auto" is the faster of two that are about equally exact: the
            quintic "p5" or, for larger matrices on a CPU, the rational "halley"; see
            `policy.for_device`.
        steps: number of steps; None takes the schedule's own.
        dtype: dtype of the matrix products; None chooses by input and device, see
            `policy.working_dtype`.
        nonfinite: what a matrix with a NaN or an infinity gives: "propagate" NaNs, "zero" zeros.
        largest: [...] in float32, the largest absolute entry of each matrix, NaN if one is NaN,
            from who has just seen them all: a pass over x is spared. None to look.

    Returns:
        [..., m, n] in x's dtype, contiguous. A zero matrix gives zeros.

    Raises:
        TypeError: x is not a dense real floating tensor, or an argument has a wrong type.
        ValueError: x has fewer than two dimensions or no elements, an argument is out of range, or
            the schedule would blow up.

    Source: https://kellerjordan.github.io/posts/muon/; docs/numerics.md
    """
    return orthogonalize_checked(
        x,
        method=method,
        coefficients=coefficients,
        steps=steps,
        dtype=dtype,
        nonfinite=nonfinite,
        largest=largest,
    ).update


@torch.no_grad()
def orthogonalize_checked(
    x: Tensor,
    *,
    method: Method = "auto",
    coefficients: Coefficients = "auto",
    steps: int | None = None,
    dtype: torch.dtype | None = None,
    nonfinite: NonFinite = "propagate",
    largest: Tensor | None = None,
) -> Orthogonalized:
    """`orthogonalize`, and a flag for each matrix that says whether its entries were finite.

    Args:
        x: as in `orthogonalize`.
        method: likewise.
        coefficients: likewise.
        steps: likewise.
        dtype: likewise.
        nonfinite: likewise.
        largest: likewise.

    Returns:
        The result and the flags.

    Raises:
        TypeError: as in `orthogonalize`.
        ValueError: as in `orthogonalize`.
    """
    _check_input(x)
    _check_choices(method, nonfinite, steps)
    plan = _make_plan(x, method, coefficients, steps, dtype, nonfinite)
    # Under autocast every product here would silently become a bfloat16 one.
    with torch.autocast(x.device.type, enabled=False):
        known = None if largest is None else largest.reshape(-1, 1, 1)
        update, finite = polar_batch(x.reshape(-1, *x.shape[-2:]), plan, known)
    return Orthogonalized(update.reshape(x.shape), finite.reshape(x.shape[:-2]))


@torch.no_grad()
def orthogonalize_each(
    matrices: Sequence[Tensor],
    *,
    coefficients: Coefficients = "auto",
    steps: int | None = None,
    dtype: torch.dtype | None = None,
    largest: Sequence[Tensor | None],
) -> Polar:
    """`orthogonalize` of equal matrices in memory apart, without the last pass over the results.

    Args:
        matrices: [m, n] each, of one shape, dtype and device; at most `stack_numel` entries in all,
            or a single one. Never modified.
        coefficients: as in `orthogonalize`.
        steps: likewise.
        dtype: likewise.
        largest: of each matrix [1] in float32, its largest absolute entry; None to look.

    Returns:
        [count, m, n] and what they are still to be multiplied by.

    Raises:
        TypeError: as in `orthogonalize`.
        ValueError: likewise.
    """
    _check_input(matrices[0])
    plan = _make_plan(matrices[0], "auto", coefficients, steps, dtype, "propagate")
    with torch.autocast(matrices[0].device.type, enabled=False):
        return polar_each(matrices, plan, largest)


def _make_plan(
    x: Tensor,
    method: Method,
    coefficients: Coefficients,
    steps: int | None,
    dtype: torch.dtype | None,
    nonfinite: NonFinite,
) -> Plan:
    schedule = policy.for_device(
        coefficients, steps, method=method, requested=dtype, device=x.device, shape=x.shape
    )
    work = policy.working_dtype(x, method, dtype, schedule)
    if method not in EXACT and isinstance(schedule, Schedule):
        stability.check(schedule, policy.arithmetic(work, x.device))
    if method == "coupled" and isinstance(schedule, Schedule):
        stability.check_without_restart(schedule, policy.arithmetic(work, x.device))
    return Plan(method, schedule, work, nonfinite)


def _check_input(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(
            f"Invalid x of type {type(x).__name__}. Must be one torch.Tensor of shape [..., m, n]."
            + see("bad-tensor")
        )
    if x.layout != torch.strided:
        raise TypeError(
            f"Invalid x of layout {x.layout}. Must be dense: pass x.to_dense()." + see("bad-tensor")
        )
    if x.dtype not in _INPUT_DTYPES:
        raise TypeError(
            f"Invalid x of dtype {x.dtype}. Must be float64, float32, float16 or bfloat16: "
            "pass x.float(), or the real and imaginary parts apart." + see("bad-tensor")
        )
    if x.dim() < 2:
        raise ValueError(
            f"Invalid x of shape {list(x.shape)}. Must be [..., m, n]: vectors have no polar "
            "factor and belong to AdamW." + see("bad-tensor")
        )
    if x.numel() == 0:
        raise ValueError(
            f"Invalid x of shape {list(x.shape)}. Must have at least one element."
            + see("bad-tensor")
        )


def _check_choices(method: str, nonfinite: str, steps: int | None) -> None:
    if method not in _METHODS:
        raise ValueError(
            f"Unknown {method=}. Must be one of {', '.join(_METHODS)}." + see("bad-option")
        )
    if nonfinite not in get_args(NonFinite):
        raise ValueError(
            f"Unknown {nonfinite=}. Must be 'propagate' or 'zero'." + see("bad-option")
        )
    if method in EXACT and steps is not None:
        raise ValueError(
            f"Invalid {steps=} for {method=}, which takes none. Pass steps=None."
            + see("bad-option")
        )

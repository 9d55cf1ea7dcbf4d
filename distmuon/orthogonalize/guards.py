"""Range guards without host synchronization: exact scaling, fresh memory, zero stays zero."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distmuon.kernels.elementwise import scale_into


def largest_entry(x: Tensor) -> Tensor:
    """Largest absolute value of each matrix of x [..., m, n], as [..., 1, 1]; NaN if one is NaN."""
    if x.device.type != "cpu":
        # One pass; on CPUs two vectorized ones are faster.
        largest: Tensor = torch.linalg.vector_norm(x, torch.inf, dim=(-2, -1), keepdim=True)
        return largest
    high = x.amax(dim=(-2, -1), keepdim=True)
    return torch.maximum(high, x.amin(dim=(-2, -1), keepdim=True).neg_())


def is_finite(amax: Tensor) -> Tensor:
    """Whether a largest absolute value is finite, in one operation: NaN compares false."""
    return amax < torch.inf


def power_of_two(amax: Tensor) -> Tensor:
    """The power of two 1/2 <= p * amax < 1, as far as p and 1/p are normal numbers of amax's dtype.

    Args:
        amax: [..., 1, 1], >= 0. Not a half-precision dtype.

    Returns:
        [..., 1, 1] in amax's dtype. At both ends of the exponent range a power that brings amax
        within a factor of the dtype's resolution of 1; NaN where amax is not finite.
    """
    smallest = torch.finfo(amax.dtype).tiny
    # An exact quotient: the mantissa differs from its number by a power of two. `ldexp` would go
    # through pow(), which is not exact on every device.
    bounded = amax.clamp(smallest, 1 / smallest)
    power = torch.frexp(bounded).mantissa.div_(bounded)
    # inf * 0 and NaN * 0 are NaN.
    return power.add_(amax * 0)


def prescale(
    x: Tensor, amax: Tensor, dtype: torch.dtype | None = None, below: float = 1.0
) -> Tensor:
    """Copy x into fresh contiguous memory, its largest entry brought near 1 by a power of two.

    Everything computed from the copy is independent of the input's memory: matrix products round
    differently for differently aligned operands. It is also independent of the input's scale,
    since powers of two are exact, and its Gram matrix can neither overflow nor vanish.

    Args:
        x: [..., m, n] floating point. Not modified.
        amax: [..., 1, 1], the largest absolute value of each matrix.
        dtype: Of the result, rounded to once; None for one without rounding.
        below: What the largest entries stay below, and are at least half of: a power of two.

    Returns:
        [..., m, n] contiguous, by default in float32 or, for a float64 input, float64. Zero where
        amax is zero, NaN where amax is not finite.
    """
    wide = _without_rounding(x)
    out = torch.empty(x.shape, dtype=dtype or wide, device=x.device)
    return scale_into(x, _power(amax.to(wide), below), out)


def prescale_each(
    matrices: Sequence[Tensor], amax: Tensor, dtype: torch.dtype | None = None, below: float = 1.0
) -> Tensor:
    """`prescale` equal matrices that are apart into one stack, in a pass over each.

    Args:
        matrices: [m, n] each. Not modified.
        amax: [count, 1, 1].
        dtype: As in `prescale`.
        below: Likewise.

    Returns:
        [count, m, n] contiguous.
    """
    wide = _without_rounding(matrices[0])
    shape = len(matrices), *matrices[0].shape
    out = torch.empty(shape, dtype=dtype or wide, device=amax.device)
    for x, power, place in zip(matrices, _power(amax.to(wide), below), out, strict=True):
        scale_into(x, power, place)
    return out


def _without_rounding(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _power(amax: Tensor, below: float) -> Tensor:
    power = power_of_two(amax)
    # Zero times an infinite power would be NaN.
    return power if below == 1.0 else power.mul_(below).clamp_(max=1 / torch.finfo(amax.dtype).tiny)


def nonzero(norm: Tensor) -> Tensor:
    """`norm` with ones for zeros, so that 0 / norm is 0. An added eps would bias small matrices."""
    return torch.where(norm == 0, torch.ones_like(norm), norm)

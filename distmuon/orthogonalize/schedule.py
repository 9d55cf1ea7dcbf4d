"""What a coefficient schedule is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from distmuon.errors import see

Triple: TypeAlias = tuple[float, float, float]
Normalization: TypeAlias = Literal["frobenius", "schatten4"]


@dataclass(frozen=True, slots=True)
class Schedule:
    """One odd quintic per step, and the normalization that it was made for.

    Attributes:
        name: the preset's name, or "custom".
        coefficients: one (a, b, c) per step: a singular value s becomes a*s + b*s**3 + c*s**5.
        normalization: the norm that divides the matrix first. Both bound the largest singular
            value from above: "frobenius" is the root of the sum of their squares, "schatten4" the
            fourth root of the sum of their fourth powers, which is closer.
        safety: factor on that norm, >= 1; above 1 it leaves room for rounding.
        source: where the numbers come from.
    """

    name: str
    coefficients: tuple[Triple, ...]
    normalization: Normalization
    safety: float
    source: str

    def __post_init__(self) -> None:
        """Refuse a schedule without steps or with a safety factor that would overshoot.

        Raises:
            ValueError: no coefficients, an unknown normalization, or safety below 1.
        """
        if not self.coefficients:
            raise ValueError(
                "Invalid coefficients=(). A schedule needs at least one (a, b, c)."
                + see("bad-option")
            )
        if self.normalization not in ("frobenius", "schatten4"):
            raise ValueError(
                f"Invalid normalization={self.normalization!r}. Must be 'frobenius' or 'schatten4'."
                + see("bad-option")
            )
        if not 1.0 <= self.safety < 2.0:
            raise ValueError(
                f"Invalid safety={self.safety}. Must be in [1, 2)." + see("bad-option")
            )

    @property
    def steps(self) -> int:
        """Number of Newton-Schulz steps."""
        return len(self.coefficients)

    def image(self, s: Tensor) -> Tensor:
        """What the steps make of singular values [...] that are at most 1."""
        for a, b, c in self.coefficients:
            s = s * (a + s**2 * (b + s**2 * c))
        return s


@dataclass(frozen=True, slots=True)
class Rational:
    """One rational function per step, and the normalization that it was made for.

    Attributes:
        name: the preset's name.
        coefficients: one (a, b, c) per step, all positive: a singular value s becomes
            s * (a + b*s**2) / (1 + c*s**2).
        normalization: as in `Schedule`.
        safety: likewise.
        source: where the numbers come from.
    """

    name: str
    coefficients: tuple[Triple, ...]
    normalization: Normalization
    safety: float
    source: str

    def __post_init__(self) -> None:
        """Refuse weights with which a step could have a pole or turn a direction around.

        Raises:
            ValueError: no weights, or one that is not positive and finite.
        """
        values = [value for triple in self.coefficients for value in triple]
        if not values or not all(0.0 < value < math.inf for value in values):
            raise ValueError(
                f"Invalid coefficients={self.coefficients!r}. Each step of a rational schedule "
                "needs three positive finite numbers (a, b, c)." + see("bad-option")
            )

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.coefficients)

    def image(self, s: Tensor) -> Tensor:
        """What the steps make of singular values [...] that are at most 1."""
        for a, b, c in self.coefficients:
            s = s * (a + b * s**2) / (1 + c * s**2)
        return s


AnySchedule: TypeAlias = Schedule | Rational


def evaluate(triple: Triple, s: float) -> float:
    """a*s + b*s**3 + c*s**5 for one singular value."""
    a, b, c = triple
    square = s * s
    return s * (a + square * (b + square * c))

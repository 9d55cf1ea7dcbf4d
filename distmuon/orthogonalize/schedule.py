"""What a coefficient schedule is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

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
            raise ValueError("Invalid coefficients=(). A schedule needs at least one (a, b, c).")
        if self.normalization not in ("frobenius", "schatten4"):
            raise ValueError(
                f"Invalid normalization={self.normalization!r}. Must be 'frobenius' or 'schatten4'."
            )
        if not 1.0 <= self.safety < 2.0:
            raise ValueError(f"Invalid safety={self.safety}. Must be in [1, 2).")

    @property
    def steps(self) -> int:
        """Number of Newton-Schulz steps."""
        return len(self.coefficients)


def evaluate(triple: Triple, s: float) -> float:
    """a*s + b*s**3 + c*s**5 for one singular value."""
    a, b, c = triple
    square = s * s
    return s * (a + square * (b + square * c))

"""Matrices with known singular values, and the exact polynomial of them in float64."""

import torch
from torch import Tensor

from distmuon.orthogonalize.schedule import AnySchedule

SPECTRA = (
    "flat",
    "power_law",
    "condition_1e2",
    "condition_1e4",
    "condition_1e8",
    "rank_1",
    "rank_8",
    "two_levels",
    "uniform",
)


def singular_values(kind: str, count: int) -> Tensor:
    """[count] float64, descending, the largest 1."""
    index = torch.arange(1, count + 1, dtype=torch.float64)
    if kind.startswith("condition_"):
        exponent = torch.log10(torch.tensor(float(kind.removeprefix("condition_"))))
        return torch.logspace(0, -float(exponent), count, dtype=torch.float64)
    if kind.startswith("rank_"):
        return (index <= int(kind.removeprefix("rank_"))).double()
    return {
        "flat": torch.ones_like(index),
        "power_law": 1 / index,
        "two_levels": torch.where(index <= count / 2, 1.0, 1e-3).double(),
        "uniform": torch.linspace(1.0, 1 / count, count, dtype=torch.float64),
    }[kind]


def image(s: Tensor, schedule: AnySchedule) -> Tensor:
    """[k] float64, what a schedule makes of the singular values s [k] of a matrix."""
    power = 2 if schedule.normalization == "frobenius" else 4
    return schedule.image(s / (s.pow(power).sum().pow(1 / power) * schedule.safety))


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """[rows, columns] float64 with orthonormal columns, rows >= columns."""
    square = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(square).Q
    return basis


class Known:
    """A matrix U diag(s) Vᵀ in float64 with its parts."""

    def __init__(self, m: int, n: int, kind: str, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        rank = min(m, n)
        self.u = orthonormal(m, rank, generator)
        self.v = orthonormal(n, rank, generator)
        self.s = singular_values(kind, rank)
        self.matrix = (self.u * self.s) @ self.v.T

    def image(self, schedule: AnySchedule) -> Tensor:
        """[m, n], the schedule's function of the singular values."""
        return (self.u * image(self.s, schedule)) @ self.v.T

    def polar(self) -> Tensor:
        """[m, n], U Vᵀ over the nonzero singular values."""
        return (self.u * (self.s > 0).double()) @ self.v.T


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`."""
    difference = torch.linalg.matrix_norm(actual.double() - expected)
    return float(difference / torch.linalg.matrix_norm(expected))


def largest_singular_value(x: Tensor) -> float:
    """The largest over a batch, infinity if an entry is not finite.

    Of x times its transpose, in float64: as exact as the singular values themselves, for the
    largest one, and a good deal faster.
    """
    if not bool(x.isfinite().all()):
        return float("inf")
    wide = x.double()
    gram = wide @ wide.mT if x.size(-2) <= x.size(-1) else wide.mT @ wide
    return float(torch.linalg.eigvalsh(gram).amax().clamp(min=0).sqrt())

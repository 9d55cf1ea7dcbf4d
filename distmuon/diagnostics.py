"""What a step did to the weights, in figures: how large, how orthogonal, from which gradients.

Pure: sums over one rank's range and the spectra of matrices that an owner has in its hands. The
engine adds them up over the ranks (observer.py).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

# Matrices whose spectrum is measured each time; the next ones follow the next time.
SAMPLES = 4


@dataclass(frozen=True, slots=True)
class GroupDiagnostics:
    """One parameter group in one step, over all ranks.

    Attributes:
        group: Its index in `param_groups`.
        algorithm: Its update rule.
        numel: Elements that were updated.
        lr: Learning rate of the step.
        gradient_norm: Norm of the averaged gradient as the step used it, after clipping.
        update_rms: Root mean square of the update before it is multiplied by `lr`; weight decay is
            no part of it. With `adjust_lr_fn="match_rms_adamw"` Muon's is 0.2 at full rank.
        weight_rms: Root mean square of the weights after the step.
    """

    group: int
    algorithm: str
    numel: int
    lr: float
    gradient_norm: float
    update_rms: float
    weight_rms: float

    @property
    def ratio(self) -> float:
        """Update RMS over weight RMS; NaN where all weights are zero."""
        return self.update_rms / self.weight_rms if self.weight_rms else math.nan

    @property
    def effective_lr(self) -> float:
        """`lr` times `ratio`: by what share of their size the step moved the weights."""
        return self.lr * self.ratio


@dataclass(frozen=True, slots=True)
class MatrixDiagnostics:
    """The orthogonalized momentum of one sampled matrix, before it is scaled for its shape.

    Attributes:
        name: Its FQN; of a stack, with the number of the matrix.
        owner: Rank that orthogonalized it.
        orthogonality_error: `norm(Q Qᵀ - I) / sqrt(m)`, m the shorter side: the root mean square of
            s² - 1 over the singular values s. 1 for a zero matrix.
        least: Smallest singular value; near 0 where the momentum lacks rank.
        median: Their median.
        most: Largest.
    """

    name: str
    owner: int
    orthogonality_error: float
    least: float
    median: float
    most: float


@dataclass(frozen=True, slots=True)
class Diagnostics:
    """One step, over all ranks; the same on each of them.

    Attributes:
        step: How often the parameters have been updated, with this step. AdamW's loaded state, or a
            checkpoint of `distmuon.checkpoint`, brings its count along.
        gradient_norms: As `GroupDiagnostics.gradient_norm`, over all groups of an algorithm.
        groups: Each parameter group that was updated.
        matrices: Some of Muon's matrices, others each time.
        owner_flops: Operations of Newton-Schulz that each rank did in this step.
    """

    step: int
    gradient_norms: Mapping[str, float]
    groups: tuple[GroupDiagnostics, ...]
    matrices: tuple[MatrixDiagnostics, ...]
    owner_flops: tuple[int, ...]


class Spectrum(NamedTuple):
    """Of one matrix; see `MatrixDiagnostics`."""

    orthogonality_error: float
    least: float
    median: float
    most: float


class Probe:
    """Looks at nothing: what every step calls when nobody has asked."""

    def look(self, matrix: int, polar: Tensor, scale: Tensor | None = None) -> None:
        """See a matrix that its owner has just orthogonalized.

        Args:
            matrix: Its index in the layout.
            polar: [m, n], not yet scaled for its shape; not to be changed or kept.
            scale: [1, 1] in float32, what it is still to be multiplied by; None for 1.
        """


class SpectrumProbe(Probe):
    """Measures the matrices that were picked."""

    def __init__(self, picked: Collection[int]) -> None:
        """Wait for them.

        Args:
            picked: Indices in the layout.
        """
        self._picked = picked
        self.found: dict[int, Spectrum] = {}

    @override
    def look(self, matrix: int, polar: Tensor, scale: Tensor | None = None) -> None:
        if matrix in self._picked:
            self.found[matrix] = measure_spectrum(polar if scale is None else polar * scale)


def measure_spectrum(polar: Tensor) -> Spectrum:
    """Singular values of a matrix, from the eigenvalues of its Gram matrix in float64.

    Args:
        polar: [m, n], either orientation. Not modified.

    Returns:
        NaNs where an entry is not finite or the decomposition fails: looking must not stop a run.
    """
    x = polar.double()
    x = x if x.size(0) <= x.size(1) else x.mT
    gram = x @ x.mT
    try:
        squares = torch.linalg.eigvalsh(gram).clamp_(min=0.0)
    except RuntimeError:  # LinAlgError is one
        return Spectrum(math.nan, math.nan, math.nan, math.nan)
    error = (squares - 1).square().mean().sqrt()
    values = torch.stack([error, *(squares[[0, len(squares) // 2, -1]]).sqrt()])
    return Spectrum(*values.tolist())


def square_sum(x: Tensor) -> Tensor:
    """Sum of squares in float64, without a copy of x; a scalar that nothing waits for."""
    norm: Tensor = torch.linalg.vector_norm(x, dtype=torch.float64)
    return norm.square()

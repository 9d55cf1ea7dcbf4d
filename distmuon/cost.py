"""What work and messages cost, so that owners and layouts can be compared before anything runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from distmuon.errors import see
from distmuon.layout import TensorSpec


def newton_schulz_cost(shape: Sequence[int], steps: int = 5) -> int:
    """Floating-point operations of quintic Newton-Schulz on a stack of matrices.

    Per step and matrix `A = XXᵀ` and `BX` cost 2m²n each and `A²` 2m³, with m the shorter side.

    Args:
        shape: [..., m, n] in either orientation.
        steps: Number of iterations.

    Returns:
        A count of operations.
    """
    m, n = sorted(shape[-2:])
    return math.prod(shape[:-2]) * steps * (4 * m * m * n + 2 * m**3)


@dataclass(frozen=True, slots=True)
class CostModel:
    """Three rates of a machine, and measured times where the formula is too coarse.

    Used to plan, never to compute: any values give the same parameters, only faster or slower. All
    ranks must be given equal values (compared before the first step).

    Attributes:
        latency: Seconds that one collective takes at least, per doubling of the ranks.
        bandwidth: Bytes per second that one rank sends while it receives as much.
        flops: Operations per second of Newton-Schulz, as `newton_schulz_cost` counts them.
        measured: Seconds that orthogonalizing one matrix takes, by shape (m, n); either
            orientation. Shapes that are not listed follow the formula.

    Raises:
        ValueError: for a value that is not positive and finite.
        TypeError: for a value that is no number.
    """

    latency: float
    bandwidth: float
    flops: float
    measured: Mapping[tuple[int, int], float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Check every value; order the measured shapes, so that equal models look equal."""
        if not isinstance(self.measured, Mapping):
            raise TypeError(
                f"Invalid measured={self.measured!r}. Must be a mapping from (m, n)."
                + see("bad-option")
            )
        rates = {key: getattr(self, key) for key in ("latency", "bandwidth", "flops")}
        times = {f"measured[{shape}]": value for shape, value in self.measured.items()}
        for key, value in {**rates, **times}.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"Invalid {key}={value!r}. Must be a number." + see("bad-option"))
            if not 0.0 < value < math.inf:
                raise ValueError(
                    f"Invalid {key}={value}. Must be > 0 and finite." + see("bad-option")
                )
        ordered = sorted((min(s), max(s), value) for s, value in self.measured.items())
        object.__setattr__(self, "measured", {(m, n): value for m, n, value in ordered})

    def work(self, shape: Sequence[int]) -> int:
        """Cost of orthogonalizing a stack of matrices, as a whole number to balance by.

        Args:
            shape: [..., m, n].

        Returns:
            Operations; for a measured shape those that `flops` does in the measured time.
        """
        m, n = sorted(shape[-2:])
        seconds = self.measured.get((m, n))
        if seconds is None:
            return newton_schulz_cost(shape)
        return math.prod(shape[:-2]) * max(round(seconds * self.flops), 1)

    def works(self, specs: Iterable[TensorSpec]) -> list[int]:
        """Cost of each of many parameters or matrices, of which most look alike.

        Args:
            specs: What is to be orthogonalized, fused matrices block by block.
        """
        known: dict[object, int] = {}
        found = []
        for spec in specs:
            key = spec.shape, spec.axes, spec.blocks
            cost = known.get(key)
            if cost is None:
                cost = known[key] = spec.count * sum(map(self.work, spec.orthogonalized))
            found.append(cost)
        return found

    @property
    def price(self) -> int:
        """Operations that take as long as moving one fp32 element to its owner and back."""
        return round(self.flops * 2 * 4 / self.bandwidth)

    def collective(self, numel: int, itemsize: int, world_size: int) -> float:
        """Seconds of one collective.

        Args:
            numel: Elements that the busiest rank sends or receives.
            itemsize: Bytes of an element.
            world_size: Ranks that take part; a single one sends nothing.

        Returns:
            Latency and transfer, in seconds.
        """
        doublings = (world_size - 1).bit_length()
        return doublings * self.latency + numel * itemsize / self.bandwidth if doublings else 0.0


# [Note: default rates] Measured on 2 cores of an AMD EPYC with gloo between two processes: fp32
# Newton-Schulz at 77 GFLOP/s, an all-to-all of 85 MB in 53 ms. The accelerator's are assumed, those
# of an H100 beside a 400 Gbit/s network card: they have not been measured here.
_DEFAULTS = {
    "cpu": CostModel(latency=1e-4, bandwidth=1.6e9, flops=77e9),
    "cuda": CostModel(latency=2e-5, bandwidth=45e9, flops=400e12),
}


def default_cost_model(device_type: str) -> CostModel:
    """Rates to plan with where none were given.

    Args:
        device_type: "cpu", "cuda" or any other; others are taken for a GPU.

    Returns:
        The model; its values stand in docs/sharding.md.
    """
    return _DEFAULTS.get(device_type, _DEFAULTS["cuda"])

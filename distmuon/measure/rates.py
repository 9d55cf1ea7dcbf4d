"""The three rates of a machine that the planner needs, measured on the ranks themselves."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from distmuon.cost import CostModel, newton_schulz_cost
from distmuon.measure.contest import settle
from distmuon.orthogonalize import orthogonalize

# Large enough that a CPU or a GPU is at its speed, small enough for a minute.
SHAPES = {
    "cpu": ((512, 512), (512, 2048), (1024, 1024)),
    "cuda": ((1024, 4096), (4096, 4096), (4096, 11008)),
}
_PAYLOAD = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}  # bytes that each rank sends in all
_SMALL_REPEATS, _LARGE_REPEATS, _PRODUCT_REPEATS = 200, 9, 5
_WARMUP = 3


@dataclass(frozen=True, slots=True)
class Rates:
    """What was measured; where ranks differ, the slowest one's.

    Attributes:
        latency: Seconds of an empty all-to-all, per doubling of the ranks; None on one rank.
        bandwidth: Bytes per second that a rank sends while it receives as much; None on one rank.
        flops: Operations of Newton-Schulz per second, as `newton_schulz_cost` counts them, over
            all shapes, all ranks at work at once.
        measured: Seconds of one matrix by shape (m, n).
        spread: Slowest over fastest repeat of each measurement, by name.
    """

    latency: float | None
    bandwidth: float | None
    flops: float
    measured: dict[tuple[int, int], float]
    spread: dict[str, float]

    def cost_model(self) -> CostModel | None:
        """For `Muon(cost_model=...)`; None if there was nobody to send to."""
        if self.latency is None or self.bandwidth is None:
            return None
        return CostModel(self.latency, self.bandwidth, self.flops, self.measured)


def measure_rates(
    shapes: Sequence[tuple[int, int]], group: dist.ProcessGroup, device: torch.device
) -> Rates:
    """Measure messages and Newton-Schulz.

    Args:
        shapes: Of the matrices; none for `SHAPES`.
        group: The ranks.
        device: Where the tensors live.

    Returns:
        The rates, the same on every rank.
    """
    chosen = [(min(s), max(s)) for s in shapes] or list(SHAPES[device.type])
    world_size = group.size()
    spread: dict[str, float] = {}
    latency = bandwidth = None
    if world_size > 1:
        # Every rank has one element for each other.
        empty = _exchange(world_size, 1, group, device)
        whole, spread["latency"] = _slowest(empty, _SMALL_REPEATS, group, device)
        latency = whole / (world_size - 1).bit_length()
        each = _PAYLOAD[device.type] // (4 * (world_size - 1))
        full = _exchange(world_size, each, group, device)
        seconds, spread["bandwidth"] = _slowest(full, _LARGE_REPEATS, group, device)
        bandwidth = 4 * each * (world_size - 1) / max(seconds - whole, 1e-9)
    measured = {}
    for shape in chosen:
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
        name = f"{shape[0]}x{shape[1]}"
        measured[shape], spread[name] = _slowest(
            partial(orthogonalize, matrix), _PRODUCT_REPEATS, group, device
        )
    flops = sum(map(newton_schulz_cost, measured)) / sum(measured.values())
    return Rates(latency, bandwidth, flops, measured, spread)


def _exchange(
    world_size: int, each: int, group: dist.ProcessGroup, device: torch.device
) -> Callable[[], object]:
    """An all-to-all of `each` fp32 elements to every other rank, and none to itself."""
    counts = [0 if rank == group.rank() else each for rank in range(world_size)]
    send = torch.zeros(sum(counts), device=device)
    received = torch.empty_like(send)
    return lambda: dist.all_to_all_single(received, send, counts, counts, group=group)


def _slowest(
    action: Callable[[], object], repeats: int, group: dist.ProcessGroup, device: torch.device
) -> tuple[float, float]:
    """Median seconds of the slowest rank, and its slowest over its fastest repeat."""
    taken = []
    for repeat in range(_WARMUP + repeats):
        settle(device)
        if repeat == _WARMUP:
            dist.barrier(group)
        began = time.perf_counter()
        action()
        settle(device)
        if repeat >= _WARMUP:
            taken.append(time.perf_counter() - began)
    mine = statistics.median(taken), max(taken) / min(taken)
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, mine)
    median, spread = max(everyone)
    return float(median), float(spread)

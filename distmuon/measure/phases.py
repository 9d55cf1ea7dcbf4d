"""Where the time of a step goes, on real ranks, for each way of averaging gradients."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from distmuon.measure.contest import Track, settle, with_distmuon
from distmuon.options import Reduce

# A wait is what is left of a message when nothing else is to be done: it travels before, too.
NAMES = {
    "reduce wait": "reduce",
    "gather wait": "gather",
    "newton-schulz": "Newton-Schulz",
    "scatter wait": "scatter",
    "publish wait": "publish",
}


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Milliseconds of each phase of one step, averaged over the measured steps.

    Attributes:
        reduce: Who averaged the gradients.
        step_ms: The whole step, of the slowest rank; forward and backward are not in it.
        phases_ms: By phase, of the rank that spent most in it: "reduce", "gather",
            "Newton-Schulz", "scatter", "publish", and the smaller ones by the names of
            `Report.seconds`. The first and the next two, and "publish", are waiting times.
        mean_ms: The same, averaged over the ranks.
        sent_bytes: By rank 0 in one step.
    """

    reduce: Reduce
    step_ms: float
    phases_ms: dict[str, float]
    mean_ms: dict[str, float]
    sent_bytes: int


def break_down(
    track: Track, reduce: Reduce, group: dist.ProcessGroup, device: torch.device
) -> Breakdown:
    """Measure one way of averaging gradients.

    Args:
        track: What is trained.
        reduce: The way.
        group: The ranks.
        device: Where the model lives.

    Returns:
        The breakdown, the same on every rank.
    """
    case = with_distmuon(track.model(device), group, reduce, profile="phases")
    x = track.batch(device)
    optimizer = case.optimizer
    spent, before = 0.0, optimizer.report()
    for repeat in range(track.warmup + track.repeats):
        if repeat == track.warmup:
            before = optimizer.report()
        dist.barrier(group)
        optimizer.zero_grad()
        case.wrapped(x).square().mean().backward()
        settle(device)
        began = time.perf_counter()
        optimizer.step()
        settle(device)
        spent += (time.perf_counter() - began) * (repeat >= track.warmup)
    after = optimizer.report()
    seconds = {key: value - before.seconds.get(key, 0.0) for key, value in after.seconds.items()}
    sent = sum(after.bytes_sent.values()) - sum(before.bytes_sent.values())
    del case, optimizer
    gc.collect()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (spent, seconds, sent))
    scale = 1e3 / track.repeats
    # Every one of the five is there, also where nothing was waited for.
    keys = [*NAMES, *(key for key in seconds if key not in NAMES)]
    by_phase = {key: [scale * s.get(key, 0.0) for _, s, _ in everyone] for key in keys}
    return Breakdown(
        reduce,
        round(scale * max(total for total, _, _ in everyone), 3),
        {NAMES.get(key, key): round(max(values), 3) for key, values in by_phase.items()},
        {NAMES.get(key, key): round(sum(v) / len(v), 3) for key, v in by_phase.items()},
        everyone[0][2] // track.repeats,
    )

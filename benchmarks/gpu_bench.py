"""How a contest on a GPU is timed and written down."""

from __future__ import annotations

import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

Contestants = dict[str, Callable[[Any], object]]


class Bench(NamedTuple):
    """Where results go and how long there is.

    Attributes:
        device: What is measured.
        out: One JSON line a result.
        deadline: `time.monotonic()` at which no new section starts.
    """

    device: torch.device
    out: Path
    deadline: float

    @property
    def tiny(self) -> bool:
        """Whether this only tests the code."""
        return self.device.type == "cpu"

    def record(self, section: str, **fields: Any) -> None:
        """Write a result down and show it."""
        line = json.dumps({"section": section, **fields})
        with self.out.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Time of one call, by events where there is a GPU."""
    if device.type == "cpu":
        before = time.perf_counter()
        call()
        return time.perf_counter() - before
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def race(
    contestants: Contestants, inputs: list[Any], device: torch.device, turns: int
) -> dict[str, float]:
    """Median seconds of each contestant; they take turns, over inputs that take turns.

    A contestant that fails is reported and left out.
    """
    times: dict[str, list[float]] = {}
    for name, call in contestants.items():
        try:
            for x in inputs[:2]:
                call(x)
            times[name] = []
        except Exception:
            print(f"{name} failed:\n{traceback.format_exc(limit=3)}", file=sys.stderr)
    for turn in range(turns):
        for name in times:
            x = inputs[turn % len(inputs)]
            times[name].append(seconds(lambda call=contestants[name], x=x: call(x), device))
    return {name: statistics.median(values) for name, values in times.items()}

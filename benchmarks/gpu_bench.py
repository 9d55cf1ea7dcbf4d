"""How a contest on a GPU is timed and written down."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

Contestants = dict[str, Callable[[Any], object]]
YARDSTICK = "bf16 product"
# Clock cycles, about a millisecond, for which the GPU is kept busy before a call.
_HEAD_START = 2_000_000


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
    """Time of one call, by events where there is a GPU.

    The host gets a head start there, as in a training step, whose queue is full: what it takes to
    prepare and launch counts only where the GPU has to wait for it.
    """
    if device.type == "cpu":
        before = time.perf_counter()
        call()
        return time.perf_counter() - before
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_HEAD_START)
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


class Yardstick(NamedTuple):
    """A large bf16 product, which says how fast the chip is while others are measured.

    Attributes:
        call: Computes it; a contestant that takes no notice of its input.
        flops: Operations of a call.
    """

    call: Callable[[Any], Tensor]
    flops: float


def yardstick(bench: Bench) -> Yardstick:
    """The product of two random matrices."""
    size = 64 if bench.tiny else 8192
    a, b = (torch.randn(size, size, device=bench.device).bfloat16() for _ in range(2))
    return Yardstick(lambda _: a @ b, 2.0 * size**3)


def commit() -> str:
    """What is measured; empty where that is no repository, or there is no git."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""

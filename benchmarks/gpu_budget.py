"""What each aim of `make gpu` leaves for the symmetric products. Counted; nothing is measured here.

    python -m benchmarks.gpu_budget [--tflops 788] [--terabytes 4.3]

An aim is a share of the FLOP bound, in time. From that time go the passes over memory, at the
bandwidth, and the products that cuBLAS computes, at its rate. In what is left the symmetric kernel
has to compute its tiles, those across the diagonal whole and the last round as a full one: that is
the rate it needs. One that is known to reach less misses the aim whatever else is done; one that
reaches more may still miss it, by launches and by what is not counted here.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.gpu import GOALS, MOST_OF_ADAMW, TOKENS, llama
from benchmarks.gpu_bench import Bench
from benchmarks.gpu_checks import newton_schulz_flops
from distmuon.kernels.tiles import tile_for
from distmuon.orthogonalize import stability
from distmuon.orthogonalize.coefficients import preset
from distmuon.orthogonalize.policy import choose_form

PROCESSORS = 132
"""Of an H200."""

# Of a float32 stack: its largest entries; scaled to half precision; the result widened.
_BYTES = 4 + (4 + 2) + (2 + 4)
# cuBLAS adds in place: torch copies an X there before each step of the plain form.
_COPY = 2 + 2
# Of a step: each float32 gradient is read into a buffer and looked at; then momentum or AdamW; for
# a matrix its scaling, the way back and the step follow.
_READ, _MOMENTUM, _ADAMW, _APPLY = 8 + 4, 16, 28, 12


class Budget(NamedTuple):
    """Where the time of an aim goes.

    Attributes:
        aim: Seconds of the whole.
        passes: Of those, over memory.
        cublas: In products that are not symmetric.
        kernel_flops: Operations of the symmetric ones, if all processors did what the busiest does.
    """

    aim: float
    passes: float
    cublas: float
    kernel_flops: float

    @property
    def needed(self) -> float:
        """FLOP/s that the symmetric kernel has to reach."""
        return self.kernel_flops / (self.aim - self.passes - self.cublas)


def budget(shape: tuple[int, int, int], share: float, *, rate: float, bandwidth: float) -> Budget:
    """What an aim leaves.

    Args:
        shape: [count, m, n], m <= n.
        share: Of the FLOP bound.
        rate: FLOP/s of cuBLAS.
        bandwidth: Bytes a second.
    """
    count, m, n = shape
    tile, schedule = tile_for(m, batch=count, processors=PROCESSORS), preset("p5")
    rounds = -(-tile.count(m) * count // PROCESSORS)
    computed = rounds * PROCESSORS * tile.rows * tile.cols
    if choose_form(torch.empty(shape, device="meta"), schedule, "float16") == "gram":
        windows = [len(window) for window in stability.windows(schedule, "float16")]
        # One in a window's first step, four in each other; X Xᵀ and Q X in each window.
        square, long = sum(4 * steps - 3 for steps in windows), len(windows)
        moved = _BYTES * m * n + len(windows) * _COPY * m * m
    else:
        square = long = schedule.steps
        moved = (_BYTES + schedule.steps * _COPY) * m * n
    return Budget(
        aim=newton_schulz_flops(m, n, count) / rate / share,
        passes=count * moved / bandwidth,
        cublas=count * long * 2 * m * m * n / rate,
        kernel_flops=2.0 * computed * (square * m + long * n),
    )


def table(*, tflops: float, terabytes: float) -> list[str]:
    """All aims, as lines of Markdown.

    Args:
        tflops: Of a large bf16 product.
        terabytes: A second, of a copy.
    """
    lines = [
        "| stack, share of the bound | aim | passes | cuBLAS | left for sym_gemm | rate it needs |",
        "|---|---|---|---|---|---|",
    ]
    for shape, goal in GOALS.items():
        found = budget(shape, goal.share, rate=1e12 * tflops, bandwidth=1e12 * terabytes)
        left = found.aim - found.passes - found.cublas
        times = (found.aim, found.passes, found.cublas, left)
        needed = found.needed / 1e12
        lines.append(
            f"| {shape[0]} x ({shape[1]} x {shape[2]}), {goal.share:.0%} | "
            + " | ".join(f"{1e3 * t:.2f} ms" for t in times)
            + f" | {needed:.0f} TFLOP/s, {needed / tflops:.0%} of cuBLAS |"
        )
    return lines


def step_table(*, tflops: float, terabytes: float) -> list[str]:
    """The step of the 1.3B model in float32, as lines of Markdown.

    Args:
        tflops: Of a large bf16 product.
        terabytes: A second, of a copy.
    """
    matrices, rest = llama(Bench(torch.device("meta"), Path(), 0.0), torch.float32)
    large, small = (sum(p.numel() for p in group) for group in (matrices, rest))
    adamw = 1e3 * _ADAMW * (large + small) / (1e12 * terabytes)
    flops = sum(newton_schulz_flops(*sorted(p.shape), 1) for p in matrices)
    bound = 1e3 * flops / (1e12 * tflops)
    a_matrix = _READ + _MOMENTUM + (4 + 2) + (2 + 4) + _APPLY
    moved = a_matrix * large + (_READ + _ADAMW) * small
    passes = 1e3 * moved / (1e12 * terabytes)
    whole = bound / 0.7 + passes
    forward_backward = 1e3 * 6 * (large + small) * TOKENS / (1e12 * tflops)
    goal = MOST_OF_ADAMW * adamw + bound
    share = whole / forward_backward
    rows = {
        f"fused AdamW, {_ADAMW} bytes an entry": f"{adamw:.1f} ms",
        "the Newton-Schulz bound": f"{bound:.1f} ms",
        f"the aim, {MOST_OF_ADAMW} times the one and the other": f"{goal:.1f} ms",
        "Newton-Schulz alone at 70% of the bound": f"{bound / 0.7:.1f} ms",
        "at 80%": f"{bound / 0.8:.1f} ms",
        f"passes of a step, {a_matrix} bytes an entry of a matrix": f"{passes:.1f} ms",
        "a step at 70%": f"{whole:.1f} ms",
        "beside a forward and backward pass of 0.5M tokens": f"{share:.1%}",
    }
    return ["| a step, counted | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tflops", type=float, default=788.0, help="of a large bf16 product")
    parser.add_argument("--terabytes", type=float, default=4.3, help="a second, of a copy")
    arguments = parser.parse_args()
    rates = {"tflops": arguments.tflops, "terabytes": arguments.terabytes}
    print(*table(**rates), "", *step_table(**rates), sep="\n")


if __name__ == "__main__":
    main()

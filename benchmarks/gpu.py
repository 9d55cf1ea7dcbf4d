"""Check and measure everything on one GPU: what `make gpu` runs, meant for under eight minutes.

    python -m benchmarks.gpu [--out gpu.jsonl] [--budget 420]
    python -m benchmarks.gpu --device cpu        the same code on small sizes, as the tests run it

Checks first, see gpu_checks.py. Then medians over fresh random inputs, by CUDA events; contestants
of a line take turns. "bound" is the least FLOPs (symmetric products at half) over the rate of a
bf16 product that takes its turns with the contestants. One JSON line a result. A section that would
start after the budget is left out, and said so; one that fails leaves the others as they are.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim._muon import _zeropower_via_newtonschulz

from benchmarks.gpu_bench import (
    YARDSTICK,
    Bench,
    Contestants,
    Yardstick,
    commit,
    race,
    yardstick,
)
from benchmarks.gpu_checks import CHECKS, newton_schulz_flops, run_check
from benchmarks.gpu_rules import CONTESTS, elementwise
from distmuon import Muon
from distmuon.kernels import symmetric
from distmuon.kernels.symmetric import symmetric_backend
from distmuon.kernels.tiles import TILES, Scaled, Tile
from distmuon.orthogonalize import orthogonalize

KELLER = (3.4445, -4.7750, 2.0315)
STACKS = ((24, 1024, 4096), (1, 4096, 4096), (1, 4096, 11008), (384, 2048, 7168))
TINY_STACKS = ((2, 8, 32), (1, 8, 8))
THEIRS = "torch.optim.Muon, bf16 compiled"
GRAM = "gram-newton-schulz"


class Goal(NamedTuple):
    """What is aimed at for one shape.

    Attributes:
        share: Of the FLOP bound.
        faster: Than torch.optim.Muon's compiled Newton-Schulz, by this factor.
    """

    share: float
    faster: float


GOALS = {
    (24, 1024, 4096): Goal(0.59, 1.7),
    (1, 4096, 4096): Goal(0.70, 1.25),
    (1, 4096, 11008): Goal(0.65, 1.7),
    (384, 2048, 7168): Goal(0.65, 1.7),
}
# A step beside fused AdamW's time plus the Newton-Schulz bound; beside a forward and backward pass
# over so many tokens; Newton-Schulz beside gram-newton-schulz.
MOST_OF_ADAMW, TOKENS, MOST_OF_PASSES, MOST_OF_GRAM = 1.15, 500_000, 0.03, 1.1
TRIED_TILES = (
    *TILES,
    Tile(128, 128, 64, warps=8, stages=4),
    Tile(128, 128, 128, warps=8, stages=3),
    Tile(128, 128, 64, warps=4, stages=3, resident=2),
    Tile(128, 64, 64, warps=4, stages=4, resident=2),
    Tile(256, 128, 64, warps=8, stages=4),
)


def machine(bench: Bench, yard: Yardstick) -> None:
    """What this is, and its rate of bf16 products."""
    times = race({YARDSTICK: yard.call}, [None], bench.device, 5 if bench.tiny else 30)
    bench.record(
        "machine",
        device=platform.processor() if bench.tiny else torch.cuda.get_device_name(bench.device),
        torch=torch.__version__,
        triton=importlib.util.find_spec("triton") and __import__("triton").__version__,
        python=platform.python_version(),
        commit=commit(),
        tflops_bf16=yard.flops / times[YARDSTICK] / 1e12,
    )


def checks(bench: Bench) -> bool:
    """Run every check."""
    fine = True
    for check in CHECKS:
        before, problem = time.monotonic(), ""
        try:
            run_check(check, bench.device)
        except Exception as error:
            problem, fine = f"{type(error).__name__}: {error}"[:500], False
            traceback.print_exc()
        took = time.monotonic() - before
        bench.record(
            "checks", check=check.__name__, passed=not problem, problem=problem, seconds=took
        )
    return fine


def products(bench: Bench, m: int) -> None:
    """Symmetric products by every tile beside cuBLAS: sets the threshold and the table."""
    for k in (m, 4 * m):
        batch = 1 if bench.tiny else max(1, (2048 // m) ** 2)
        inputs = [torch.randn(batch, m, k, device=bench.device).half() for _ in range(3)]
        contestants: Contestants = {"cublas": lambda x: torch.bmm(x, x.mT)}
        if not bench.tiny:
            for tile in TRIED_TILES:
                name = f"{tile.rows}x{tile.cols}x{tile.depth} "
                name += f"w{tile.warps} s{tile.stages} r{tile.resident}"
                contestants[name] = lambda x, tile=tile: symmetric._with_triton(
                    x, x.mT, None, Scaled(1.0), Scaled(0.0), None, tile
                )
        times = race(contestants, inputs, bench.device, 5 if bench.tiny else 15)
        best = min(times, key=lambda name: times[name])
        flops = batch * m * m * k
        bench.record(
            "products", batch=batch, m=m, k=k, best=best,
            speedup=times["cublas"] / times[best],
            ms={name: 1e3 * t for name, t in times.items()},
            tflops_symmetric={name: flops / t / 1e12 for name, t in times.items()},
        )  # fmt: skip


def torch_muon(bench: Bench) -> Callable[[Tensor], list[Tensor]]:
    """torch.optim.Muon's Newton-Schulz in bf16, compiled; it takes one matrix at a time."""
    call: Callable[..., Tensor] = _zeropower_via_newtonschulz
    if not bench.tiny:
        call = torch.compile(call, dynamic=False)
    return lambda x: [call(matrix, KELLER, 5, 1e-7) for matrix in x]


def with_backend(backend: symmetric.Backend) -> Callable[[Tensor], Tensor]:
    """Our Newton-Schulz with one choice of kernel for symmetric products."""

    def call(x: Tensor) -> Tensor:
        with symmetric_backend(backend):
            return orthogonalize(x)

    return call


def everyone(bench: Bench) -> Contestants:
    """Ours and the peers' Newton-Schulz."""
    contestants: Contestants = {
        "distmuon": orthogonalize,
        "distmuon, cuBLAS": with_backend("torch"),
        THEIRS: torch_muon(bench),
    }
    if importlib.util.find_spec("quack") and not bench.tiny:
        contestants["distmuon, quack"] = with_backend("quack")
    if not bench.tiny:
        contestants |= gram_newton_schulz()
    return contestants


def newton_schulz(
    bench: Bench, yard: Yardstick, contestants: Contestants, shape: tuple[int, int, int]
) -> None:
    """Whole orthogonalizations of one stack, against the FLOP bound and peers."""
    count, m, n = shape
    large = count * m * n > 2**30
    inputs = [torch.randn(shape, device=bench.device) for _ in range(1 if large else 3)]
    turns = 3 if large or bench.tiny else 11
    times = race({**contestants, YARDSTICK: yard.call}, inputs, bench.device, turns)
    rate = yard.flops / times.pop(YARDSTICK)
    bound = newton_schulz_flops(m, n, count) / rate
    bench.record(
        "newton-schulz", shape=list(shape), tflops_bf16=rate / 1e12, bound_ms=1e3 * bound,
        share_of_bound=bound / times["distmuon"], reached=reached(shape, bound, times),
        ms={name: 1e3 * t for name, t in times.items()},
        faster_than={n: t / times["distmuon"] for n, t in times.items() if n != "distmuon"},
    )  # fmt: skip


def gram_newton_schulz() -> Contestants:
    """The peer that is installed, if it is; it scales its input in place, which changes nothing."""
    if not importlib.util.find_spec("gram_newton_schulz"):
        return {}
    try:
        from gram_newton_schulz import GramNewtonSchulz

        with_kernels = importlib.util.find_spec("quack") is not None
        name = GRAM if with_kernels else f"{GRAM}, cuBLAS"
        return {name: GramNewtonSchulz(ns_use_kernels=with_kernels)}
    except Exception:  # its kernels need packages of their own
        print(f"{GRAM} failed:\n{traceback.format_exc(limit=3)}", file=sys.stderr)
        return {}


def reached(
    shape: tuple[int, int, int], bound: float, times: dict[str, float]
) -> dict[str, bool | None]:
    """Which of a shape's goals are; None where the other did not run."""
    goal, ours = GOALS.get(shape), times["distmuon"]
    if goal is None:
        return {}
    theirs, gram = times.get(THEIRS), times.get(GRAM)
    return {
        f"{goal.share:.0%} of the bound": bound / ours >= goal.share,
        f"{goal.faster}x {THEIRS}": None if theirs is None else theirs / ours >= goal.faster,
        f"at most {MOST_OF_GRAM}x {GRAM}": None if gram is None else ours / gram <= MOST_OF_GRAM,
    }


def llama(bench: Bench, dtype: torch.dtype) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices and the rest of a Llama-like model of 1.3 billion parameters."""
    layers, dim, ffn, vocabulary = (2, 16, 40, 64) if bench.tiny else (24, 2048, 5504, 32000)
    block = [(dim, dim)] * 4 + [(ffn, dim)] * 2 + [(dim, ffn)]

    def make(shape: tuple[int, ...]) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape, device=bench.device, dtype=dtype) * 0.02)

    matrices = [make(shape) for _ in range(layers) for shape in block]
    rest = [
        make((vocabulary, dim)),
        make((vocabulary, dim)),
        *(make((dim,)) for _ in range(2 * layers)),
    ]
    return matrices, rest


def step(bench: Bench, yard: Yardstick, dtype: torch.dtype) -> None:
    """A whole optimizer step beside fused AdamW: time and peak memory."""
    matrices, rest = llama(bench, dtype)
    everything = [*matrices, *rest]
    flops = sum(newton_schulz_flops(*sorted(p.shape), 1) for p in matrices)
    for parameter in everything:
        parameter.grad = torch.randn_like(parameter)
    found: dict[str, dict[str, float]] = {}
    rates = {}
    names = ["AdamW, fused", "distmuon", "distmuon, unchecked"]
    if dtype == torch.bfloat16:
        names.append("distmuon, stochastic rounding")
    for name in names:
        before = 0 if bench.tiny else torch.cuda.memory_allocated()
        optimizer = make_optimizer(name, matrices, rest)
        # The first step makes the state and, once, moves the parameters into one buffer.
        optimizer.step()
        if not bench.tiny:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        steps: Contestants = {name: lambda _, o=optimizer: o.step(), YARDSTICK: yard.call}
        times = race(steps, [None], bench.device, 7)
        rates[name] = yard.flops / times[YARDSTICK]
        peak = 0 if bench.tiny else torch.cuda.max_memory_allocated() - before
        found[name] = {"ms": 1e3 * times[name], "peak_extra_gb": peak / 1e9}
        del optimizer, steps
    bound = 1e3 * flops / rates["distmuon"]
    goal = MOST_OF_ADAMW * found["AdamW, fused"]["ms"] + bound
    numel = sum(p.numel() for p in everything)
    # Six FLOPs for each parameter and token. Real passes take longer: this is the strict way.
    passes = 1e3 * 6 * numel * TOKENS / rates["distmuon"]
    ours = found["distmuon"]["ms"]
    bench.record(
        "step", dtype=str(dtype), parameters=numel, newton_schulz_bound_ms=bound, goal_ms=goal,
        forward_backward_bound_ms=passes, share_of_forward_backward=ours / passes, found=found,
        reached={
            f"{MOST_OF_ADAMW}x AdamW and the bound": ours <= goal,
            f"{MOST_OF_PASSES:.0%} of the passes": ours / passes <= MOST_OF_PASSES,
        },
    )  # fmt: skip


def make_optimizer(
    name: str, matrices: list[nn.Parameter], rest: list[nn.Parameter]
) -> torch.optim.Optimizer:
    """AdamW or ours, as the name says."""
    if name.startswith("AdamW"):
        return torch.optim.AdamW([*matrices, *rest], lr=1e-4, fused=True)
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": rest, "algorithm": "adamw"}]
    return Muon(
        groups,
        lr=1e-4,
        nonfinite="propagate" if "unchecked" in name else "raise",
        stochastic_rounding=0 if "rounding" in name else None,
    )


def run_sections(sections: Mapping[str, Callable[[], None]], bench: Bench) -> bool:
    """Run what there is time for; whether none has failed.

    Args:
        sections: By name, in order.
        bench: Has the deadline.
    """
    fine = True
    for name, section in sections.items():
        if time.monotonic() > bench.deadline:
            print(f"Left out for lack of time: {name}.", flush=True)
            continue
        try:
            section()
        except Exception:
            fine = False
            print(f"{name} failed:", file=sys.stderr)
            traceback.print_exc()
        if not bench.tiny:
            torch.cuda.empty_cache()
    return fine


def summarize(out: Path) -> list[str]:
    """Every aim in a line, with what became of it.

    Args:
        out: The results.
    """
    words = {True: "reached", False: "MISSED", None: "not tried"}
    lines = []
    for entry in map(json.loads, out.read_text().splitlines()):
        place = entry.get("shape", entry.get("dtype"))
        for aim, is_reached in entry.get("reached", {}).items():
            lines.append(f"{words[is_reached]}: {entry['section']} {place}: {aim}")
    return lines


def main() -> int:
    """Run all sections."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.jsonl"))
    parser.add_argument("--budget", type=float, default=420.0, help="seconds for all sections")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(
            "There is no CUDA device here. --device cpu runs the same code on small sizes.",
            file=sys.stderr,
        )
        print("make gpu: no CUDA device, nothing checked or measured.", file=sys.stderr)
        return 2
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.unlink(missing_ok=True)
    torch.manual_seed(0)
    bench = Bench(
        torch.device(arguments.device), arguments.out, time.monotonic() + arguments.budget
    )
    yard = yardstick(bench)
    machine(bench, yard)
    fine = checks(bench)
    peers = everyone(bench)
    sections: dict[str, Callable[[], None]] = {}
    for shape in TINY_STACKS if bench.tiny else STACKS:
        name = f"newton-schulz {shape}"
        sections[name] = partial(newton_schulz, bench, yard, peers, shape)
    for dtype in (torch.float32, torch.bfloat16):
        sections[f"step {dtype}"] = partial(step, bench, yard, dtype)
    for m in (16,) if bench.tiny else (256, 512, 768, 1024, 2048, 4096):
        sections[f"products {m}"] = partial(products, bench, m)
    for rule in CONTESTS:
        sections[f"elementwise {rule}"] = partial(elementwise, bench, rule)
    fine = run_sections(sections, bench) and fine
    print(*summarize(arguments.out), sep="\n")
    print("all checks passed" if fine else "SOME CHECKS FAILED, see above", flush=True)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())

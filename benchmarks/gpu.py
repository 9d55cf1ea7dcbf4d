"""Check and measure everything on one GPU: what `make gpu` runs, meant for under eight minutes.

    python -m benchmarks.gpu [--out gpu.jsonl] [--budget 420]
    python -m benchmarks.gpu --device cpu        the same code on small sizes, as the tests run it

Checks first, see gpu_checks.py. Then medians over fresh random inputs, by CUDA events; contestants
of a line take turns. "bound" is the least FLOPs (symmetric products at half) over the rate of a
bf16 product measured in the same run. One JSON line a result. A section that would start after the
budget is left out, and said so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim._muon import _zeropower_via_newtonschulz

from benchmarks.gpu_checks import CHECKS, newton_schulz_flops, run_check
from distmuon import Muon
from distmuon.kernels import symmetric
from distmuon.kernels.symmetric import symmetric_backend
from distmuon.kernels.tiles import TILES, Scaled, Tile
from distmuon.orthogonalize import orthogonalize

KELLER = (3.4445, -4.7750, 2.0315)
STACKS = ((24, 1024, 4096), (1, 4096, 4096), (1, 4096, 11008), (384, 2048, 7168))
TINY_STACKS = ((2, 8, 32), (1, 8, 8))
GOALS = {
    (24, 1024, 4096): 0.59,
    (1, 4096, 4096): 0.70,
    (1, 4096, 11008): 0.65,
    (384, 2048, 7168): 0.65,
}
TRIED_TILES = (
    *(tile for _, tile in TILES),
    Tile(128, 128, 64, warps=4, stages=4),
    Tile(128, 128, 128, warps=8, stages=3),
    Tile(256, 128, 64, warps=8, stages=4),
    Tile(256, 64, 64, warps=8, stages=4),
)
Contestants = dict[str, Callable[[Tensor], object]]


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
    contestants: Contestants, inputs: list[Tensor], device: torch.device, turns: int
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


def machine(bench: Bench) -> float:
    """What this is, and its rate of bf16 products in FLOP/s."""
    size = 64 if bench.tiny else 8192
    a, b = (torch.randn(size, size, device=bench.device).bfloat16() for _ in range(2))
    best = race({"mm": lambda x: x @ b}, [a], bench.device, 5 if bench.tiny else 30)["mm"]
    rate = 2 * size**3 / best
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    bench.record(
        "machine",
        device=platform.processor() if bench.tiny else torch.cuda.get_device_name(bench.device),
        torch=torch.__version__,
        triton=importlib.util.find_spec("triton") and __import__("triton").__version__,
        python=platform.python_version(),
        commit=git.stdout.strip(),
        tflops_bf16=rate / 1e12,
    )
    return rate


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


def products(bench: Bench) -> None:
    """Symmetric products by every tile beside cuBLAS: sets the threshold and the table."""
    sizes = (16,) if bench.tiny else (256, 512, 768, 1024, 2048, 4096)
    for m in sizes:
        for k in (m, 4 * m):
            batch = 1 if bench.tiny else max(1, (2048 // m) ** 2)
            inputs = [torch.randn(batch, m, k, device=bench.device).half() for _ in range(3)]

            def whole(x: Tensor) -> Tensor:
                return torch.bmm(x, x.mT)

            contestants: Contestants = {"cublas": whole}
            if not bench.tiny:
                for tile in TRIED_TILES:
                    name = f"{tile.rows}x{tile.cols}x{tile.depth} w{tile.warps} s{tile.stages}"
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
    call = _zeropower_via_newtonschulz if bench.tiny else torch.compile(_zeropower_via_newtonschulz)
    return lambda x: [call(matrix, KELLER, 5, 1e-7) for matrix in x]


def with_backend(backend: symmetric.Backend) -> Callable[[Tensor], Tensor]:
    """Our Newton-Schulz with one choice of kernel for symmetric products."""

    def call(x: Tensor) -> Tensor:
        with symmetric_backend(backend):
            return orthogonalize(x)

    return call


def newton_schulz(bench: Bench, rate: float) -> None:
    """Whole orthogonalizations at the issue's shapes, against the FLOP bound and peers."""
    contestants: Contestants = {
        "distmuon": orthogonalize,
        "distmuon, cuBLAS": with_backend("torch"),
        "torch.optim.Muon, bf16 compiled": torch_muon(bench),
    }
    if importlib.util.find_spec("quack") and not bench.tiny:
        contestants["distmuon, quack"] = with_backend("quack")
    if importlib.util.find_spec("gram_newton_schulz") and not bench.tiny:
        try:
            from gram_newton_schulz import GramNewtonSchulz

            contestants["gram-newton-schulz"] = GramNewtonSchulz()
        except Exception:  # its kernels need packages of their own
            print(f"gram-newton-schulz failed:\n{traceback.format_exc(limit=3)}", file=sys.stderr)
    for shape in TINY_STACKS if bench.tiny else STACKS:
        count, m, n = shape
        large = count * m * n > 2**30
        inputs = [torch.randn(shape, device=bench.device) for _ in range(1 if large else 3)]
        times = race(contestants, inputs, bench.device, 3 if large or bench.tiny else 11)
        flops = newton_schulz_flops(m, n, count)
        ours = times["distmuon"]
        bench.record(
            "newton-schulz", shape=list(shape), bound_ms=1e3 * flops / rate,
            share_of_bound=flops / rate / ours, goal=GOALS.get(shape),
            ms={name: 1e3 * t for name, t in times.items()},
            faster_than={name: t / ours for name, t in times.items() if name != "distmuon"},
        )  # fmt: skip


def elementwise(bench: Bench) -> None:
    """The update rules, in bytes per second, beside torch's own operations."""
    count = 1000 if bench.tiny else 2**28
    from distmuon import update_rules

    other = torch.randn(count, device=bench.device)
    inputs = [torch.randn(count, device=bench.device) for _ in range(2)]

    def torch_momentum(x: Tensor) -> None:
        other.lerp_(x, 0.05)
        x.lerp_(other, 0.95)

    times = race(
        {
            "momentum": lambda x: update_rules.momentum_(x, other, momentum=0.95, nesterov=True),
            "momentum, torch": torch_momentum,
            "apply": lambda x: update_rules.apply_(x, other, lr=1e-3, weight_decay=0.1),
            "apply, torch": lambda x: x.mul_(0.9999).add_(other, alpha=-1e-3),
        },
        inputs, bench.device, 5 if bench.tiny else 15,
    )  # fmt: skip
    least = {"momentum": 16, "apply": 12}
    bench.record(
        "elementwise", numel=count, ms={name: 1e3 * t for name, t in times.items()},
        least_terabytes_per_second={k: count * b / times[k] / 1e12 for k, b in least.items()},
    )  # fmt: skip


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


def step(bench: Bench, rate: float) -> None:
    """A whole optimizer step beside fused AdamW: time and peak memory."""
    for dtype in (torch.float32, torch.bfloat16):
        matrices, rest = llama(bench, dtype)
        everything = [*matrices, *rest]
        flops = sum(newton_schulz_flops(*sorted(p.shape), 1) for p in matrices)
        for parameter in everything:
            parameter.grad = torch.randn_like(parameter)
        found: dict[str, dict[str, float]] = {}
        for name in ("AdamW, fused", "distmuon", "distmuon, unchecked"):
            if not bench.tiny:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            before = 0 if bench.tiny else torch.cuda.memory_allocated()
            optimizer: torch.optim.Optimizer
            if name.startswith("AdamW"):
                optimizer = torch.optim.AdamW(everything, lr=1e-4, fused=True)
            else:
                groups = [{"params": matrices}, {"params": rest, "algorithm": "adamw"}]
                policy = "propagate" if "unchecked" in name else "raise"
                optimizer = Muon(groups, lr=1e-4, nonfinite=policy)
            times = race({name: lambda _, o=optimizer: o.step()}, [matrices[0]], bench.device, 7)
            peak = 0 if bench.tiny else torch.cuda.max_memory_allocated() - before
            found[name] = {"ms": 1e3 * times.get(name, float("nan")), "peak_extra_gb": peak / 1e9}
            del optimizer
        bound = 1e3 * flops / rate
        goal = 1.15 * found["AdamW, fused"]["ms"] + bound
        bench.record(
            "step", dtype=str(dtype), parameters=sum(p.numel() for p in everything),
            newton_schulz_bound_ms=bound, goal_ms=goal, found=found,
        )  # fmt: skip
        del matrices, rest, everything


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
    rate = machine(bench)
    fine = checks(bench)
    sections: dict[str, Callable[[], None]] = {
        "newton-schulz": lambda: newton_schulz(bench, rate),
        "step": lambda: step(bench, rate),
        "products": lambda: products(bench),
        "elementwise": lambda: elementwise(bench),
    }
    for name, section in sections.items():
        if time.monotonic() > bench.deadline:
            print(f"Left out for lack of time: {name}.", flush=True)
            continue
        try:
            section()
        except Exception:
            fine = False
            traceback.print_exc()
        if not bench.tiny:
            torch.cuda.empty_cache()
    print("all checks passed" if fine else "SOME CHECKS FAILED, see above", flush=True)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())

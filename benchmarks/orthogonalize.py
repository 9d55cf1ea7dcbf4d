"""Speed and accuracy of `distmuon.orthogonalize` beside torch.optim.Muon's formulation.

    OMP_NUM_THREADS=1 python benchmarks/orthogonalize.py speed [--shapes 512x512 ...]
    OMP_NUM_THREADS=1 python benchmarks/orthogonalize.py {accuracy,symmetries,range,panels}
    OMP_NUM_THREADS=1 python benchmarks/orthogonalize.py {batching,aspect}
    OMP_NUM_THREADS=1 python benchmarks/orthogonalize.py slow-bfloat16

One process and one thread; the contestants of a line run in turn, one call each, so that a busy
neighbour slows all alike. Times are CPU time of the thread: the minimum, and the median of the
ratios of neighbouring calls. One JSON line a result.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz

from distmuon.orthogonalize import orthogonalize, products, stability
from distmuon.orthogonalize.coefficients import PRESETS, resolve
from distmuon.orthogonalize.schedule import Schedule

KELLER = (3.4445, -4.7750, 2.0315)
STEPS = 5
SHAPES = ["256x256", "512x512", "768x768", "1024x1024", "2048x2048", "768x3072", "1024x4096"]
Contestants = dict[str, Callable[[], object]]


def torch_formulation(gradient: Tensor) -> Tensor:
    """torch.optim.Muon's Newton-Schulz in float32: its expressions without the bfloat16 cast."""
    a, b, c = KELLER
    x = gradient.clone()
    if gradient.size(0) > gradient.size(1):
        x = x.T
    x.div_(x.norm().clamp(min=1e-7))
    for _ in range(STEPS):
        gram = x @ x.T
        update = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, update, x, beta=a)
    return x.T if gradient.size(0) > gradient.size(1) else x


def torch_bfloat16(gradient: Tensor) -> Tensor:
    """torch.optim.Muon's own function, as it is."""
    return _zeropower_via_newtonschulz(gradient, KELLER, STEPS, 1e-7)


def plain_flops(short: int, long: int, steps: int = STEPS) -> int:
    """FLOPs (a multiplication and an addition are two) of `steps` plain steps."""
    return steps * (4 * short**2 * long + 2 * short**3)


def symmetric_flops(short: int, long: int, form: str, steps: int = STEPS) -> int:
    """The least FLOPs of a form when every symmetric product costs half."""
    if form == "gram":
        return 3 * short**2 * long + (4 * steps - 3) * short**3
    return steps * (3 * short**2 * long + short**3)


def interleave(contestants: Contestants, repeats: int) -> dict[str, list[float]]:
    """Seconds of thread CPU time of each call, taking turns after one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for run in contestants.values():
        run()
    for _ in range(repeats):
        for name, run in contestants.items():
            start = time.thread_time()
            run()
            times[name].append(time.thread_time() - start)
    return times


def ratios(times: dict[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Milliseconds, and how much faster than `base`: by minima, and by the median of pairs."""
    return {
        name: {
            "ms": round(min(values) * 1e3, 3),
            "faster_min": round(min(times[base]) / min(values), 2),
            "faster_median": round(
                statistics.median(b / v for b, v in zip(times[base], values, strict=True)), 2
            ),
        }
        for name, values in times.items()
    }


def repeats_for(flops: float, most: int = 40) -> int:
    """As many repeats as fit a few seconds at 70 GFLOP/s, at least 5."""
    return max(5, min(most, int(5e11 / flops)))


def speed(shapes: Iterable[str]) -> None:
    """Forms and presets against float32 addmm; the share of the symmetric FLOP bound reached."""
    for text in shapes:
        rows, columns = map(int, text.split("x"))
        short, long = min(rows, columns), max(rows, columns)
        x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
        square = torch.randn(1024, 1024)
        contestants: Contestants = {
            "addmm_float32": partial(torch_formulation, x),
            "plain_p5": partial(orthogonalize, x, method="newton_schulz", coefficients="p5"),
            "gram_p5": partial(orthogonalize, x, method="gram", coefficients="p5"),
            "auto_p5": partial(orthogonalize, x, coefficients="p5"),
            "auto_keller": partial(orthogonalize, x, coefficients="keller"),
            "halley": partial(orthogonalize, x, coefficients="halley"),
            "eigh": partial(orthogonalize, x, method="eigh"),
            "plain_p5_bfloat16": partial(
                orthogonalize, x, method="newton_schulz", coefficients="p5", dtype=torch.bfloat16
            ),
            "torch_bfloat16": partial(torch_bfloat16, x),
            "peak": partial(torch.mm, square, square),
        }
        times = interleave(contestants, repeats_for(8 * plain_flops(short, long), 25))
        peak = 2 * 1024**3 / min(times.pop("peak"))
        form = "gram" if 3 * long >= 4 * short else "plain"
        bound = symmetric_flops(short, long, form) / peak
        emit(
            "speed",
            shape=[rows, columns],
            peak_gflops=round(peak / 1e9, 1),
            share_of_symmetric_bound=round(bound / min(times["auto_p5"]), 2),
            results=ratios(times, "addmm_float32"),
        )


def slow_bfloat16() -> None:
    """torch.optim.Muon's bfloat16 on a CPU without bfloat16 instructions: oneDNN switched off."""
    for rows, columns in ((256, 256), (512, 512), (1024, 1024), (768, 3072)):
        x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
        with torch.backends.mkldnn.flags(enabled=False):
            start = time.thread_time()
            torch_bfloat16(x)
            peer = time.thread_time() - start
        times = interleave(
            {
                "auto": partial(orthogonalize, x),
                "auto_p5": partial(orthogonalize, x, coefficients="p5"),
                "addmm_float32": partial(torch_formulation, x),
            },
            5,
        )
        emit(
            "slow-bfloat16",
            shape=[rows, columns],
            torch_bfloat16_ms=round(peer * 1e3, 1),
            faster={name: round(peer / min(values), 1) for name, values in times.items()},
        )


def panels() -> None:
    """Row panels against one whole product, by size and panel."""
    for short, long in ((256, 256), (384, 384), (512, 512), (768, 768), (1024, 1024), (1024, 4096)):
        x = torch.randn(short, long)
        contestants: Contestants = {"whole": partial(torch.mm, x, x.mT)}
        for rows in (64, 96, 128, 192, 256, 384):
            if rows < short:
                contestants[str(rows)] = partial(with_panel, x, rows)
        times = interleave(contestants, repeats_for(16 * short * short * long))
        emit("panels", shape=[short, long], results=ratios(times, "whole"))


def with_panel(x: Tensor, rows: int) -> Tensor:
    """The package's symmetric product with another panel size, whatever the matrix's size."""
    saved = products.PANEL, products.SMALLEST_CUT
    products.PANEL, products.SMALLEST_CUT = rows, 0
    try:
        return products.symmetric_product(x, x.mT)
    finally:
        products.PANEL, products.SMALLEST_CUT = saved


def loop(x: Tensor) -> list[Tensor]:
    """One call a matrix."""
    return [orthogonalize(one, coefficients="p5") for one in x]


def batching() -> None:
    """Sixteen matrices in one call against a loop of calls."""
    for short, long in ((16, 16), (32, 32), (32, 128), (64, 64), (64, 128), (96, 96), (128, 128)):
        x = torch.randn(16, short, long)
        times = interleave(
            {
                "loop": partial(loop, x),
                "batch": partial(orthogonalize, x, coefficients="p5"),
            },
            40,
        )
        emit("batching", shape=[16, short, long], results=ratios(times, "loop"))


def aspect() -> None:
    """The plain form against the Gram form by aspect ratio."""
    for short in (128, 256, 384, 768):
        for factor in (1.0, 1.25, 1.5, 2.0, 4.0):
            x = torch.randn(short, int(short * factor))
            times = interleave(
                {
                    "plain": partial(orthogonalize, x, method="newton_schulz"),
                    "gram": partial(orthogonalize, x, method="gram"),
                },
                repeats_for(2 * plain_flops(short, int(short * factor)), 15),
            )
            emit("aspect", shape=list(x.shape), results=ratios(times, "plain"))


def spectrum(kind: str, count: int) -> Tensor:
    """[count] singular values in float64, the largest 1."""
    if kind.startswith("condition"):
        decades = float(kind.split("_1e")[1])
        return torch.logspace(0, -decades, count, dtype=torch.float64)
    if kind == "power_law":
        return 1 / torch.arange(1, count + 1, dtype=torch.float64)
    return (torch.arange(count) < int(kind.split("_")[1])).double()


def accuracy() -> None:
    """Preset x form x dtype on known spectra, 128 x 512."""
    generator = torch.Generator().manual_seed(0)
    short, long = 128, 512
    u = torch.linalg.qr(torch.randn(short, short, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(long, short, generator=generator, dtype=torch.float64)).Q
    cases: list[tuple[str, str, torch.dtype]] = [
        (name, method, dtype)
        for name in PRESETS
        for method, dtype in (
            ("newton_schulz", torch.float32),
            ("gram", torch.float32),
            ("gram", torch.float16),
            ("newton_schulz", torch.bfloat16),
        )
    ] + [
        ("halley", "auto", torch.float32),
        ("p5", "eigh", torch.float32),
        ("p5", "svd", torch.float32),
    ]
    for kind in ("power_law", "condition_1e2", "condition_1e4", "condition_1e8", "rank_8"):
        s = spectrum(kind, short)
        x, polar = ((u * s) @ v.T).float(), (u * (s > 0)) @ v.T
        for name, method, dtype in cases:
            out = orthogonalize(x, method=method, coefficients=name, dtype=dtype).double()  # type: ignore[arg-type]
            values = torch.linalg.svdvals(out)
            image = polar if method in ("svd", "eigh") else u * image_of(s, name) @ v.T
            emit(
                "accuracy",
                spectrum=kind,
                preset=None if method in ("svd", "eigh") else name,
                method=method,
                dtype=str(dtype).removeprefix("torch."),
                error_to_polynomial=significant((out - image).norm() / image.norm()),
                error_to_polar=significant((out - polar).norm() / polar.norm()),
                sigma_max=round(float(values[0]), 4),
                rms_times_sqrt_long=round(float(out.square().mean().mul(long).sqrt()), 4),
            )


def symmetries() -> None:
    """Largest entry of f(U X V) - U f(X) V and of f(X.T) - f(X).T, twelve random matrices each."""
    generator = torch.Generator().manual_seed(0)

    def rotation(n: int) -> Tensor:
        return torch.linalg.qr(torch.randn(n, n, generator=generator)).Q

    shapes = ((64, 64), (128, 128), (128, 136), (384, 384), (384, 400), (512, 512), (768, 768))
    for m, n in (*shapes, (1024, 1024), (128, 512)):
        for name in ("auto", "p5", "halley"):
            rotated, transposed = torch.zeros(()), torch.zeros(())
            for _ in range(12):
                x, left, right = torch.randn(m, n, generator=generator), rotation(m), rotation(n)
                out = orthogonalize(x, coefficients=name)
                turned = orthogonalize(left @ x @ right, coefficients=name)
                rotated = (turned - left @ out @ right).abs().amax().maximum(rotated)
                other = orthogonalize(x.mT, coefficients=name).mT
                transposed = (other - out).abs().amax().maximum(transposed)
            emit(
                "symmetries",
                shape=f"{m}x{n}",
                preset=name,
                rotated=significant(rotated),
                transposed=significant(transposed),
            )


def image_of(s: Tensor, name: str) -> Tensor:
    """The exact function that a schedule is, of singular values in float64."""
    schedule = resolve(name)
    power = 2 if schedule.normalization == "frobenius" else 4
    return schedule.image(s / (s.pow(power).sum().pow(1 / power) * schedule.safety))


def image_ranges() -> None:
    """What each preset makes of singular values above 1e-2 and above 3e-3 of its norm."""
    for name in ("halley", *PRESETS):
        schedule = resolve(name)
        ranges = {}
        for lower in (1e-2, 3e-3):
            exponents = torch.linspace(float(torch.tensor(lower).log10()), 0.0, 20_001)
            values = schedule.image(10 ** exponents.double() / schedule.safety)
            ranges[str(lower)] = [round(float(values.min()), 4), round(float(values.max()), 4)]
        slope = 1.0
        for a, _, _ in schedule.coefficients:
            slope *= a
        windows: dict[str, list[int]] = {}
        if isinstance(schedule, Schedule):
            for dtype in ("float32", "float16"):
                cut = stability.windows(schedule, dtype)  # type: ignore[arg-type]
                windows[f"{dtype}_windows"] = [len(window) for window in cut]
        emit(
            "range",
            preset=name,
            steps=schedule.steps,
            slope=round(slope, 1),
            image=ranges,
            **windows,
        )


def significant(value: Tensor) -> float:
    """Two significant digits."""
    return float(f"{float(value):.1e}")


def emit(benchmark: str, **fields: object) -> None:
    """One JSON line with what is needed to repeat it."""
    line = {
        "benchmark": benchmark,
        **fields,
        "torch": torch.__version__,
        "device": torch.backends.cpu.get_cpu_capability(),
        "fast_bfloat16": torch.cpu._is_avx512_bf16_supported(),
        "threads": torch.get_num_threads(),
        "commit": commit(),
    }
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def commit() -> str:
    """The checked-out commit, or "none" before the first."""
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() if found.returncode == 0 else "none"


def main() -> None:
    """Run one benchmark."""
    plain: dict[str, Callable[[], None]] = {
        "accuracy": accuracy,
        "symmetries": symmetries,
        "range": image_ranges,
        "panels": panels,
        "batching": batching,
        "aspect": aspect,
        "slow-bfloat16": slow_bfloat16,
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("benchmark", choices=["speed", *plain])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="for speed: ROWSxCOLUMNS")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.benchmark == "speed":
        speed(arguments.shapes)
    else:
        plain[arguments.benchmark]()


if __name__ == "__main__":
    main()

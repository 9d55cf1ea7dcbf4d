"""Matrices in parts (`distmuon/orthogonalize/parts.py`): what they lose in accuracy, and cost.

    OMP_NUM_THREADS=1 python benchmarks/parts.py {accuracy,cost}

One process and one thread plays all the parts. Times are CPU time of the thread, the minimum of
several calls that take turns. One JSON line a result.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from distmuon.orthogonalize import orthogonalize
from distmuon.orthogonalize.coefficients import resolve
from distmuon.orthogonalize.parts import apply_transform, check_parts, find_transform, part_gram
from distmuon.orthogonalize.policy import Method

CPU = torch.device("cpu")
SPECTRA = ("power_law", "condition_1e2", "condition_1e3", "condition_1e4", "rank_8", "rank_1")


def in_parts(x: Tensor, k: int, dtype: torch.dtype, name: str = "p5") -> Tensor:
    """What k ranks would do with a wide matrix."""
    parts = [part_gram(part, dtype=dtype) for part in x.tensor_split(k, 1)]
    halves = check_parts(name, None, dtype, CPU, x.shape)
    transform = find_transform([p.gram for p in parts], [p.largest for p in parts], halves)
    return torch.cat([apply_transform(part, transform) for part in parts], 1)


def known(short: int, long: int, kind: str) -> Tensor:
    """[short, long] float32 with a known spectrum."""
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(short, short, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(long, short, generator=generator, dtype=torch.float64)).Q
    index = torch.arange(short, dtype=torch.float64)
    if kind == "power_law":
        s = 1 / (index + 1)
    elif kind.startswith("condition"):
        s = torch.logspace(0, -float(kind.split("_1e")[1]), short, dtype=torch.float64)
    else:
        s = (index < int(kind.split("_")[1])).double()
    return ((u * s) @ v.T).float()


def exact(x: Tensor, name: str) -> Tensor:
    """The preset's polynomial of the singular values that the float32 input has, in float64."""
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    schedule = resolve(name)
    power = 2 if schedule.normalization == "frobenius" else 4
    s = s / (s.pow(power).sum().pow(1 / power) * schedule.safety)
    return (u * schedule.image(s)) @ vh


def accuracy() -> None:
    """Relative error to the exact polynomial: whole in both forms, and in four parts."""
    for name in ("halley", "p5", "polar_express"):
        for short, long in ((128, 512), (400, 520), (512, 2048), (64, 4096)):
            for kind in SPECTRA:
                x = known(short, long, kind)
                expected = exact(x, name)
                forms: tuple[Method, ...] = ("newton_schulz", "gram")
                results = {
                    form: orthogonalize(x, method=form, coefficients=name)
                    for form in (("auto",) if name == "halley" else forms)
                }
                results |= {
                    "parts_float32": in_parts(x, 4, torch.float32, name),
                    "parts_float64": in_parts(x, 4, torch.float64, name),
                }
                errors = {
                    key: float(f"{float((value - expected).norm() / expected.norm()):.1e}")
                    for key, value in results.items()
                }
                emit("accuracy", preset=name, shape=[short, long], spectrum=kind, **errors)


def cost() -> None:
    """What the first owner computes, beside the whole matrix in both forms."""
    for short, long in ((256, 1024), (512, 2048), (768, 3072), (768, 6144), (1024, 4096)):
        x = torch.randn(short, long, generator=torch.Generator().manual_seed(0))
        calls: dict[str, Callable[[], object]] = {
            "plain": lambda x=x: orthogonalize(x, method="newton_schulz"),
            "gram": lambda x=x: orthogonalize(x, method="gram"),
            "halley": lambda x=x: orthogonalize(x, coefficients="halley"),
        }
        for dtype in (torch.float32, torch.float64):
            label = str(dtype).removeprefix("torch.")
            halves = check_parts("halley", None, dtype, CPU, x.shape)
            part = part_gram(x[:, : long // 4].contiguous(), dtype=dtype)
            transform = find_transform([part.gram], [part.largest], halves)
            calls[f"gram_{label}"] = lambda s=part.scaled, d=dtype: part_gram(s, dtype=d)
            calls[f"transform_{label}"] = lambda p=part, h=halves: find_transform(
                [p.gram] * 4, [p.largest] * 4, h
            )
            calls[f"apply_{label}"] = lambda p=part, t=transform: apply_transform(p, t)
        best = dict.fromkeys(calls, float("inf"))
        for _ in range(5):
            for key, call in calls.items():
                start = time.thread_time()
                call()
                best[key] = min(best[key], time.thread_time() - start)
        emit("cost", shape=[short, long], **{key: round(v * 1e3, 1) for key, v in best.items()})


def emit(benchmark: str, **fields: object) -> None:
    """One JSON line."""
    line = {"benchmark": benchmark, **fields, "torch": torch.__version__}
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Run one benchmark."""
    benchmarks: dict[str, Callable[[], None]] = {"accuracy": accuracy, "cost": cost}
    parser = argparse.ArgumentParser(description="Matrices in parts: accuracy and cost.")
    parser.add_argument("benchmark", choices=benchmarks)
    torch.set_num_threads(1)
    benchmarks[parser.parse_args().benchmark]()


if __name__ == "__main__":
    main()

"""Balance, movement and padding of each layout on the shapes of real models. Integers only.

    python benchmarks/balance.py             # the table of docs/sharding.md, as Markdown
    python benchmarks/balance.py --splits    # costly matrices shared by up to 4 ranks
    python benchmarks/balance.py --scale     # one trillion parameters on 10,000 ranks: time, memory

Only Muon's matrices are counted: embeddings, heads and norms are AdamW's and cut anywhere.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Sequence

from distmuon.choice import choose, predict
from distmuon.cost import default_cost_model
from distmuon.forecast.models import MODELS, muon_specs
from distmuon.layout import LayoutKind, TensorSpec
from distmuon.options import MAX_SPLIT
from distmuon.ownership import assign
from distmuon.plan import build_plan, describe, digest
from distmuon.split_plan import moved_pieces
from distmuon.splits import Sharing, packed_numel

WORLD_SIZES = (8, 64, 512, 2048)
LAYOUTS: tuple[LayoutKind, ...] = ("flat", "aligned")
# 64 MiB of fp32 momentum, the default of `Muon(wave_bytes=...)`.
WAVE_NUMEL = 16 * 2**20


NAMES = {
    "Llama-7B": "llama-7b",
    "Llama-70B": "llama-3-70b",
    "Qwen3-32B": "qwen3-32b",
    "Kimi-K2": "kimi-k2",
    "Kimi-K2, stacks": "kimi-k2-stacked",
}


def shapes(model: str) -> list[TensorSpec]:
    """Muon's parameters of a model of the tables."""
    return muon_specs(MODELS[NAMES[model]]())


def row(model: str, specs: Sequence[TensorSpec], world_size: int, layout: LayoutKind) -> str:
    """One line of the table."""
    ownership = assign(specs, world_size, layout=layout)
    loads = ownership.loads(default_cost_model("cuda"))
    numel = sum(spec.numel for spec in specs)
    moved = sum(ownership.traffic()[0]) / numel
    padding = ownership.layout.numel / numel - 1
    step = predict(ownership, default_cost_model("cuda"), wave_numel=WAVE_NUMEL, itemsize=2)
    return (
        f"| {model} | {world_size:,} | {layout} | {max(loads) * world_size / sum(loads):.3f} | "
        f"{moved:.1%} | {padding:.1%} | {1e3 * step.seconds:,.1f} |"
    )


def print_table(models: Sequence[str], world_sizes: Sequence[int]) -> None:
    """Print every model at every number of ranks in every layout."""
    print("| model | ranks | layout | cost, max / mean | moved | padding | step ms |")
    print("|---|---|---|---|---|---|---|")
    for model in models:
        specs = shapes(model)
        for world_size in world_sizes:
            for layout in LAYOUTS:
                print(row(model, specs, world_size, layout), flush=True)


def print_splits(models: Sequence[str], world_sizes: Sequence[int]) -> None:
    """Print what sharing costly matrices does to balance and bytes."""
    print(
        "| model | ranks | split | slowest over fair share, whole | split | over own mean | "
        "fp32 matrices sent whole | split | planned in s |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    model = default_cost_model("cuda")
    for name in models:
        specs = shapes(name)
        numel = sum(spec.numel for spec in specs)
        for world_size in world_sizes:
            whole = assign(specs, world_size)
            start = time.perf_counter()
            shared = whole.with_splits(model, Sharing(MAX_SPLIT))
            seconds = time.perf_counter() - start
            fair = sum(whole.loads(model)) / world_size
            loads = shared.loads(model)
            pieces, small = 0, 0
            for split in shared.splits:
                spec = shared.layout.specs[split.matrix]
                pieces += sum(moved for _, _, moved in moved_pieces(shared.layout, split))
                small += 3 * packed_numel(min(spec.shape)) * (len(split.ranks) - 1)
            sent = 2 * (sum(shared.traffic()[0]) + pieces) + small
            ways = sorted({len(split.ranks) for split in shared.splits})
            print(
                f"| {name} | {world_size:,} | {len(shared.splits)} by {ways} | "
                f"{max(whole.loads(model)) / fair:.2f} | {max(loads) / fair:.2f} | "
                f"{max(loads) * world_size / sum(loads):.2f} | "
                f"{2 * sum(whole.traffic()[0]) / numel:.2f} | {sent / numel:.2f} | {seconds:.2f} |",
                flush=True,
            )


def print_scale(world_size: int) -> None:
    """Plan the largest model on many ranks: all owners, the digest, one rank's transfers."""
    for stacked in (False, True):
        specs = shapes("Kimi-K2, stacks" if stacked else "Kimi-K2")
        for layout in (*LAYOUTS, "auto"):
            start, cpu = time.perf_counter(), time.process_time()
            ownership = choose(
                specs,
                world_size,
                layout=layout,
                model=default_cost_model("cuda"),
                wave_numel=WAVE_NUMEL,
                itemsize=2,
            )
            digest(describe(ownership.parameters, ownership.describe_owners()))
            build_plan(ownership, world_size // 2, wave_numel=WAVE_NUMEL)
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
            print(
                f"{sum(s.numel for s in specs):,} elements, {len(specs):,} parameters, "
                f"{len(ownership.owners):,} matrices, {world_size:,} ranks, {layout}: "
                f"{seconds:.2f} s wall, {cpu:.2f} s CPU, {peak:,.0f} MiB at most so far"
            )


def main() -> None:
    """Read the command line and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(NAMES), choices=list(NAMES))
    parser.add_argument("--ranks", nargs="*", type=int, default=list(WORLD_SIZES))
    parser.add_argument("--scale", action="store_true")
    parser.add_argument("--splits", action="store_true")
    arguments = parser.parse_args()
    if arguments.splits:
        print_splits(arguments.models, arguments.ranks)
    elif arguments.scale:
        print_scale(10_000)
    else:
        print_table(arguments.models, arguments.ranks)


if __name__ == "__main__":
    main()

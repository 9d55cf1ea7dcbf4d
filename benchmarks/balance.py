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
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distmuon.choice import choose, predict
from distmuon.cost import default_cost_model
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


@dataclass(frozen=True, slots=True)
class Dense:
    """A Llama-like transformer: q, k, v, o, gate, up, down in each layer."""

    layers: int
    width: int
    hidden: int
    queries: int
    keys: int

    def specs(self) -> list[TensorSpec]:
        """Its matrices, in the order of the model."""
        shapes = {
            "q": (self.queries, self.width),
            "k": (self.keys, self.width),
            "v": (self.keys, self.width),
            "o": (self.width, self.queries),
            "gate": (self.hidden, self.width),
            "up": (self.hidden, self.width),
            "down": (self.width, self.hidden),
        }
        return [
            TensorSpec(f"layers.{i}.{name}", shape)
            for i in range(self.layers)
            for name, shape in shapes.items()
        ]


def kimi_k2(*, stacked: bool) -> list[TensorSpec]:
    """Kimi-K2-like shapes: 61 layers of latent attention, 384 experts a layer but the first.

    Args:
        stacked: Experts as three stacks [384, m, n] a layer, or as 1,152 matrices.

    Source: https://huggingface.co/moonshotai/Kimi-K2-Base/blob/main/config.json
    """
    width, hidden, dense, experts, heads = 7168, 2048, 18432, 384, 64
    specs = []
    for i in range(61):
        attention = {
            "q_a": (1536, width),
            "q_b": (heads * 192, 1536),
            "kv_a": (576, width),
            "kv_b": (heads * 256, 512),
            "o": (width, heads * 128),
        }
        inner = dense if i == 0 else hidden
        mlp = {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
        specs += [TensorSpec(f"layers.{i}.{n}", s) for n, s in {**attention, **mlp}.items()]
        if i == 0:
            continue
        specs.append(TensorSpec(f"layers.{i}.router", (experts, width)))
        for name, shape in mlp.items():
            path = f"layers.{i}.experts"
            if stacked:
                specs.append(TensorSpec(f"{path}.{name}", (experts, *shape)))
            else:
                specs += [TensorSpec(f"{path}.{e}.{name}", shape) for e in range(experts)]
    return specs


MODELS: dict[str, Callable[[], list[TensorSpec]]] = {
    "Llama-7B": Dense(32, 4096, 11008, 4096, 4096).specs,
    "Llama-70B": Dense(80, 8192, 28672, 8192, 1024).specs,
    "Qwen3-32B": Dense(64, 5120, 25600, 8192, 1024).specs,
    "Kimi-K2": lambda: kimi_k2(stacked=False),
    "Kimi-K2, stacks": lambda: kimi_k2(stacked=True),
}


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
        specs = MODELS[model]()
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
        specs = MODELS[name]()
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
        specs = kimi_k2(stacked=stacked)
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
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
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

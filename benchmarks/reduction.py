"""Gradients to their shards: one permutation over the whole model, or windows of a few blocks.

    OMP_NUM_THREADS=1 python benchmarks/reduction.py --ranks 2 4

The drift-bounded order moves matrices of equal cost across the whole model, so that a bucket of
gradients goes to the ranks in uneven parts: an all-to-all and a local sum. Kept within windows of a
few blocks, each window could be one even reduce-scatter, at the price of balancing each window by
itself. Measured here are both, with gradients of the step benchmark's model in DDP's order (last
block first), and what the windows cost in balance and moved state. One JSON line a variant.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from distmuon.collectives import Communicator
from distmuon.cost import default_cost_model
from distmuon.failure import Topic
from distmuon.layout import Layout, TensorSpec
from distmuon.ownership import Ownership, assign
from distmuon.reduction import Member, ReductionPlan, plan_reduction

REDUCE = Topic("reduce")


@dataclass(frozen=True)
class Arrangement:
    """Windows with their layouts, and which gradients travel together.

    Attributes:
        name: How it is called in the result.
        owners: Ownership of each window, in the order of the backward pass.
        groups: Gradients that are sent in one message.
        even: Whether a message is one whole window, which a reduce-scatter could take.
    """

    name: str
    owners: tuple[Ownership, ...]
    groups: tuple[tuple[Member, ...], ...]
    even: bool

    @property
    def layouts(self) -> list[Layout]:
        """Layout of each window."""
        return [owner.layout for owner in self.owners]


def block(index: int, dim: int) -> list[TensorSpec]:
    """The matrices of one block of the step benchmark's model."""
    shapes = {
        "qkv": (3 * dim, dim),
        "proj": (dim, dim),
        "fc": (4 * dim, dim),
        "fc2": (dim, 4 * dim),
    }
    return [TensorSpec(f"{index}.{name}", shape) for name, shape in shapes.items()]


def arrangements(blocks: int, dim: int, world_size: int, bucket_numel: int) -> list[Arrangement]:
    """The whole model permuted, sent by DDP's buckets, and windows of 1, 2, 4 blocks."""
    model = default_cost_model("cpu")
    backward = [block(index, dim) for index in reversed(range(blocks))]
    made = []
    for width in (blocks, 1, 2, 4):
        windows = [backward[i : i + width] for i in range(0, blocks, width)]
        owners, places = [], {}
        for number, window in enumerate(windows):
            specs = [spec for each in window for spec in each]
            owners.append(assign(specs, world_size, model=model))
            order = owners[-1].layout.specs
            places |= {spec.name: Member(number, at) for at, spec in enumerate(order)}
        groups: list[list[Member]] = [[]]
        filled = 0
        for spec in (spec for each in backward for spec in each):
            window_ends = (
                width < blocks and groups[-1] and groups[-1][0].bucket != places[spec.name].bucket
            )
            if window_ends or (width == blocks and filled >= bucket_numel):
                groups.append([])
                filled = 0
            groups[-1].append(places[spec.name])
            filled += spec.numel
        name = "whole model" if width == blocks else f"windows of {width}"
        made.append(
            Arrangement(name, tuple(owners), tuple(map(tuple, groups)), even=width < blocks)
        )
    return made


def balance(arrangement: Arrangement, world_size: int) -> dict[str, float]:
    """Largest load over the mean, share of the state that is moved, largest receiver over mean."""
    model = default_cost_model("cpu")
    loads = [0] * world_size
    moved = total = 0
    for owner in arrangement.owners:
        for index, rank in enumerate(owner.owners):
            loads[rank] += model.work(owner.layout.specs[index].shape)
            held = owner.layout.holders(index)
            moved += sum(segment.numel for segment in held if segment.rank != rank)
            total += owner.layout.specs[index].numel
    uneven = [
        max(counts) * world_size / sum(counts)
        for group in arrangement.groups
        if (counts := plan_reduction(group, arrangement.layouts, 0).counts)
    ]
    return {
        "load_max_over_mean": round(max(loads) * world_size / sum(loads), 3),
        "moved": round(moved / total, 4),
        "receiver_max_over_mean": round(statistics.mean(uneven), 2),
    }


def all_to_all(
    grads: list[list[Tensor]],
    arrangement: Arrangement,
    plans: list[ReductionPlan],
    comm: Communicator,
) -> list[Tensor]:
    """Every group on its way, then each summed: what `hook` and `owned` do."""
    flying = []
    for plan in plans:
        send = torch.cat(
            [
                grads[m.bucket][m.tensor].view(-1)[s.tensor_start :][: s.numel]
                for m, s in plan.pieces
            ]
        )
        mine = [plan.counts[comm.rank]] * comm.world_size
        flying.append(comm.exchange(send, plan.counts, mine, topic=REDUCE))
    return [
        pending.wait().view(comm.world_size, -1).sum(0).div_(comm.world_size) for pending in flying
    ]


def reduce_scatter(
    grads: list[list[Tensor]], arrangement: Arrangement, comm: Communicator
) -> list[Tensor]:
    """One native reduce-scatter a window."""
    flying = []
    for owner, group in zip(arrangement.owners, grads, strict=True):
        flat = torch.zeros(owner.layout.numel)
        for offset, grad in zip(owner.layout.offsets, group, strict=True):
            flat[offset : offset + grad.numel()] = grad.view(-1)
        out = flat.new_empty(owner.layout.shard_numel)
        flying.append((out, dist.reduce_scatter_tensor(out, flat, async_op=True), flat))
    for out, work, _ in flying:
        work.wait()
        out.div_(comm.world_size)
    return [out for out, _, _ in flying]


def measure(rank: int, world_size: int, options: argparse.Namespace, folder: str) -> None:
    """One rank: the variants take turns."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size
    )
    comm = Communicator(dist.group.WORLD)
    made = arrangements(options.blocks, options.dim, world_size, options.bucket_mib * 2**20 // 4)
    grads = [
        [[torch.randn(spec.shape) for spec in layout.specs] for layout in each.layouts]
        for each in made
    ]
    plans = [[plan_reduction(g, each.layouts, rank) for g in each.groups] for each in made]
    calls = {}
    for each, own, plan in zip(made, grads, plans, strict=True):
        calls[each.name, "all-to-all and sum"] = lambda e=each, g=own, p=plan: all_to_all(
            g, e, p, comm
        )
        if each.even:
            calls[each.name, "reduce_scatter_tensor"] = lambda e=each, g=own: reduce_scatter(
                g, e, comm
            )
    wall: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    cpu: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for turn in range(options.repeats + 1):
        for key, call in calls.items():
            dist.barrier()
            start, used = time.perf_counter(), time.process_time()
            call()
            if turn:
                wall[key].append((time.perf_counter() - start) * 1e3)
                cpu[key].append((time.process_time() - used) * 1e3)
    if rank == 0:
        facts = {each.name: balance(each, world_size) for each in made}
        for key in calls:
            line = {
                "ranks": world_size,
                "arrangement": key[0],
                "message": key[1],
                "messages": next(len(e.groups) for e in made if e.name == key[0]),
                "wall_ms": round(statistics.median(wall[key]), 1),
                "wall_range": [round(min(wall[key]), 1), round(max(wall[key]), 1)],
                "cpu_ms": round(statistics.median(cpu[key]), 1),
                **facts[key[0]],
                "torch": torch.__version__,
            }
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()
    dist.destroy_process_group()


def main() -> None:
    """Run all variants on each number of ranks."""
    parser = argparse.ArgumentParser(description="Gradients to their shards, in two orders.")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--bucket-mib", type=int, default=25, help="as DDP's bucket_cap_mb")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    for world_size in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(measure, args=(world_size, options, str(Path(folder))), nprocs=world_size)


if __name__ == "__main__":
    main()

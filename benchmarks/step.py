"""Forward, backward, gradient reduction and step, beside torch's own optimizers, in one run.

    python -m benchmarks.step --ranks 2 --repeats 7

Every variant has a model of its own; they take turns, one step each, so that a change in the
machine's speed meets all of them. torch.optim.Muon always casts to bfloat16 for Newton-Schulz,
which CPUs without bf16 units emulate at a fraction of the speed: its cast is taken out, so that all
compute in fp32 (the `-bf16` variants leave it in). DeepSpeed's own Muon computes in fp32
too; it is left out with a line if DeepSpeed is not installed. One JSON line per variant goes to
--out.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from benchmarks.torch_muon import newton_schulz_in_fp32
from distmuon.measure import contest
from distmuon.measure.contest import Case, Factory, Result, Track, with_distmuon
from distmuon.options import Reduce


def _distmuon(
    model: nn.Module, group: dist.ProcessGroup, reduce: Reduce, coefficients: str, **options: Any
) -> Case:
    return with_distmuon(model, group, reduce, ns_coefficients=coefficients, **options)


def _in_fp32(make: Factory) -> Factory:
    return lambda model, group: replace(make(model, group), around=newton_schulz_in_fp32)


def _deepspeed(model: nn.Module, method: str) -> Case:
    import deepspeed
    from deepspeed.runtime.zero.muon import original_muon

    # Or it compiles a C++ extension for messages between processes of one machine.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    original_muon.ns_compute_dtype = lambda method: torch.float32
    own = {"ns_method": method, "torch_adam": True}
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "optimizer": {"type": "Muon", "params": {"lr": 1e-3, "momentum": 0.95, **own}},
        "zero_optimization": {"stage": 1},
    }
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return Case(engine, engine, backward=engine.backward)


VARIANTS: dict[str, Factory] = {
    "adamw-ddp": contest.VARIANTS["adamw-ddp"],
    "adamw-zero": contest.VARIANTS["adamw-zero"],
    "muon-ddp": _in_fp32(contest.VARIANTS["muon-ddp"]),
    "muon-zero": _in_fp32(contest.VARIANTS["muon-zero"]),
    "muon-deepspeed": lambda m, g: _deepspeed(m, "standard"),
    "muon-deepspeed-gram": lambda m, g: _deepspeed(m, "gram"),
    "distmuon-ddp-keller": lambda m, g: _distmuon(m, g, "ddp", "keller"),
    "distmuon-ddp-p5": lambda m, g: _distmuon(m, g, "ddp", "p5"),
    "distmuon-ddp": lambda m, g: _distmuon(m, g, "ddp", "auto"),
    "distmuon-hook": lambda m, g: _distmuon(m, g, "hook", "auto"),
    "distmuon-owned": lambda m, g: _distmuon(m, g, "owned", "auto"),
    "distmuon-ddp-bf16": lambda m, g: _distmuon(m, g, "ddp", "p5", ns_dtype="bfloat16"),
    "muon-ddp-bf16": contest.VARIANTS["muon-ddp"],
    "muon-zero-bf16": contest.VARIANTS["muon-zero"],
}
DEFAULT = [name for name in VARIANTS if not name.endswith("bf16")]


def _rank(rank: int, options: argparse.Namespace, rendezvous: str) -> None:
    torch.set_num_threads(1)
    # What DeepSpeed reads; torch.compile is off because its compilation is no part of a step.
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": options.ranks}
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": 0, "DS_ACCELERATOR": "cpu"}
    os.environ.update({key: str(value) for key, value in (ranks | address).items()})
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=options.ranks,
        timeout=datetime.timedelta(minutes=10),
    )
    track = Track(
        options.dim, options.blocks, options.qkv, warmup=options.warmup, repeats=options.repeats
    )
    chosen = {name: VARIANTS[name] for name in options.variants}
    group = dist.group.WORLD
    assert group is not None, "just initialized"
    results = contest.hold(track, chosen, group, torch.device("cpu"))
    if rank == 0:
        _write(options, results)
    dist.destroy_process_group()


def _write(options: argparse.Namespace, results: Sequence[Result]) -> None:
    rows = [asdict(result) for result in results]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    facts = {
        "commit": commit,
        "torch": torch.__version__,
        "device": "cpu",
        "ranks": options.ranks,
        "dim": options.dim,
        "blocks": options.blocks,
        "qkv": options.qkv,
        "load": round(os.getloadavg()[0], 1),
        "repeats": options.repeats,
    }
    if options.out:
        with Path(options.out).open("a") as file:
            file.writelines(json.dumps({**facts, **row}) + "\n" for row in rows)
    rivals = [row for row in rows if str(row["variant"]).startswith("muon-")]
    best, best_cpu = (
        min((float(row[key]) for row in rivals), default=float("nan"))
        for key in ("wall_ms", "cpu_ms_per_rank")
    )
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print(
        "| variant | wall ms, median (min to max) | / best Muon peer | CPU ms per rank | / best |"
    )
    print("|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['variant']} | {row['wall_ms']} ({row['wall_min_ms']} to {row['wall_max_ms']}) "
            f"| {float(row['wall_ms']) / best:.2f} | {row['cpu_ms_per_rank']} "
            f"| {float(row['cpu_ms_per_rank']) / best_cpu:.2f} |"
        )


def main() -> None:
    """Run the contest."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=DEFAULT)
    parser.add_argument("--out", help="file to append JSON lines to")
    parser.add_argument("--qkv", choices=["fused", "separate"], default="fused")
    options = parser.parse_args()
    if importlib.util.find_spec("deepspeed") is None:
        left_out = [name for name in options.variants if "deepspeed" in name]
        options.variants = [name for name in options.variants if name not in left_out]
        print(f"DeepSpeed is not installed: without {', '.join(left_out)}")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (options, f"{folder}/rendezvous"), nprocs=options.ranks)


if __name__ == "__main__":
    main()

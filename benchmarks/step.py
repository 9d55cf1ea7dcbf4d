"""Forward, backward, gradient reduction and step, beside torch's own optimizers, in one run.

    python benchmarks/step.py --ranks 2 --repeats 7

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
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from distmuon import Muon


class Block(nn.Module):
    """The matrices of a GPT block; attention itself is left out: the forward is to be tiny."""

    def __init__(self, dim: int, qkv: Literal["fused", "separate"]) -> None:
        super().__init__()
        parts = [3 * dim] if qkv == "fused" else [dim] * 3
        self.qkv = nn.ModuleList(nn.Linear(dim, rows, bias=False) for rows in parts)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.fc = nn.Linear(dim, 4 * dim, bias=False)
        self.fc2 = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Residual products only, [b, dim] to [b, dim]."""
        q, k, v = torch.cat([part(x) for part in self.qkv], dim=-1).chunk(3, dim=-1)
        x = x + self.proj(q + k + v)
        out: Tensor = x + self.fc2(torch.relu(self.fc(x)))
        return out


@dataclass(frozen=True, slots=True)
class Case:
    """One contestant.

    Attributes:
        wrapped: What the forward pass calls.
        optimizer: What steps; an optimizer or DeepSpeed's engine.
        dtype: "bf16" leaves torch.optim.Muon's cast in.
        backward: Takes the loss.
    """

    wrapped: nn.Module
    optimizer: Any
    dtype: str = "fp32"
    backward: Callable[[Tensor], object] = Tensor.backward


Factory = Callable[[nn.Module], Case]


def _ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def _distmuon(
    model: nn.Module, reduce: str, coefficients: str, ns_dtype: str | None = None
) -> Case:
    optimizer = Muon(
        list(model.named_parameters()),
        process_group=dist.group.WORLD,
        reduce=reduce,  # type: ignore[arg-type]
        ns_coefficients=coefficients,
        ns_dtype=ns_dtype,  # type: ignore[arg-type]
    )
    wrapped = model if reduce == "owned" else _ddp(model)
    if reduce != "ddp":
        optimizer.attach(wrapped)
    return Case(wrapped, optimizer, "bf16" if ns_dtype else "fp32")


def _torch_muon(model: nn.Module, dtype: str = "fp32") -> Case:
    wrapped = _ddp(model)
    return Case(
        wrapped, torch.optim.Muon(model.parameters(), adjust_lr_fn="match_rms_adamw"), dtype
    )


def _zero(model: nn.Module, kind: type[Optimizer], **options: object) -> Case:
    wrapped = _ddp(model)
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), kind, parameters_as_bucket_view=True, lr=1e-3, **options
    )
    return Case(wrapped, optimizer)


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
    "adamw-ddp": lambda m: Case(_ddp(m), torch.optim.AdamW(m.parameters())),
    "adamw-zero": lambda m: _zero(m, torch.optim.AdamW),
    "muon-ddp": _torch_muon,
    "muon-zero": lambda m: _zero(m, torch.optim.Muon, adjust_lr_fn="match_rms_adamw"),
    "muon-deepspeed": lambda m: _deepspeed(m, "standard"),
    "muon-deepspeed-gram": lambda m: _deepspeed(m, "gram"),
    "distmuon-ddp-keller": lambda m: _distmuon(m, "ddp", "keller"),
    "distmuon-ddp-p5": lambda m: _distmuon(m, "ddp", "p5"),
    "distmuon-ddp": lambda m: _distmuon(m, "ddp", "auto"),
    "distmuon-hook": lambda m: _distmuon(m, "hook", "auto"),
    "distmuon-owned": lambda m: _distmuon(m, "owned", "auto"),
    "distmuon-ddp-bf16": lambda m: _distmuon(m, "ddp", "p5", "bfloat16"),
    "muon-ddp-bf16": lambda m: _torch_muon(m, "bf16"),
    "muon-zero-bf16": lambda m: replace(VARIANTS["muon-zero"](m), dtype="bf16"),
}
DEFAULT = [name for name in VARIANTS if not name.endswith("bf16")]


@contextmanager
def _newton_schulz_in(dtype: str) -> Iterator[None]:
    original = Tensor.bfloat16
    if dtype == "fp32":
        Tensor.bfloat16 = lambda self: self.clone()  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Tensor.bfloat16 = original  # type: ignore[method-assign]


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one step: wall from first start to last end, CPU of this rank."""

    wall: float
    cpu: float
    optimizer: float


def _one_step(case: Case, x: Tensor) -> Times:
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    with _newton_schulz_in(case.dtype):
        case.optimizer.zero_grad()
        case.backward(case.wrapped(x).square().mean())
        began = time.perf_counter()
        case.optimizer.step()
        optimizer = time.perf_counter() - began
    cpu = time.process_time() - cpu
    dist.barrier()
    return Times(time.perf_counter() - wall, cpu, optimizer)


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
    cases = {}
    for name in options.variants:
        torch.manual_seed(0)
        blocks = [Block(options.dim, options.qkv) for _ in range(options.blocks)]
        cases[name] = VARIANTS[name](nn.Sequential(*blocks))
    x = torch.randn(8, options.dim, generator=torch.Generator().manual_seed(rank))
    times: dict[str, list[Times]] = {name: [] for name in cases}
    for repeat in range(options.warmup + options.repeats):
        for name, case in cases.items():
            taken = _one_step(case, x)
            if repeat >= options.warmup:
                times[name].append(taken)
    # [Note: teardown] in distmuon/training/world.py: no DDP wrapper may outlive the group.
    del cases, case
    gc.collect()
    everyone: list[Any] = [None] * options.ranks
    dist.all_gather_object(everyone, times)
    if rank == 0:
        _write(options, everyone)
    dist.destroy_process_group()


def _summary(name: str, per_rank: list[list[Times]]) -> dict[str, str | float]:
    """Median and spread over the repeats; a repeat is as slow as its slowest rank."""
    repeats = list(zip(*per_rank, strict=True))
    wall = sorted(1e3 * max(t.wall for t in ranks) for ranks in repeats)
    cpu = [1e3 * statistics.mean(t.cpu for t in ranks) for ranks in repeats]
    step = [1e3 * max(t.optimizer for t in ranks) for ranks in repeats]
    return {
        "variant": name,
        "wall_ms": round(statistics.median(wall), 1),
        "wall_min_ms": round(wall[0], 1),
        "wall_max_ms": round(wall[-1], 1),
        "cpu_ms_per_rank": round(statistics.median(cpu), 1),
        "optimizer_ms": round(statistics.median(step), 1),
    }


def _write(options: argparse.Namespace, everyone: list[dict[str, list[Times]]]) -> None:
    rows = [_summary(name, [times[name] for times in everyone]) for name in options.variants]
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

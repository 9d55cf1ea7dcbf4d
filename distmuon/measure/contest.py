"""Optimizers that train the same model in turns, one step each, on the same ranks."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from distmuon import Muon
from distmuon.options import Reduce

Qkv = Literal["fused", "separate"]
_ROWS = 8  # of the batch: the forward pass is to be tiny


class Block(nn.Module):
    """The matrices of a GPT block; attention itself is left out: the forward is to be tiny."""

    def __init__(self, dim: int, qkv: Qkv) -> None:
        """Make the matrices.

        Args:
            dim: Width of the residual stream.
            qkv: One matrix [3 dim, dim], or three.
        """
        super().__init__()
        parts = [3 * dim] if qkv == "fused" else [dim] * 3
        self.qkv = nn.ModuleList(nn.Linear(dim, rows, bias=False) for rows in parts)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.fc = nn.Linear(dim, 4 * dim, bias=False)
        self.fc2 = nn.Linear(4 * dim, dim, bias=False)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Residual products only, [b, dim] to [b, dim]."""
        q, k, v = torch.cat([part(x) for part in self.qkv], dim=-1).chunk(3, dim=-1)
        x = x + self.proj(q + k + v)
        out: Tensor = x + self.fc2(torch.relu(self.fc(x)))
        return out


@dataclass(frozen=True, slots=True)
class Track:
    """What every contestant trains, and how often.

    Attributes:
        dim: Width of the model.
        blocks: Its depth.
        qkv: Whether q, k and v are one matrix.
        warmup: Steps that are not measured.
        repeats: Steps that are.
    """

    dim: int
    blocks: int
    qkv: Qkv = "fused"
    warmup: int = 2
    repeats: int = 5

    def model(self, device: torch.device) -> nn.Module:
        """A model of its own for each contestant, the same weights everywhere."""
        torch.manual_seed(0)
        blocks = [Block(self.dim, self.qkv) for _ in range(self.blocks)]
        return nn.Sequential(*blocks).to(device)

    def batch(self, device: torch.device) -> Tensor:
        """This rank's rows, [8, dim]."""
        generator = torch.Generator().manual_seed(dist.get_rank())
        return torch.randn(_ROWS, self.dim, generator=generator).to(device)


@dataclass(frozen=True, slots=True)
class Case:
    """One contestant.

    Attributes:
        wrapped: What the forward pass calls.
        optimizer: What steps; an optimizer or a framework's engine.
        around: Entered for each of its steps.
        backward: Takes the loss.
    """

    wrapped: nn.Module
    optimizer: Any
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    backward: Callable[[Tensor], object] = Tensor.backward


Factory = Callable[[nn.Module, dist.ProcessGroup], Case]


def in_ddp(model: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    """Wrap a model.

    Args:
        model: On its device.
        group: The ranks.
    """
    return DistributedDataParallel(model, process_group=group, gradient_as_bucket_view=True)


def with_distmuon(
    model: nn.Module, group: dist.ProcessGroup, reduce: Reduce, **options: Any
) -> Case:
    """Our contestant.

    Args:
        model: On its device.
        group: The ranks.
        reduce: Who averages the gradients.
        **options: For `Muon`.
    """
    named = list(model.named_parameters())
    optimizer = Muon(named, process_group=group, reduce=reduce, **options)
    wrapped = model if reduce == "owned" else in_ddp(model, group)
    if reduce != "ddp":
        optimizer.attach(wrapped)
    return Case(wrapped, optimizer)


def with_zero(
    model: nn.Module, group: dist.ProcessGroup, kind: type[Optimizer], **options: Any
) -> Case:
    """Torch's ZeRO-1 around one of its optimizers, in its fastest form."""
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(),
        kind,
        process_group=group,
        parameters_as_bucket_view=True,
        lr=1e-3,
        **options,
    )
    return Case(in_ddp(model, group), optimizer)


VARIANTS: dict[str, Factory] = {
    "adamw-ddp": lambda m, g: Case(in_ddp(m, g), torch.optim.AdamW(m.parameters())),
    "adamw-zero": lambda m, g: with_zero(m, g, torch.optim.AdamW),
    "muon-ddp": lambda m, g: Case(
        in_ddp(m, g), torch.optim.Muon(m.parameters(), adjust_lr_fn="match_rms_adamw")
    ),
    "muon-zero": lambda m, g: with_zero(m, g, torch.optim.Muon, adjust_lr_fn="match_rms_adamw"),
    "distmuon-ddp": lambda m, g: with_distmuon(m, g, "ddp"),
    "distmuon-hook": lambda m, g: with_distmuon(m, g, "hook"),
    "distmuon-owned": lambda m, g: with_distmuon(m, g, "owned"),
}


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one step: wall from first start to last end, CPU of this rank."""

    wall: float
    cpu: float
    optimizer: float


@dataclass(frozen=True, slots=True)
class Result:
    """Milliseconds of a contestant's steps; a repeat is as slow as its slowest rank.

    Attributes:
        variant: Its name.
        wall_ms: Forward, backward and step: median.
        wall_min_ms: The least.
        wall_max_ms: The most.
        cpu_ms_per_rank: Median of the mean over ranks.
        optimizer_ms: `step()` alone: median.
    """

    variant: str
    wall_ms: float
    wall_min_ms: float
    wall_max_ms: float
    cpu_ms_per_rank: float
    optimizer_ms: float


def hold(
    track: Track, variants: Mapping[str, Factory], group: dist.ProcessGroup, device: torch.device
) -> list[Result]:
    """Let contestants take turns, so that a change in the machine's speed meets all of them.

    Args:
        track: What they train.
        variants: The contestants, by name.
        group: The ranks.
        device: Where the models live.

    Returns:
        One result each, the same on every rank.
    """
    cases = {name: make(track.model(device), group) for name, make in variants.items()}
    x = track.batch(device)
    times: dict[str, list[Times]] = {name: [] for name in cases}
    for repeat in range(track.warmup + track.repeats):
        for name in cases:
            taken = _one_step(cases[name], x, group)
            if repeat >= track.warmup:
                times[name].append(taken)
    # [Note: teardown] in distmuon/training/world.py: no DDP wrapper may outlive the group.
    del cases
    gc.collect()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, times)
    return [_summarize(name, [rank[name] for rank in everyone]) for name in variants]


def _one_step(case: Case, x: Tensor, group: dist.ProcessGroup) -> Times:
    dist.barrier(group)
    wall, cpu = time.perf_counter(), time.process_time()
    with case.around():
        case.optimizer.zero_grad()
        case.backward(case.wrapped(x).square().mean())
        settle(x.device)
        began = time.perf_counter()
        case.optimizer.step()
        settle(x.device)
        optimizer = time.perf_counter() - began
    cpu = time.process_time() - cpu
    dist.barrier(group)
    return Times(time.perf_counter() - wall, cpu, optimizer)


def settle(device: torch.device) -> None:
    """Wait for the device, so that a clock reads what it really did."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _summarize(name: str, per_rank: Sequence[Sequence[Times]]) -> Result:
    repeats = list(zip(*per_rank, strict=True))
    wall = sorted(1e3 * max(t.wall for t in ranks) for ranks in repeats)
    cpu = [1e3 * statistics.mean(t.cpu for t in ranks) for ranks in repeats]
    step = [1e3 * max(t.optimizer for t in ranks) for ranks in repeats]
    return Result(
        name,
        round(statistics.median(wall), 2),
        round(wall[0], 2),
        round(wall[-1], 2),
        round(statistics.median(cpu), 2),
        round(statistics.median(step), 2),
    )

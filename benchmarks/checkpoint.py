"""Time, bytes and memory of saving and loading a sharded optimizer, beside torch.save of the same.

    python benchmarks/checkpoint.py --parameters 100e6 --ranks 2 --repeats 3

The state is Muon's momentum of square matrices, random bits. Each variant saves the same tensors
and makes its files durable (torch.save with an fsync after it). "extra" is the growth of a rank's
resident memory at its peak, as the kernel counts it, over what it had when the call began.
One JSON line per variant goes to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from distmuon import Muon, checkpoint
from distmuon.checkpoint import PendingSave

SIDE = 1024


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one call on the slowest or largest rank.

    Attributes:
        seconds: Wall clock.
        extra_mb: Growth of resident memory at its peak, in 2**20 bytes.
        file_mb: What lies on the disk afterwards, all ranks together.
    """

    seconds: float
    extra_mb: float
    file_mb: float


@dataclass(frozen=True, slots=True)
class Setting:
    """A rank's model and optimizer, and where to write.

    Attributes:
        model: Matrices.
        optimizer: Opened, its state random.
        folder: Shared.
    """

    model: nn.ParameterDict
    optimizer: Muon
    folder: Path


def _build(parameters: float) -> tuple[nn.ParameterDict, Muon]:
    count = max(1, round(parameters / SIDE**2))
    model = nn.ParameterDict({f"m{i}": torch.randn(SIDE, SIDE) for i in range(count)})
    optimizer = Muon(list(model.named_parameters()), process_group=dist.group.WORLD)
    for bucket in optimizer.open():
        for tensor in bucket.shard.state.values():
            tensor.normal_()
    return model, optimizer


def _save_state(setting: Setting) -> PendingSave:
    return checkpoint.save(setting.folder / "ours", setting.optimizer)


def _save_all(setting: Setting) -> PendingSave:
    return checkpoint.save(setting.folder / "ours", setting.optimizer, model=setting.model)


def _save_async(setting: Setting) -> PendingSave:
    return checkpoint.save(setting.folder / "ours", setting.optimizer, async_save=True)


def _load(setting: Setting) -> None:
    checkpoint.load(setting.folder / "ours", setting.optimizer)


def _torch_shard(setting: Setting) -> None:
    state = [dict(bucket.shard.state) for bucket in setting.optimizer.open()]
    _torch_save(state, setting.folder / f"shard-{dist.get_rank()}.pt")
    dist.barrier()


def _torch_whole(setting: Setting) -> None:
    setting.optimizer.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        _torch_save(setting.optimizer.state_dict(), setting.folder / "whole.pt")
    dist.barrier()
    # The whole state is kept for further calls of state_dict() until the next step.
    setting.optimizer.open("write")


def _torch_save(content: object, path: Path) -> None:
    torch.save(content, path)
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


Action = Callable[[Setting], PendingSave | None]
VARIANTS: dict[str, Action] = {
    "checkpoint.save, state": _save_state,
    "checkpoint.load, state": _load,
    "checkpoint.save, state, async: until it returns": _save_async,
    "checkpoint.save, state and parameters": _save_all,
    "torch.save, each rank its shard": _torch_shard,
    "consolidate_state_dict and torch.save on rank 0": _torch_whole,
}


def _memory(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def _measure(action: Action, setting: Setting) -> Cost:
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, began = _memory("VmRSS"), time.perf_counter()
    pending = action(setting)
    seconds, extra = time.perf_counter() - began, _memory("VmHWM") - before
    if pending is not None:
        pending.wait()
    size = sum(f.stat().st_size for f in setting.folder.rglob("*") if f.is_file()) / 2**20
    costs: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(costs, (seconds, extra, size))
    return Cost(*(max(column) for column in zip(*costs, strict=True)))


def _rank(rank: int, options: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=options.ranks
    )
    model, optimizer = _build(options.parameters)
    shard = sum(bucket.shard.state_bytes for bucket in optimizer.open()) / 2**20
    rows: dict[str, list[Cost]] = {name: [] for name in VARIANTS}
    for _ in range(options.repeats):
        for name, action in VARIANTS.items():
            place = Path(folder) / "files"
            if rank == 0 and action is not _load:
                shutil.rmtree(place, ignore_errors=True)
                place.mkdir()
            dist.barrier()
            rows[name].append(_measure(action, Setting(model, optimizer, place)))
    if rank == 0:
        _report(rows, shard, options)
    dist.destroy_process_group()


def _report(rows: dict[str, list[Cost]], shard: float, options: argparse.Namespace) -> None:
    print(f"torch {torch.__version__}, {options.ranks} ranks, one shard is {shard:.0f} MiB")
    lines = []
    for name, costs in rows.items():
        seconds = sorted(cost.seconds for cost in costs)
        extra, size = max(cost.extra_mb for cost in costs), costs[-1].file_mb
        print(
            f"| {name} | {statistics.median(seconds):.2f} ({seconds[0]:.2f} to {seconds[-1]:.2f}) "
            f"| {size:.0f} | {extra:.0f} |"
        )
        lines += [json.dumps({"variant": name, **asdict(cost)}) for cost in costs]
    if options.out:
        Path(options.out).write_text("\n".join(lines) + "\n")


def main() -> None:
    """Start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parameters", type=float, default=100e6)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", help="where to write; default: a temporary folder")
    parser.add_argument("--out", help="file for JSON lines")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        mp.spawn(_rank, args=(options, folder), nprocs=options.ranks)


if __name__ == "__main__":
    main()

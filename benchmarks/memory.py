"""Memory of the main job as its ranks measure it, beside what `distmuon estimate` says.

    python benchmarks/memory.py                                  # the table of docs/plan.md
    python benchmarks/memory.py --config configs/tiny.yaml --ranks 4

Each rank trains three steps of the configuration under the allocator's record. "Held" is what is
allocated when the optimizer's step begins: parameters, gradients, state, and DDP's buckets. "Most"
is the most that was allocated during that step. Of the ranks' held bytes the least are taken: their
parts are equal, and a buffer that the backend's own thread frees is not recorded as freed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from distmuon.forecast.memory import KINDS, Kind, estimate_memory
from distmuon.forecast.sources import open_source
from distmuon.training.config import Config
from distmuon.training.config_file import load_config
from distmuon.training.data import load_corpus
from distmuon.training.trainer import Trainer, build_trainer
from distmuon.training.world import World

STEPS = 3
SETTLING_SECONDS = 0.3


class Measured(NamedTuple):
    """Bytes of one rank.

    Attributes:
        held: Allocated when the optimizer's step begins.
        most: Allocated at most during it.
    """

    held: int
    most: int


def measure(config: Config, kind: Kind) -> Measured:
    """Train three steps on this rank. The process group exists, or there is one rank.

    Args:
        config: Of the run.
        kind: Which optimizer.
    """
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    group = dist.group.WORLD if dist.is_initialized() else None
    world = World(rank, size, torch.device("cpu"), group)
    name: Literal["muon", "adamw"] = "muon" if kind == "distmuon" else "adamw"
    config = replace(config, optimizer=replace(config.optimizer, name=name))
    corpus = load_corpus(config.data)
    with _record() as before:
        trainer = build_trainer(config, corpus, world)
        if kind == "adamw-ddp":
            trainer = _without_zero(trainer)
        for step in range(STEPS - 1):
            trainer.step(step)
            # The backend's thread holds on to a bucket for a moment. Were it the last to do so, its
            # freeing would not be recorded: only this thread's is.
            time.sleep(SETTLING_SECONDS)
        trainer.engine.zero_grad()
        trainer.forward_backward(STEPS)
    held, _ = _allocated(before)
    with _record() as during:
        trainer.engine.update()
    _, most = _allocated(during)
    return Measured(held, held + most)


def _record() -> profile:
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def _without_zero(trainer: Trainer) -> Trainer:
    settings = trainer.optimizer.param_groups
    plain = torch.optim.AdamW(
        [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in settings],
        lr=settings[0]["lr"],
    )
    engine: Any = trainer.engine
    return replace(trainer, optimizer=plain, engine=replace(engine, optimizer=plain))


def _allocated(recorded: Any) -> tuple[int, int]:
    """Bytes allocated in all and not freed, and the most at any moment."""
    held = most = 0
    events = recorded.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return held, most


def main() -> None:
    """Measure, or start the ranks that do."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/shakespeare.yaml")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--kind", choices=get_args(Kind), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.kind is not None:
        _run_rank(arguments)
        return
    source = open_source(arguments.config)
    estimated = estimate_memory(
        source.model,
        world_size=arguments.ranks,
        groups=source.groups,
        options=source.options,
    )
    print("| optimizer | held, estimated | measured | most in a step, estimated | measured |")
    print("|---|---|---|---|---|")
    for kind in KINDS:
        found = _start(arguments, kind)
        mine = estimated[kind]
        held = min(each.held for each in found)
        most = held + max(each.most - each.held for each in found)
        print(
            f"| {kind} | {mine.held:,} | {held:,} ({mine.held / held - 1:+.1%}) | {mine.most:,} | "
            f"{most:,} ({mine.most / most - 1:+.1%}) |",
            flush=True,
        )


def _start(arguments: argparse.Namespace, kind: Kind) -> list[Measured]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(arguments.ranks), __file__]
        command += ["--config", arguments.config, "--kind", kind, "--out", folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment, stderr=subprocess.DEVNULL)
        return [Measured(*json.loads(path.read_text())) for path in Path(folder).iterdir()]


def _run_rank(arguments: argparse.Namespace) -> None:
    dist.init_process_group("gloo")
    found = measure(load_config(arguments.config), arguments.kind)
    (arguments.out / str(dist.get_rank())).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

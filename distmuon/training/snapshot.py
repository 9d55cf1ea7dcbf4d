"""A training run's whole state, to a checkpoint and back."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distmuon import Muon, checkpoint
from distmuon import deepspeed as zero
from distmuon.checkpoint import CheckpointError
from distmuon.deepspeed import ZeroOrtho
from distmuon.training.config import ConfigError
from distmuon.training.metrics import Interval, Progress
from distmuon.training.optimizers import load_whole_state, place_schedule, whole_state
from distmuon.training.trainer import Trainer
from distmuon.training.world import World


def save_snapshot(trainer: Trainer, progress: Progress, path: Path, *, text: str) -> None:
    """Write a checkpoint and remove the oldest beyond `run.keep_latest`. A collective.

    Args:
        trainer: model, optimizer, schedule and configuration.
        progress: rank 0's.
        path: of the checkpoint, inside the folder of its siblings.
        text: fingerprint of the text.

    Raises:
        ConfigError: on every rank, if it cannot be written; the earlier ones are still there.
    """
    metadata = {
        "config": asdict(trainer.config),
        "progress": asdict(progress),
        "schedule": {"last_epoch": trainer.schedule.last_epoch},
        "text": text,
    }
    own, keep = _random_states(trainer.world), trainer.config.run.keep_latest or None
    rest: dict[str, Any] = {"metadata": metadata, "rank_tensors": own, "keep_latest": keep}
    try:
        if isinstance(trainer.optimizer, ZeroOrtho):
            zero.save(path, trainer.engine.wrapped, **rest).wait()
            return
        optimizer = trainer.optimizer if isinstance(trainer.optimizer, Muon) else None
        checkpoint.save(
            path,
            optimizer,
            model=trainer.model,
            tensors=None if optimizer else _whole_state(trainer),
            process_group=trainer.world.group,
            **rest,
        ).wait()
    except CheckpointError as error:
        raise ConfigError(
            f"run.dir: step {progress.step} is not saved: {error}", entry="run-folder"
        ) from error


def load_snapshot(trainer: Trainer, path: Path) -> Progress:
    """Put a checkpoint's state into a new trainer, of any world size. A collective.

    Hyperparameters stay those of the configuration.

    Raises:
        ConfigError: on every rank, if the checkpoint is damaged or of another model.
    """
    optimizer = trainer.optimizer
    options = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    try:
        loaded = _load(trainer, path)
    except CheckpointError as error:
        raise ConfigError(f"run.resume: {error}", key="run.resume", entry="resume") from error
    for group, mine in zip(optimizer.param_groups, options, strict=True):
        group.update(mine)
    saved = dict(loaded.metadata["progress"])
    progress = Progress(**{**saved, "interval": Interval(**saved["interval"])})
    place_schedule(trainer.schedule, loaded.metadata["schedule"]["last_epoch"])
    _restore_random_states(trainer, loaded.rank_tensors, progress.step)
    return progress


def _load(trainer: Trainer, path: Path) -> checkpoint.Loaded:
    optimizer = trainer.optimizer
    if isinstance(optimizer, ZeroOrtho):
        return zero.load(path, trainer.engine.wrapped)
    _settle_buckets(trainer)
    muon = optimizer if isinstance(optimizer, Muon) else None
    group = trainer.world.group
    loaded = checkpoint.load(path, muon, model=trainer.model, process_group=group)
    if muon is None:
        name = trainer.config.optimizer.name
        load_whole_state(optimizer, trainer.model, name, loaded.tensors)
    return loaded


def _whole_state(trainer: Trainer) -> dict[str, Tensor]:
    return whole_state(trainer.optimizer, trainer.model, trainer.config.optimizer.name)


def _settle_buckets(trainer: Trainer) -> None:
    """Let DDP sort its buckets now.

    It does so after its first backward pass, by the order in which gradients were ready. A sum
    over more than two ranks depends, in its last bits, on where an element lies in its bucket: a
    run that goes on must have the order that the uninterrupted one had at that step.
    """
    trainer.forward_backward(0)
    trainer.optimizer.zero_grad(set_to_none=True)
    if isinstance(trainer.optimizer, Muon) and trainer.optimizer.qk_clip:
        trainer.optimizer.qk_clip.discard()


def _random_states(world: World) -> dict[str, Tensor]:
    states = {"rng.cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        states["rng.cuda"] = torch.cuda.get_rng_state(world.device)
    return states


def _restore_random_states(trainer: Trainer, saved: Mapping[str, Tensor] | None, step: int) -> None:
    world, seed = trainer.world, trainer.config.run.seed
    if saved is None:
        # Other ranks than there were. A text seed goes through SHA-512, as in data.py.
        draw = random.Random(f"distmuon rank {seed} {world.size} {world.rank} {step}")
        torch.manual_seed(draw.getrandbits(63))
        return
    torch.set_rng_state(saved["rng.cpu"])
    if world.device.type == "cuda" and "rng.cuda" in saved:
        torch.cuda.set_rng_state(saved["rng.cuda"], world.device)

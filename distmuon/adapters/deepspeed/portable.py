"""Checkpoints of `distmuon.checkpoint` from a DeepSpeed engine, and back into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from distmuon import checkpoint
from distmuon.adapters.deepspeed.optimizer import ZeroOrtho
from distmuon.adapters.deepspeed.partition import PLACE, Partition
from distmuon.adapters.deepspeed.stepping import show_state
from distmuon.checkpoint.errors import CheckpointError
from distmuon.checkpoint.folders import absolute
from distmuon.checkpoint.manifest import read_manifest
from distmuon.checkpoint.sharded import AnyBucket
from distmuon.checkpoint.together import all_ranks
from distmuon.collectives import Communicator
from distmuon.errors import see

# What a group says about its place in this engine, and not about its hyperparameters.
_HERE = ("params", "index", *PLACE)


@dataclass(frozen=True, slots=True)
class _View:
    """The optimizer by parameters instead of partitions, as `checkpoint.sharded.Sharded` has it.

    Attributes:
        optimizer: DeepSpeed's.
        param_groups: Its hyperparameters, with the model's parameters; copies.
        parameter_names: FQN of each parameter.
    """

    optimizer: ZeroOrtho
    param_groups: list[dict[str, Any]]
    parameter_names: Mapping[Tensor, str]

    @property
    def communicator(self) -> Communicator:
        return self.optimizer.communicator

    def open(self, mode: Literal["read", "write"] = "read") -> Sequence[AnyBucket]:
        opened = []
        for position, partition in enumerate(_partitions(self.optimizer)):
            bucket = partition.bucket
            state = self.optimizer.ensure_state(partition)
            show_state(partition, state, self.optimizer.momentum_key)
            groups = (position,) * len(bucket.spec.parameters)
            opened.append(replace(bucket, spec=replace(bucket.spec, groups=groups)))
        return opened


def save(
    path: str | Path,
    engine: Any,
    *,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    rank_tensors: Mapping[str, Tensor] | None = None,
    async_save: bool = False,
    keep_latest: int | None = None,
) -> checkpoint.PendingSave:
    """Write an engine's weights and optimizer state as `distmuon.checkpoint.save` does.

    The checkpoint appears whole or not at all, has no pickle in it, and loads on any number of
    ranks, here or into `distmuon.Muon`. DeepSpeed's own counters and scheduler are not in it. A
    collective.

    Args:
        path: The checkpoint's own folder, on a file system that all ranks share.
        engine: In ZeRO stage 1 or 2, with the optimizer of `from_model`.
        metadata: As `distmuon.checkpoint.save`, like all that follow.
        tensors: Whole tensors by name.
        rank_tensors: Each rank's own.
        async_save: Whether files are written behind training.
        keep_latest: Newest checkpoints to keep.

    Returns:
        The save; complete unless `async_save`.

    Raises:
        CheckpointError: as `distmuon.checkpoint.save`.
        ValueError: for an engine that has no such optimizer, or a mode that is not supported.
    """
    return checkpoint.save(
        path,
        _view(engine),
        model=engine.module,
        metadata=metadata,
        tensors=tensors,
        rank_tensors=rank_tensors,
        async_save=async_save,
        keep_latest=keep_latest,
    )


def load(path: str | Path, engine: Any) -> checkpoint.Loaded:
    """Load what `save` or `distmuon.checkpoint.save` wrote, on any number of ranks. A collective.

    Args:
        path: The checkpoint's folder.
        engine: As for `save`, before its first step or after; nothing is half-way accumulated.

    Returns:
        What else the checkpoint holds.

    Raises:
        CheckpointError: as `distmuon.checkpoint.load`; also if a partition's parameters were not
            all updated equally often, which ZeRO cannot express. Nothing has been changed then.
        ValueError: as `save`.
    """
    view = _view(engine)
    all_ranks(view.communicator, partial(_refuse_uneven, path, view))
    loaded = checkpoint.load(path, view, model=engine.module)
    optimizer = view.optimizer
    for partition in _partitions(optimizer):
        optimizer.ensure_state(partition)["step"] = partition.bucket.shard.steps[0]
    for group, restored in zip(optimizer.param_groups, view.param_groups, strict=True):
        group.update({key: value for key, value in restored.items() if key not in _HERE})
    return loaded


def _view(engine: Any) -> _View:
    optimizer = engine.basic_optimizer
    if not isinstance(optimizer, ZeroOrtho):
        raise ValueError(
            f"The engine has a {type(optimizer).__name__}. This is for the optimizer of "
            "distmuon.deepspeed.from_model." + see("deepspeed")
        )
    partitions = _partitions(optimizer)
    missing = None
    if not partitions:
        missing = "In stage 0 nothing is sharded"
    elif len({partition.communicator for partition in partitions}) > 1:
        missing = "Experts are partitioned over other ranks than the rest"
    elif engine.fp16_enabled():
        missing = "The loss scale of fp16 has no place in this kind of checkpoint"
    if missing is not None:
        raise ValueError(f"{missing}: use engine.save_checkpoint." + see("deepspeed"))
    groups: list[dict[str, Any]] = []
    names: dict[Tensor, str] = {}
    for group, partition in zip(optimizer.param_groups, partitions, strict=True):
        partition.refuse_other_rule(group)
        spec = partition.bucket.spec
        options = {key: value for key, value in group.items() if key not in _HERE}
        groups.append({**options, "params": list(spec.parameters)})
        names.update(zip(spec.parameters, spec.names, strict=True))
    return _View(optimizer, groups, names)


def _partitions(optimizer: ZeroOrtho) -> list[Partition]:
    """In the order of the groups that DeepSpeed has left."""
    found = optimizer.partitions
    return [found[group["index"]] for group in optimizer.param_groups] if found else []


def _refuse_uneven(path: str | Path, view: _View) -> None:
    saved = read_manifest(absolute(path)).parameters
    for group in view.param_groups:
        names = [view.parameter_names[parameter] for parameter in group["params"]]
        steps = {name: saved[name].step for name in names if name in saved}
        if len(set(steps.values())) > 1:
            least, most = min(steps, key=steps.__getitem__), max(steps, key=steps.__getitem__)
            raise CheckpointError(
                f"{path} has {steps[least]} updates of {least} and {steps[most]} of {most}. ZeRO "
                "counts those of a whole group. Freeze the parameter that gets no gradient, or go "
                "on without DeepSpeed.",
                entry="checkpoint-mismatch",
            )

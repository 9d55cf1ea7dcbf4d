"""Reading a checkpoint: everything is checked on all ranks before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distmuon.checkpoint.content import (
    expected_state,
    model_entries,
    model_tensors,
    optimizer_parameters,
    other_places,
    parameter_places,
    state_places,
)
from distmuon.checkpoint.errors import CheckpointError
from distmuon.checkpoint.files import Reader, check_content, check_sizes, require_safetensors
from distmuon.checkpoint.folders import absolute
from distmuon.checkpoint.groups import match_groups
from distmuon.checkpoint.manifest import (
    Manifest,
    ParameterEntry,
    TensorEntry,
    read_manifest,
)
from distmuon.checkpoint.saving import settle
from distmuon.checkpoint.sharded import AnyBucket, Sharded
from distmuon.checkpoint.together import all_ranks, find_communicator
from distmuon.collectives import Communicator
from distmuon.failure import Topic

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a checkpoint holds beside optimizer and model.

    Attributes:
        path: The checkpoint's folder.
        metadata: As given to `save`.
        tensors: As given to `save` by rank 0; in host memory.
        rank_tensors: What this rank had given to `save`, in host memory; None if the checkpoint
            was saved by another number of ranks.
        world_size: Number of ranks that saved it.
        versions: Of the distmuon and torch that saved it.
        plan_digest: SHA-256 of the layout that the ranks had; empty without an optimizer.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    rank_tensors: Mapping[str, Tensor] | None
    world_size: int
    versions: Mapping[str, str]
    plan_digest: str


def load(
    path: str | Path,
    optimizer: Sharded | None = None,
    *,
    model: nn.Module | None = None,
    process_group: ProcessGroup | None = None,
) -> Loaded:
    """Load a checkpoint on any number of ranks. A collective.

    Each rank reads only what it needs: its own ranges of the optimizer's state and parameters
    (which are then published to all), and the rest of the model. The ranks share the work of
    hashing the files. No pickle is read, and a folder with a foreign file in it is refused.

    Args:
        path: The checkpoint's folder.
        optimizer: Takes hyperparameters and state, by FQN: parameters may come in another order,
            groups too. Its buffers are allocated if it has not stepped yet.
        model: Takes parameters and buffers, in place.
        process_group: The ranks that load; None for the optimizer's, or without an optimizer the
            default group, if there is one.

    Returns:
        What else the checkpoint holds.

    Raises:
        CheckpointError: on every rank. For a damaged, truncated, missing or foreign file, naming
            it, and for parameters that were added or removed or have another shape, dtype or
            algorithm, naming all of them: nothing has been changed then.
    """
    require_safetensors()
    communicator = find_communicator(optimizer, process_group, model)
    settle()
    folder, manifest = _check_files(path, communicator)
    groups = all_ranks(communicator, partial(_check_fit, manifest, optimizer, model))
    reader = Reader(folder, manifest)
    buckets = optimizer.open("write") if optimizer is not None else ()
    found: list[Loaded] = []

    def read() -> None:
        _fill(reader, manifest, buckets, model)
        found.append(_rest(reader, folder, manifest, communicator))

    # Hashes have been checked, so only a disk that fails just now can stop it half-way.
    all_ranks(communicator, read)
    if model is not None:
        topics = [Topic("load", None, bucket.spec.names) for bucket in buckets]
        flying = [
            communicator.publish(bucket.shard.flat, topic=topic)
            for bucket, topic in zip(buckets, topics, strict=True)
        ]
        for message in flying:
            message.wait()
        for bucket in buckets:
            bucket.shard.adopt()  # DeepSpeed's fp32 weights have a copy of their own
    if optimizer is not None:
        for group, options in zip(optimizer.param_groups, groups[communicator.rank], strict=True):
            group.update(options)
    return found[0]


def _check_files(path: str | Path, communicator: Communicator) -> tuple[Path, Manifest]:
    found: list[tuple[Path, Manifest]] = []

    def check() -> int:
        folder = absolute(path)
        if folder.name.startswith("."):
            raise CheckpointError(f"{folder} is the hidden folder of an unfinished save.")
        manifest = read_manifest(folder)
        check_sizes(folder, manifest)
        for index in range(communicator.rank, len(manifest.files), communicator.world_size):
            check_content(folder, manifest, index)
        found.append((folder, manifest))
        return manifest.saved_at

    if len(set(all_ranks(communicator, check))) > 1:
        raise CheckpointError(
            f"The ranks see different checkpoints at {path}.", entry="checkpoint-not-shared"
        )
    return found[0]


def _check_fit(
    manifest: Manifest, optimizer: Sharded | None, model: nn.Module | None
) -> list[dict[str, Any]]:
    problems: list[str] = []
    groups: list[dict[str, Any]] = []
    if optimizer is not None:
        problems += _compare(
            {name: _describe(each) for name, each in manifest.parameters.items()},
            {name: _describe(each) for name, each in optimizer_parameters(optimizer).items()},
            "optimizer",
        )
        groups, misfits = match_groups(optimizer, manifest)
        # A missing state tensor of a known parameter is no misfit but a damaged checkpoint.
        wanted = expected_state(optimizer) if not problems else {}
        problems += misfits
        problems += [f"{name} is missing" for name in wanted if name not in manifest.tensors]
    if model is not None:
        problems += _compare(
            {
                name.removeprefix("model/"): _describe(each)
                for name, each in manifest.tensors.items()
                if name.startswith("model/")
            },
            {name: _describe(each) for name, each in model_entries(model_tensors(model)).items()},
            "model",
        )
    if problems:
        raise CheckpointError(
            f"The checkpoint does not fit in {len(problems)} places; nothing was changed:\n  "
            + "\n  ".join(problems),
            entry="checkpoint-mismatch",
        )
    return groups


def _describe(entry: ParameterEntry | TensorEntry) -> str:
    algorithm = f"{entry.algorithm} " if isinstance(entry, ParameterEntry) else ""
    return f"{algorithm}{entry.dtype} {list(entry.shape)}"


def _compare(saved: Mapping[str, str], here: Mapping[str, str], what: str) -> list[str]:
    if not saved:
        return [f"the checkpoint was saved without {what}="]
    added = [f"{name} ({here[name]}) is not in it: added?" for name in here if name not in saved]
    removed = [
        f"{name} ({saved[name]}) is not in the {what}: removed?"
        for name in saved
        if name not in here
    ]
    changed = [
        f"{name} is {saved[name]} in the checkpoint and {here[name]} in the {what}"
        for name in here
        if name in saved and saved[name] != here[name]
    ]
    return added + removed + changed


def _fill(
    reader: Reader, manifest: Manifest, buckets: Sequence[AnyBucket], model: nn.Module | None
) -> None:
    tensors = model_tensors(model)
    with torch.no_grad():
        for place in (
            *state_places(buckets),
            *parameter_places(buckets, tensors),
            *other_places(buckets, tensors),
        ):
            if place.data.is_contiguous():
                reader.read_into(place.name, place.start, place.data.view(-1))
            else:
                place.data.copy_(reader.whole(place.name))
    for bucket in buckets:
        bucket.shard.steps[:] = [manifest.parameters[name].step for name in bucket.spec.names]


def _rest(reader: Reader, folder: Path, manifest: Manifest, communicator: Communicator) -> Loaded:
    rank = communicator.rank
    named = [name for name in manifest.tensors if name.startswith("tensors/")]
    own: dict[str, Tensor] | None = None
    if manifest.rank_tensors is not None and manifest.world_size == communicator.world_size:
        table = manifest.rank_tensors[rank]
        own = {name: reader.rank_tensor(rank, name, entry) for name, entry in table.items()}
    return Loaded(
        folder,
        manifest.metadata,
        {name.removeprefix("tensors/"): reader.whole(name) for name in named},
        own,
        manifest.world_size,
        manifest.versions,
        manifest.plan_digest,
    )

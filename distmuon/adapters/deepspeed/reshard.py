"""Load a DeepSpeed checkpoint on another number of ranks, or with another order of parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distmuon.adapters.deepspeed.optimizer import ZeroOrtho
from distmuon.adapters.deepspeed.partition import PLACE, Partition
from distmuon.errors import see
from distmuon.layout import read_spec

_FILE = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")


class _Piece(NamedTuple):
    """Where a parameter lay in the saved flat buffer of its group."""

    shape: list[int]
    offset: int


def load_resharded(
    engine: Any,
    folder: str | Path,
    tag: str | None = None,
) -> dict[str, Any]:
    """Load what `engine.save_checkpoint` saved on any number of ranks. A collective.

    Weights, their fp32 masters, optimizer state, learning rates and the scheduler are those of the
    checkpoint. Every rank reads its own ranges out of all files, which must be visible to it. Like
    `engine.load_checkpoint` it runs pickle: load only files that you trust.

    Args:
        engine: With this adapter's optimizer, before its first step or after.
        folder: As given to `save_checkpoint`.
        tag: As given to `save_checkpoint`; None: the latest.

    Returns:
        The client state.

    Raises:
        ValueError: on every rank, if the checkpoint has other parameters or is another
            optimizer's, or nothing is partitioned (stage 0: `engine.load_checkpoint` does it).
        OSError: on every rank, if a file is missing.
    """
    optimizer = engine.basic_optimizer
    if not isinstance(optimizer, ZeroOrtho):
        raise ValueError(
            f"The engine has a {type(optimizer).__name__}. load_resharded is for the optimizer of "
            "distmuon.deepspeed.from_model." + see("deepspeed")
        )
    partitions = optimizer.partitions
    if not partitions:
        raise ValueError(
            "In stage 0 nothing is sharded: use engine.load_checkpoint." + see("deepspeed")
        )
    problem: Exception | None = None
    found: Sequence[Mapping[str, Any]] = ()
    try:
        tag = tag or (Path(folder) / "latest").read_text().strip()
        found = _read_files(Path(folder) / tag)
        for partition in partitions.values():
            _locate(partition, found[0])
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        problem = error
    optimizer.raise_together(problem)
    _, client_state = engine.load_checkpoint(folder, tag, load_optimizer_states=False)
    with torch.no_grad():
        for group in optimizer.param_groups:
            partition = partitions[group["index"]]
            _fill(optimizer.ensure_state(partition), partition, found)
            saved = _group(found[0], partition.number)
            group.update({k: v for k, v in saved.items() if k not in ("params", *PLACE)})
    if "loss_scaler" in found[0]:
        engine.optimizer.loss_scaler = found[0]["loss_scaler"]
    engine.optimizer.update_lp_params()
    return dict(client_state or {})


def _read_files(folder: Path) -> list[Mapping[str, Any]]:
    """Every rank's optimizer state, in rank order, mapped rather than read."""
    ranks = {int(match[2]): path for path in folder.iterdir() if (match := _FILE.match(path.name))}
    if not ranks or sorted(ranks) != list(range(len(ranks))):
        raise ValueError(
            f"{folder} has optimizer files of ranks {sorted(ranks)}, not of all ranks."
            + see("state-mismatch")
        )
    found = []
    for rank in sorted(ranks):
        # DeepSpeed's own classes are in these files, so they are read as DeepSpeed reads them.
        saved = torch.load(ranks[rank], map_location="cpu", mmap=True, weights_only=False)
        found.append(saved["optimizer_state_dict"])
    groups = found[0]["base_optimizer_state"]["param_groups"]
    if any(key not in group for group in groups for key in PLACE):
        raise ValueError(
            f"{folder} was not saved with an optimizer of distmuon.deepspeed."
            + see("state-mismatch")
        )
    if groups[0]["world_size"] != len(found):
        raise ValueError(
            f"{folder} was saved by {groups[0]['world_size']} ranks but has files of {len(found)}."
            + see("state-mismatch")
        )
    return found


def _group(saved: Mapping[str, Any], number: int) -> Mapping[str, Any]:
    groups = saved["base_optimizer_state"]["param_groups"]
    found: Mapping[str, Any] = next(group for group in groups if group["index"] == number)
    return found


def _locate(partition: Partition, saved: Mapping[str, Any]) -> list[_Piece]:
    """Where the checkpoint has each parameter of a partition, in the partition's order."""
    group = _group(saved, partition.number)
    rows = zip(group["names"], group["shapes"], group["offsets"], strict=True)
    places = {name: _Piece(shape, offset) for name, shape, offset in rows}
    specs = partition.bucket.spec.layout.specs
    for spec in specs:
        place = places.get(spec.name)
        there = None if place is None else read_spec(spec.name, place.shape, group)
        if there != spec:
            words = "it is missing" if there is None else f"{list(there.shape)}{there.reading}"
            raise ValueError(
                f"{spec.name} is {list(spec.shape)}{spec.reading} here, and in group "
                f"{partition.number} of the checkpoint {words}. Build the same model and route it "
                "the same way." + see("state-mismatch")
            )
    if len(places) > len(specs):
        extra = sorted(places.keys() - {spec.name for spec in specs})
        raise ValueError(
            f"The checkpoint also has {extra[0]}; this model does not." + see("state-mismatch")
        )
    return [places[spec.name] for spec in specs]


def _fill(state: dict[str, Any], partition: Partition, found: Sequence[Mapping[str, Any]]) -> None:
    """Copy this rank's range of values and state out of the saved ranges."""
    places = _locate(partition, found[0])
    group = _group(found[0], partition.number)
    position = [each["index"] for each in found[0]["base_optimizer_state"]["param_groups"]].index(
        partition.number
    )
    number = group["params"][0]
    states = [saved["base_optimizer_state"]["state"][number] for saved in found]
    sources = {
        key: [each[key] for each in states]
        for key, value in state.items()
        if isinstance(value, Tensor) and value.stride() == (1,)
    }
    targets = {key: state[key] for key in sources}
    sources["fp32"] = [saved["single_partition_of_fp32_groups"][position] for saved in found]
    targets["fp32"] = partition.bucket.shard.master
    for key, target in targets.items():
        target.zero_()
        for segment in partition.bucket.shard.segments:
            start = places[segment.tensor].offset + segment.tensor_start
            piece = _cut(sources[key], group["shard_numel"], start, segment.numel)
            target[segment.shard_start :][: segment.numel].copy_(piece)
    state["step"] = int(states[0]["step"])


def _cut(shards: Sequence[Tensor], shard_numel: int, start: int, numel: int) -> Tensor:
    """A range of equal shards laid end to end; only the last one may have lost its padding."""
    pieces, position = [], start
    while position < start + numel:
        rank, inside = divmod(position, shard_numel)
        length = min(start + numel - position, shard_numel - inside)
        pieces.append(shards[rank][inside : inside + length])
        position += length
    return torch.cat(pieces)

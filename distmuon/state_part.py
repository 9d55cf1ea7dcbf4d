"""One rank's part of the optimizer state: cut from whole tensors, put together, or handed out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distmuon.buckets import BucketSpec, state_shapes
from distmuon.collectives import Communicator
from distmuon.dcp import StateHandle
from distmuon.layout import Layout, Segment, TensorSpec
from distmuon.options import MATRIX_ALGORITHMS, Algorithm
from distmuon.row_state import KeptLayout

StateByParameter = dict[Tensor, dict[str, Any]]


class Row(NamedTuple):
    """One parameter's state of one name in a part.

    Attributes:
        position: The parameter's place in the flat order.
        parameter: The parameter.
        tensor: Its name, and the shape of the state.
        ranges: Elements that this rank holds of the row-major state, ascending.
        where: Those elements in the rank's buffer; an empty slice if it has none.
    """

    position: int
    parameter: Tensor
    tensor: TensorSpec
    ranges: tuple[range, ...]
    where: slice


@dataclass(frozen=True, slots=True)
class StatePart:
    """One rank's part of a bucket's state, in the engine's buffers or on its way to them.

    Attributes:
        spec: What is in the bucket.
        rank: Whose part it is.
        steps: How often each parameter has been updated, in flat order.
        tensors: Named state, and the fp32 "master" of narrow parameters: each
            [spec.places(name).shard_numel].
    """

    spec: BucketSpec
    rank: int
    steps: list[int]
    tensors: dict[str, Tensor]

    def rows(self, state: str) -> Iterator[Row]:
        """Every parameter that has such state, those that this rank holds nothing of included."""
        return rows(self.spec, self.rank, state)


def rows(spec: BucketSpec, rank: int, state: str) -> Iterator[Row]:
    """Every parameter of a bucket that has a state, with what one rank holds of it.

    Args:
        spec: The bucket.
        rank: The rank.
        state: Name of the state.

    Yields:
        In flat order.
    """
    places = spec.places(state)
    held: defaultdict[int, list[Segment]] = defaultdict(list)
    for segment in places.segments(rank):
        held[segment.tensor].append(segment)
    for index, (parameter, tensor) in enumerate(zip(spec.parameters, places.specs, strict=True)):
        if not tensor.numel:
            continue
        pieces = held[index]
        ranges = tuple(range(p.tensor_start, p.tensor_start + p.numel) for p in pieces)
        where = slice(0, 0)
        if pieces:
            # What a rank holds of one parameter lies in one piece in its buffer.
            where = slice(pieces[0].shard_start, pieces[-1].shard_start + pieces[-1].numel)
        yield Row(index, parameter, tensor, ranges, where)


def wanted_state(
    algorithm: Algorithm, parameter: Tensor, seed: int | None = None
) -> tuple[str, ...]:
    """Names of a parameter's state in a dictionary.

    Muon's rules do not depend on the number of the step, and torch.optim.Muon saves none: a file
    that had it could not be exchanged with torch's. Stochastic rounding depends on it.

    Args:
        algorithm: Its update rule.
        parameter: The parameter.
        seed: Of stochastic rounding, or None; without effect on parameters that are not narrow.
    """
    wide = torch.promote_types(parameter.dtype, torch.float32) == parameter.dtype
    rounded = seed is not None and not wide
    counts = () if algorithm in MATRIX_ALGORITHMS and not rounded else ("step",)
    names = state_shapes(algorithm, TensorSpec("", tuple(parameter.shape)))
    return (*counts, *names, *(() if wide or rounded else ("master",)))


def new_part(spec: BucketSpec, rank: int) -> StatePart:
    """Allocate one rank's part before the first step.

    Args:
        spec: The bucket.
        rank: The rank.

    Returns:
        Zero steps and zero state; the parameters' own values as "master".
    """
    first = spec.parameters[0]
    dtype = torch.promote_types(first.dtype, torch.float32)
    names = _tensor_names(spec)
    tensors = {
        name: torch.zeros(spec.places(name).shard_numel, dtype=dtype, device=first.device)
        for name in names
    }
    part = StatePart(spec, rank, [0] * len(spec.parameters), tensors)
    if "master" in tensors:
        for row in part.rows("master"):
            _copy_slice(row, row.parameter.detach(), tensors["master"])
    return part


def full_state(part: StatePart) -> StateByParameter:
    """State of each parameter of an unsharded bucket.

    Args:
        part: Of a bucket whose layout has world size 1.

    Returns:
        For each parameter its state tensors in its own shape, views of the bucket's buffers, and
        where the rule depends on it the number of its updates, "step".
    """
    return _by_parameter(part, part.tensors)


def gather_full_state(part: StatePart, communicator: Communicator, *, to: int) -> StateByParameter:
    """State of each parameter of a sharded bucket, on one rank. A collective.

    Args:
        part: This rank's part of the bucket.
        communicator: The group it is sharded over.
        to: The rank that receives.

    Returns:
        As `full_state`, in host memory and of its own; empty on the other ranks.
    """
    gathered = {n: communicator.gather(tensor, to=to) for n, tensor in part.tensors.items()}
    if communicator.rank != to:
        return {}
    whole = {name: tensor.cpu() for name, tensor in gathered.items() if tensor is not None}
    return _by_parameter(part, whole)


def handles(part: StatePart) -> StateByParameter:
    """State of each parameter as handles of what this rank holds.

    Args:
        part: This rank's part of the bucket.

    Returns:
        For each parameter a handle for each tensor, and "step" as a float32 scalar where the rule
        depends on it.
    """
    result: StateByParameter = {parameter: {} for parameter in part.spec.parameters}
    for parameter, step in zip(part.spec.parameters, part.steps, strict=True):
        if "step" in wanted_state(part.spec.algorithm, parameter, part.spec.seed):
            result[parameter]["step"] = torch.tensor(float(step))
    for name in _tensor_names(part.spec):
        for row in part.rows(name):
            label, local = f"{name} of {row.tensor.name}", part.tensors[name][row.where]
            handle = StateHandle(label, row.tensor.shape, row.ranges, local)
            result[row.parameter][name] = handle
    return result


def fill(part: StatePart, saved: Mapping[Tensor, Mapping[str, Any]]) -> None:
    """Take this rank's part of every parameter's state.

    Args:
        part: Where the state goes; its world size does not matter.
        saved: Checked by `StateKeeper.check`; without an entry a parameter starts anew.
    """
    for position, parameter in enumerate(part.spec.parameters):
        part.steps[position] = int(saved.get(parameter, {}).get("step", 0))
    for name, tensor in part.tensors.items():
        for row in part.rows(name):
            entry = saved.get(row.parameter, {})
            if name in entry:
                _copy_slice(row, entry[name], tensor)
            elif name != "master":  # without one the parameter's own value is taken, at the step
                tensor[row.where].zero_()


def _tensor_names(spec: BucketSpec) -> tuple[str, ...]:
    wide = "master" not in wanted_state(spec.algorithm, spec.parameters[0], spec.seed)
    return spec.states if wide else (*spec.states, "master")


def _copy_slice(row: Row, value: Tensor, target: Tensor) -> None:
    if isinstance(value, StateHandle):
        target[row.where].copy_(value.local)
        return
    flat, position = value.reshape(-1), row.where.start
    for held in row.ranges:
        target[position : position + len(held)].copy_(flat[held.start : held.stop])
        position += len(held)


def _by_parameter(part: StatePart, flat: Mapping[str, Tensor]) -> StateByParameter:
    spec, result = part.spec, dict[Tensor, dict[str, Any]]()
    for index, (parameter, step) in enumerate(zip(spec.parameters, part.steps, strict=True)):
        whole = {
            name: _whole(spec.places(name), index, each)
            for name, each in flat.items()
            if spec.places(name).specs[index].numel
        }
        counted = "step" in wanted_state(spec.algorithm, parameter, spec.seed)
        result[parameter] = {"step": step, **whole} if counted else whole
    return result


def _whole(places: Layout | KeptLayout, index: int, flat: Tensor) -> Tensor:
    """One parameter's state out of all ranks' shards, end to end: a view where it is one piece."""
    spec = places.specs[index]
    starts = [(p.rank * places.shard_numel + p.shard_start, p.numel) for p in places.holders(index)]
    if all(start + numel == following for (start, numel), (following, _) in pairwise(starts)):
        return flat[starts[0][0] :][: spec.numel].view(spec.shape)
    return torch.cat([flat[start:][:numel] for start, numel in starts]).view(spec.shape)

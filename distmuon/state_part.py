"""One rank's part of the optimizer state: cut from whole tensors, put together, or handed out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distmuon.buckets import BucketSpec, state_names
from distmuon.collectives import Communicator
from distmuon.dcp import StateHandle
from distmuon.layout import TensorSpec
from distmuon.options import Algorithm

StateByParameter = dict[Tensor, dict[str, Any]]


class Row(NamedTuple):
    """One parameter in a part.

    Attributes:
        position: Its place in the flat order.
        parameter: The parameter.
        tensor: Its name and shape.
        start: First element that this rank holds of the row-major parameter.
        where: Those elements in the rank's buffers; an empty slice if it has none.
    """

    position: int
    parameter: Tensor
    tensor: TensorSpec
    start: int
    where: slice


@dataclass(frozen=True, slots=True)
class StatePart:
    """One rank's part of a bucket's state, in the engine's buffers or on its way to them.

    Attributes:
        spec: What is in the bucket.
        rank: Whose part it is.
        steps: How often each parameter has been updated, in flat order.
        tensors: Named state, and the fp32 "master" of narrow parameters: each
            [spec.layout.shard_numel].
    """

    spec: BucketSpec
    rank: int
    steps: list[int]
    tensors: dict[str, Tensor]

    def rows(self) -> Iterator[Row]:
        """Every parameter of the bucket, those that this rank holds nothing of included."""
        return rows(self.spec, self.rank)


def rows(spec: BucketSpec, rank: int) -> Iterator[Row]:
    """Every parameter of a bucket with what one rank holds of it.

    Args:
        spec: The bucket.
        rank: The rank.

    Yields:
        In flat order.
    """
    held = {segment.tensor: segment for segment in spec.layout.segments(rank)}
    for index, (parameter, tensor) in enumerate(
        zip(spec.parameters, spec.layout.specs, strict=True)
    ):
        segment = held.get(index)
        if segment is None:
            yield Row(index, parameter, tensor, 0, slice(0, 0))
        else:
            where = slice(segment.shard_start, segment.shard_start + segment.numel)
            yield Row(index, parameter, tensor, segment.tensor_start, where)


def wanted_state(algorithm: Algorithm, parameter: Tensor) -> tuple[str, ...]:
    """Names of a parameter's state in a dictionary.

    Muon's rule does not depend on the number of the step, and torch.optim.Muon saves none: a file
    that had it could not be exchanged with torch's.

    Args:
        algorithm: Its update rule.
        parameter: The parameter.
    """
    counts = () if algorithm == "muon" else ("step",)
    wide = torch.promote_types(parameter.dtype, torch.float32) == parameter.dtype
    return (*counts, *state_names(algorithm), *(() if wide else ("master",)))


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
    names = [n for n in wanted_state(spec.algorithm, first) if n != "step"]
    tensors = {
        name: torch.zeros(spec.layout.shard_numel, dtype=dtype, device=first.device)
        for name in names
    }
    part = StatePart(spec, rank, [0] * len(spec.parameters), tensors)
    if "master" in tensors:
        for row in part.rows():
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
    result: StateByParameter = {}
    for row in part.rows():
        state: dict[str, Any] = {}
        for name in wanted_state(part.spec.algorithm, row.parameter):
            if name == "step":
                state[name] = torch.tensor(float(part.steps[row.position]))
            else:
                label, local = f"{name} of {row.tensor.name}", part.tensors[name][row.where]
                state[name] = StateHandle(label, row.tensor.shape, row.start, local)
        result[row.parameter] = state
    return result


def fill(part: StatePart, saved: Mapping[Tensor, Mapping[str, Any]]) -> None:
    """Take this rank's part of every parameter's state.

    Args:
        part: Where the state goes; its world size does not matter.
        saved: Checked by `StateKeeper.check`; without an entry a parameter starts anew.
    """
    for row in part.rows():
        entry = saved.get(row.parameter, {})
        part.steps[row.position] = int(entry.get("step", 0))
        for name, tensor in part.tensors.items():
            if name in entry:
                _copy_slice(row, entry[name], tensor)
            elif name != "master":  # without one the parameter's own value is taken, at the step
                tensor[row.where].zero_()


def _copy_slice(row: Row, value: Tensor, target: Tensor) -> None:
    if isinstance(value, StateHandle):
        piece = value.local
    else:
        numel = row.where.stop - row.where.start
        piece = value.reshape(-1)[row.start : row.start + numel]
    target[row.where].copy_(piece)


def _by_parameter(part: StatePart, flat: Mapping[str, Tensor]) -> StateByParameter:
    spec, result = part.spec, dict[Tensor, dict[str, Any]]()
    ends = zip(spec.parameters, spec.layout.specs, spec.layout.offsets, part.steps, strict=True)
    for parameter, tensor, offset, step in ends:
        whole = {n: t[offset : offset + tensor.numel].view(tensor.shape) for n, t in flat.items()}
        counted = "step" in wanted_state(spec.algorithm, parameter)
        result[parameter] = {"step": step, **whole} if counted else whole
    return result

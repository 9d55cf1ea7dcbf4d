"""Optimizer state between a shard's flat buffers and torch's dictionary of whole tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from distmuon.buckets import STATE_NAMES, Bucket
from distmuon.options import Algorithm
from distmuon.shard import Shard

WholeState = Mapping[str, Any]


def full_state(bucket: Bucket) -> dict[Tensor, dict[str, Any]]:
    """State of each parameter of an unsharded bucket.

    Args:
        bucket: A bucket whose layout has world size 1.

    Returns:
        For each parameter its number of updates, "step", and its state tensors in its own shape:
        views of the bucket's buffers.
    """
    shard = bucket.shard
    tensors = _tensors(shard)
    rows = zip(shard.parameters, shard.layout.specs, shard.layout.offsets, shard.steps, strict=True)
    return {
        parameter: {"step": step}
        | {
            name: tensor[offset : offset + spec.numel].view(spec.shape)
            for name, tensor in tensors.items()
        }
        for parameter, spec, offset, step in rows
    }


def load_full_state(bucket: Bucket, saved: Mapping[Tensor, WholeState]) -> None:
    """Take this rank's part of every parameter's whole state.

    Args:
        bucket: Where the state goes; its world size does not matter.
        saved: Checked by `check_saved`.
    """
    shard = bucket.shard
    shard.steps = [int(saved[parameter]["step"]) for parameter in shard.parameters]
    for name, tensor in _tensors(shard).items():
        for segment in shard.segments:
            whole = saved[shard.parameters[segment.tensor]].get(name)
            if whole is not None:
                piece = whole.reshape(-1)[segment.tensor_start :][: segment.numel]
                tensor[segment.shard_start :][: segment.numel].copy_(piece)


def check_saved(
    algorithm: Algorithm, names: Sequence[str], parameters: Sequence[Tensor], saved: Sequence[Any]
) -> None:
    """Refuse state that is partial, foreign or misshaped, before anything is changed.

    Args:
        algorithm: The group's update rule.
        names: FQN of each of its parameters.
        parameters: The parameters.
        saved: The saved state of each; None where the file has none.

    Raises:
        ValueError: naming the parameter, what was expected and what was found.
    """
    wanted = ("step", *STATE_NAMES[algorithm])
    for name, parameter, entry in zip(names, parameters, saved, strict=True):
        found = sorted(entry) if isinstance(entry, Mapping) else []
        if any(key not in found for key in wanted):
            raise ValueError(
                f"The saved state of {name} has {found}. {algorithm} needs {list(wanted)}. "
                "Was it saved by another optimizer, or is it one rank's part of a sharded one?"
            )
        for key in STATE_NAMES[algorithm]:
            value = entry[key]
            if not isinstance(value, Tensor) or value.shape != parameter.shape:
                shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"The saved {key} of {name} is {shape}. Must be a tensor of shape "
                    f"{list(parameter.shape)}."
                )


def _tensors(shard: Shard) -> dict[str, Tensor]:
    masters = {} if shard.master.dtype == shard.flat.dtype else {"master": shard.master}
    return {**shard.state, **masters}

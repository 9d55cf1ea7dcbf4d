"""Optimizer state between a shard's flat buffers and torch's dictionary of whole tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from distmuon.buckets import STATE_NAMES, Bucket
from distmuon.collectives import Communicator
from distmuon.failure import Topic
from distmuon.options import Algorithm

WholeState = Mapping[str, Any]


class StateKeeper:
    """Whole state on its way in or out: loaded before there are buffers, or gathered for saving."""

    def __init__(self, communicator: Communicator) -> None:
        """Keep nothing yet.

        Args:
            communicator: The group that state is sharded over.
        """
        self._communicator = communicator
        self._loaded: Mapping[Tensor, WholeState] | None = None
        self._gathered: Mapping[Tensor, WholeState] | None = None
        self._gathered_to: int | None = None

    def consolidate(self, buckets: Sequence[Bucket], *, to: int) -> None:
        """Gather the state of all buckets on one rank. A collective.

        Args:
            buckets: Where the state is.
            to: The rank that receives.

        Raises:
            ValueError: if `to` is not a rank.
        """
        if not 0 <= to < self._communicator.world_size:
            raise ValueError(f"Invalid {to=}. Must be in [0, {self._communicator.world_size}).")
        state: dict[Tensor, WholeState] = {}
        for bucket in buckets:
            with self._communicator.during(Topic("consolidate", None, bucket.spec.names)):
                state.update(gather_full_state(bucket, self._communicator, to=to))
        self._gathered_to = to
        self._gathered = state if self._communicator.rank == to else None

    def forget_gathered(self) -> None:
        """What was gathered is no longer the state."""
        self._gathered, self._gathered_to = None, None

    def whole(self, buckets: Sequence[Bucket]) -> Mapping[Tensor, WholeState]:
        """State of every parameter. Never a collective.

        Args:
            buckets: Where the state is; none before the first step.

        Returns:
            For each parameter its state.

        Raises:
            RuntimeError: if this rank has only its part.
        """
        world_size = self._communicator.world_size
        if not buckets:
            return self._loaded or {}
        if world_size == 1:
            return {p: state for bucket in buckets for p, state in full_state(bucket).items()}
        if self._gathered is not None:
            return self._gathered
        where = "" if self._gathered_to is None else f"Rank {self._gathered_to} has the whole. "
        raise RuntimeError(
            f"This rank holds 1/{world_size} of the optimizer state, and state_dict() does not "
            f"communicate: saved as it is, the other shards would be lost. {where}Call "
            "consolidate_state_dict(to=0) on every rank after the step, then state_dict() on rank "
            "0 alone."
        )

    def load(
        self,
        groups: Sequence[Mapping[str, Any]],
        names: Mapping[Tensor, str],
        saved: Mapping[str, Any],
    ) -> None:
        """Check a whole state dictionary and keep it until there are buffers.

        Args:
            groups: `param_groups`.
            names: FQN of each parameter.
            saved: From `state_dict`, of the same groups.

        Raises:
            ValueError: for state that is partial, foreign or misshaped.
        """
        loaded: dict[Tensor, WholeState] = {}
        if saved["state"]:
            for here, there in zip(groups, saved["param_groups"], strict=True):
                entries = [saved["state"].get(key) for key in there["params"]]
                fqns = [names[parameter] for parameter in here["params"]]
                check_saved(here["algorithm"], fqns, here["params"], entries)
                # Copies: another optimizer's dictionary holds the tensors that it goes on updating.
                loaded.update(zip(here["params"], map(copy.deepcopy, entries), strict=True))
        self._loaded = loaded
        self.forget_gathered()

    def deliver(self, buckets: Sequence[Bucket]) -> None:
        """Put what was loaded into the buffers.

        Args:
            buckets: Where the state goes; none before the first step, when it is kept.
        """
        if self._loaded is None or not buckets:
            return
        for bucket in buckets:
            bucket.shard.reset()
            if self._loaded:
                load_full_state(bucket, self._loaded)
        self._loaded = None


def full_state(bucket: Bucket) -> dict[Tensor, dict[str, Any]]:
    """State of each parameter of an unsharded bucket.

    Args:
        bucket: A bucket whose layout has world size 1.

    Returns:
        For each parameter its number of updates, "step", and its state tensors in its own shape:
        views of the bucket's buffers.
    """
    return _by_parameter(bucket, bucket.shard.tensors)


def gather_full_state(
    bucket: Bucket, communicator: Communicator, *, to: int
) -> dict[Tensor, dict[str, Any]]:
    """State of each parameter of a sharded bucket, on one rank. A collective.

    Args:
        bucket: The bucket.
        communicator: The group it is sharded over.
        to: The rank that receives.

    Returns:
        As `full_state`, in host memory and of its own; empty on the other ranks.
    """
    gathered = {
        name: communicator.gather(tensor, to=to) for name, tensor in bucket.shard.tensors.items()
    }
    if communicator.rank != to:
        return {}
    whole = {name: tensor.cpu() for name, tensor in gathered.items() if tensor is not None}
    return _by_parameter(bucket, whole)


def load_full_state(bucket: Bucket, saved: Mapping[Tensor, WholeState]) -> None:
    """Take this rank's part of every parameter's whole state.

    Args:
        bucket: Where the state goes; its world size does not matter.
        saved: Checked by `check_saved`.
    """
    shard = bucket.shard
    shard.steps = [int(saved[parameter].get("step", 0)) for parameter in shard.parameters]
    for name, tensor in shard.tensors.items():
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
    # Muon's rule does not depend on the number of the step, and torch.optim.Muon saves none.
    wanted = STATE_NAMES[algorithm] if algorithm == "muon" else ("step", *STATE_NAMES[algorithm])
    for name, parameter, entry in zip(names, parameters, saved, strict=True):
        found = sorted(entry) if isinstance(entry, Mapping) else []
        if any(key not in found for key in wanted):
            raise ValueError(
                f"The saved state of {name} has {found}. {algorithm} needs {list(wanted)}. "
                "Was it saved by another optimizer, or is it one rank's part of a sharded one?"
            )
        for key in (*STATE_NAMES[algorithm], *(("master",) if "master" in entry else ())):
            value = entry[key]
            if not isinstance(value, Tensor) or value.shape != parameter.shape:
                shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"The saved {key} of {name} is {shape}. Must be a tensor of shape "
                    f"{list(parameter.shape)}."
                )


def _by_parameter(bucket: Bucket, flat: Mapping[str, Tensor]) -> dict[Tensor, dict[str, Any]]:
    shard = bucket.shard
    rows = zip(shard.parameters, shard.layout.specs, shard.layout.offsets, shard.steps, strict=True)
    return {
        parameter: {"step": step}
        | {
            name: tensor[offset : offset + spec.numel].view(spec.shape)
            for name, tensor in flat.items()
        }
        for parameter, spec, offset, step in rows
    }

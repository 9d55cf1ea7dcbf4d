"""One step of one partition: agree on it with the other ranks, then update it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distmuon import agreement
from distmuon.adapters.deepspeed.partition import Partition, momentum_of
from distmuon.adapters.deepspeed.refusals import MomentumKey
from distmuon.buckets import STATE_NAMES
from distmuon.collectives import Communicator
from distmuon.diagnostics import Probe
from distmuon.errors import see
from distmuon.failure import Topic
from distmuon.options import GroupOptions, read_options
from distmuon.phases import PhaseClock
from distmuon.steps import adamw_step, muon_step
from distmuon.work import Work


class Ready(NamedTuple):
    """What a partition is updated with, now that all ranks have agreed to it."""

    partition: Partition
    options: GroupOptions
    grad: Tensor


def prepare(partition: Partition, group: Mapping[str, Any], state: Mapping[str, Any]) -> Ready:
    """Settle on all ranks whether and how to update a partition. A collective.

    Args:
        partition: The group's partition.
        group: The `param_groups` entry as it is now.
        state: The partition's.

    Returns:
        What to update it with; nothing has been changed yet.

    Raises:
        RuntimeError: on every rank, if one has a problem or their hyperparameters differ.
        FloatingPointError: on every rank, if one has a gradient that is not finite.
    """
    options, grad, nonfinite, problem = None, None, None, None
    partition.communicator.step = int(state["step"]) + 1
    try:
        partition.refuse_other_rule(group)
        options = read_options(group, partition.number)
        grad = partition.grad
        nonfinite = partition.bucket.shard.first_nonfinite(grad)
    except (RuntimeError, TypeError, ValueError) as error:
        problem = error
    described = options.describe() if options else ""
    finding = agreement.Finding([True], nonfinite, described, problem)
    device = partition.bucket.shard.master.device
    verdict = settle(partition.communicator, device, finding)
    if verdict.nonfinite is not None:
        raise FloatingPointError(
            f"{verdict.nonfinite} DeepSpeed skips such steps unless its check is off: set "
            '"bf16": {"check_grad_overflow": true}.' + see("non-finite")
        )
    assert options is not None, "else there was a problem"
    assert grad is not None, "else there was a problem"
    return Ready(partition, options, grad)


def settle(
    communicator: Communicator, device: torch.device, finding: agreement.Finding
) -> agreement.Verdict:
    """Hear what every rank has found. A collective.

    Args:
        communicator: The ranks.
        device: Where the backend expects its tensors.
        finding: What this rank has found; `present` stands for the partition as a whole.

    Returns:
        The same verdict on every rank.

    Raises:
        RuntimeError: on every rank, if one has a problem.
    """
    with communicator.during(Topic("agree")):
        return agreement.agree(
            communicator, ["partition"], finding, missing_grad="raise", device=device
        )


def update(ready: Ready, state: dict[str, Any], momentum_key: MomentumKey) -> Work:
    """Update a partition. A collective for matrices.

    Args:
        ready: From `prepare`.
        state: The partition's state; updated in place.
        momentum_key: Name of Muon's momentum in it.

    Returns:
        What this rank orthogonalized.

    Raises:
        RankFailure: on every rank that is left, if one is dead, late or stopped with an error.
        RuntimeError: if an owned matrix was not orthogonalized.
    """
    bucket, communicator = ready.partition.bucket, ready.partition.communicator
    present = [True] * len(bucket.spec.parameters)
    show_state(ready.partition, state, momentum_key)
    communicator.step = int(state["step"]) + 1
    work = Work(0, 0)
    try:
        if bucket.spec.algorithm == "muon":
            nothing = PhaseClock(), Probe()
            work = muon_step(bucket, ready.grad, present, [ready.options], *nothing)
        else:
            adamw_step(bucket, ready.grad, present, [ready.options], PhaseClock())
    except Exception as error:
        # The others are in the middle of the exchange and would wait for this rank.
        communicator.abandon(error)
        raise
    state["step"] = communicator.step
    return work


def show_state(partition: Partition, state: dict[str, Any], momentum_key: MomentumKey) -> None:
    """Put a partition's state where the update rules and checkpoints look for it.

    torch replaces the tensors of a state that it loads, so this is done each time.

    Args:
        partition: A partition.
        state: Its state.
        momentum_key: Name of Muon's momentum in it.
    """
    spec, shard = partition.bucket.spec, partition.bucket.shard
    shard.steps = [int(state["step"])] * len(spec.parameters)
    if spec.algorithm == "muon":
        shard.state = {"momentum_buffer": momentum_of(state, momentum_key)}
    else:
        shard.state = {name: state[name] for name in STATE_NAMES["adamw"]}

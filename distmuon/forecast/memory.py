"""What a rank holds in memory, under Muon and under AdamW, from shapes and options alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from distmuon import Muon, build_param_groups
from distmuon.buckets import BucketSpec, specify
from distmuon.cost import CostModel
from distmuon.forecast.traffic import (
    exchanged,
    held_numel,
    master_itemsize,
    state_bytes,
    wire_itemsize,
)
from distmuon.options import Policy

Kind = Literal["adamw-ddp", "adamw-zero1", "distmuon"]
KINDS: tuple[Kind, ...] = ("adamw-ddp", "adamw-zero1", "distmuon")

# Elements of a piece that AdamW's rule goes over at a time on CPUs, and its temporaries.
_PIECE_NUMEL = 2**20
_ADAMW_TEMPORARIES = 2


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on the rank that needs most.

    Attributes:
        parameters: The parameters, frozen ones and alignment included, and the model's buffers.
        gradients: `p.grad`; with reduce="owned" what has been received in its place.
        buckets: DistributedDataParallel's own copy of the gradients.
        master: fp32 copies of narrow parameters.
        momentum: Muon's momentum, and NorMuon's second moment.
        moments: AdamW's two moments, or the state of the class in its place.
        averages: During the step: this rank's range of the averaged gradients.
        exchange: During the step: what is on its way to and from owners.
        work: During the step: temporaries of Newton-Schulz and of the update rules.
    """

    parameters: int
    gradients: int
    buckets: int
    master: int
    momentum: int
    moments: int
    averages: int
    exchange: int
    work: int

    @property
    def held(self) -> int:
        """Held when the optimizer's step begins."""
        return (
            self.parameters
            + self.gradients
            + self.buckets
            + self.master
            + self.momentum
            + self.moments
        )

    @property
    def most(self) -> int:
        """Held at most during the step."""
        return self.held + self.averages + self.exchange + self.work


def estimate_memory(
    model: nn.Module,
    *,
    world_size: int,
    cost_model: CostModel | None = None,
    groups: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[Kind, Memory]:
    """Memory of one rank, activations and the framework itself left out.

    AdamW is taken to keep what distmuon keeps: fp32 moments, and fp32 master weights for narrow
    parameters. Its ZeRO-1 is taken to cut evenly.

    Args:
        model: On any device.
        world_size: Ranks.
        cost_model: Rates to plan with; None for the defaults.
        groups: Keyword arguments of `build_param_groups`.
        options: Of `Muon`.

    Returns:
        The busiest rank's bytes for each optimizer.

    Raises:
        ValueError: as `build_param_groups` and `Muon`.
        TypeError: as these.
    """
    built = build_param_groups(model, **(groups or {}))
    optimizer = Muon(built, **{**(options or {}), "cost_model": cost_model})
    policy = optimizer.policy
    specs = specify(optimizer.param_groups, optimizer.parameter_names, world_size, policy)
    trained = {id(p) for spec in specs for p in spec.parameters}
    fixed = sum(p.nbytes for p in model.parameters() if id(p) not in trained)
    fixed += sum(buffer.nbytes for buffer in model.buffers())
    return {
        "adamw-ddp": _adamw(specs, fixed, world_size, parts=1),
        "adamw-zero1": _adamw(specs, fixed, world_size, parts=world_size),
        "distmuon": _distmuon(specs, fixed, world_size, policy),
    }


def _adamw(specs: Sequence[BucketSpec], fixed: int, world_size: int, *, parts: int) -> Memory:
    gradients = sum(spec.numel * _itemsize(spec) for spec in specs)
    narrow = sum(s.numel * master_itemsize(s) for s in specs if _is_narrow(s))
    wide = sum(spec.numel * master_itemsize(spec) for spec in specs)
    largest = max(
        tensor.numel * master_itemsize(spec) for spec in specs for tensor in spec.layout.specs
    )
    return Memory(
        parameters=fixed + gradients,
        gradients=gradients,
        buckets=gradients if world_size > 1 else 0,
        master=-(-narrow // parts),
        momentum=0,
        moments=-(-2 * wide // parts),
        averages=0,
        exchange=0,
        work=_ADAMW_TEMPORARIES * largest,
    )


def _distmuon(specs: Sequence[BucketSpec], fixed: int, world_size: int, policy: Policy) -> Memory:
    gradients = sum(spec.numel * _itemsize(spec) for spec in specs)
    # What every rank has sent for this rank's range stays until the step adds it up.
    received = sum(world_size * max(held_numel(s.layout)) * _itemsize(s) for s in specs)
    is_reducing = world_size > 1 and policy.reduce != "ddp"
    exchanges = [_exchange(spec, policy) for spec in specs]
    return Memory(
        parameters=fixed + sum(spec.layout.numel * _itemsize(spec) for spec in specs),
        gradients=(gradients if policy.reduce != "owned" or world_size == 1 else 0)
        + (received if is_reducing else 0),
        buckets=gradients if world_size > 1 and policy.reduce != "owned" else 0,
        master=sum(_shard(spec) for spec in specs if _is_narrow(spec) and spec.seed is None),
        momentum=sum(state_bytes(spec) for spec in specs if spec.ownership is not None),
        moments=sum(state_bytes(spec) for spec in specs if spec.ownership is None),
        averages=sum(_shard(spec) for spec in specs),
        exchange=max(exchanges),
        work=max(_work(spec) for spec in specs),
    )


def _exchange(spec: BucketSpec, policy: Policy) -> int:
    """Messages of the rank that sends and receives most: three neighbouring waves at a time."""
    if spec.ownership is None:
        return 0
    traffic = exchanged(spec, policy)
    totals = [sum(counts) for counts in zip(*traffic.values(), strict=True)]
    plan = spec.plan(totals.index(max(totals)), policy.wave_numel)
    assert plan is not None, "a Muon bucket has a plan"
    flows = [(wave.incoming_numel, wave.outgoing_numel) for wave in plan.waves]
    padded = [(0, 0), *flows, (0, 0)]
    whole = max(
        (
            sum(before) + now[0] + sum(after)
            for before, now, after in zip(padded, flows, padded[2:], strict=False)
        ),
        default=0,
    )
    shared = max(
        (
            sum(block.numel for block in (*wave.incoming, *wave.outgoing))
            + sum(part.rows * part.columns for part in wave.parts)
            for wave in plan.split.waves
        ),
        default=0,
    )
    small = plan.split.sent_numel("gram") + plan.split.sent_numel("transform")
    wide = max(whole * wire_itemsize(spec, policy), shared * master_itemsize(spec))
    return wide + small * policy.sharing.itemsize


def _work(spec: BucketSpec) -> int:
    """Temporaries of the update rule on the largest piece that one rank works on."""
    wide = master_itemsize(spec)
    copy = 0 if spec.seed is None else _shard(spec)  # in place of a master, while it steps
    if spec.ownership is None:
        return copy + _ADAMW_TEMPORARIES * min(spec.layout.shard_numel, _PIECE_NUMEL) * wide
    shapes = {tensor.shape for tensor in spec.ownership.layout.specs}
    largest = max(map(_orthogonalizing, shapes))
    # The result of the matrix before is let go of only when the next one is there.
    before = max(map(math.prod, shapes)) if len(spec.ownership.owners) > 1 else 0
    moved = {
        spec.ownership.layout.specs[i].shape
        for i, owner in enumerate(spec.ownership.owners)
        if spec.ownership.layout.span(i) != range(owner, owner + 1)
    }
    gathered = max(map(math.prod, moved), default=0)
    return copy + (largest + before + gathered) * wide


def _orthogonalizing(shape: Sequence[int]) -> int:
    """Elements that orthogonalizing [m, n] on a CPU allocates at most, its result included.

    Measured with the allocator's record: a copy, the result and one more of m n, or four and for
    square matrices five of the shorter side squared.
    """
    short, long = sorted(shape)
    return max(3 * short * long, 2 * short * long + (5 if short == long else 4) * short * short)


def _itemsize(spec: BucketSpec) -> int:
    return spec.parameters[0].element_size()


def _is_narrow(spec: BucketSpec) -> bool:
    return master_itemsize(spec) != _itemsize(spec)


def _shard(spec: BucketSpec) -> int:
    """Bytes of one rank's range in fp32 or wider."""
    return spec.layout.shard_numel * master_itemsize(spec)

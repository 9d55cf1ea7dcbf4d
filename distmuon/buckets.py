"""Group parameters that can share one flat buffer, and give each buffer its layout and its plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Generic, NamedTuple

import torch
from torch import Tensor
from typing_extensions import TypeVar

from distmuon import companion
from distmuon.choice import choose
from distmuon.collectives import Communicator
from distmuon.cost import default_cost_model
from distmuon.errors import see
from distmuon.exchange import Exchange
from distmuon.layout import Layout, Segment, TensorSpec, flat_layout, read_spec
from distmuon.options import MATRIX_ALGORITHMS, Algorithm, GroupOptions, Policy
from distmuon.ownership import Ownership, keep_whole
from distmuon.plan import ExchangePlan, build_plan, describe
from distmuon.row_state import KeptLayout, kept_whole, row_shape, rows_at_owners
from distmuon.shard import Range, Shard
from distmuon.split_exchange import SplitExchange
from distmuon.update_rules import shape_factor

# A bucket is one of our own unless it says otherwise.
RangeT_co = TypeVar("RangeT_co", bound=Range, covariant=True, default=Shard)

STATE_NAMES: dict[Algorithm, tuple[str, ...]] = {
    "muon": ("momentum_buffer",),
    "normuon": ("momentum_buffer", "second_momentum_buffer"),
    "adamw": ("exp_avg", "exp_avg_sq"),
}
# One value per row of a matrix, at its owner; all other state has the parameter's shape.
ROW_STATE = ("second_momentum_buffer",)


def state_shapes(algorithm: Algorithm, spec: TensorSpec) -> Mapping[str, tuple[int, ...]]:
    """What an update rule keeps for one parameter.

    Args:
        algorithm: Of a checked group.
        spec: The parameter, and how it is read.

    Returns:
        The shape of each state tensor, by name.
    """
    if algorithm not in STATE_NAMES:
        return companion.state_shapes(algorithm, spec.shape)
    return {
        name: row_shape(spec) if name in ROW_STATE else spec.shape
        for name in STATE_NAMES[algorithm]
    }


def is_whole(algorithm: Algorithm) -> bool:
    """Whether a rule without owners wants every tensor whole at one rank.

    Args:
        algorithm: Of a checked group.
    """
    known = algorithm in STATE_NAMES
    return not known and companion.find_companion(algorithm).reach == "tensor"


@dataclass(frozen=True, slots=True)
class BucketSpec:
    """Parameters of one algorithm, dtype, device and way of rounding, in flat order.

    Attributes:
        algorithm: The update rule.
        parameters: The parameters.
        groups: Index in `param_groups` of each parameter's group.
        layout: Where the parameters lie.
        ownership: Who orthogonalizes what; None for other rules than Muon's.
        kept: Where state lies that does not lie as the parameters do, by its name.
        seed: Of stochastic rounding; None where narrow parameters have an fp32 master, and for
            parameters that are not narrow.
    """

    algorithm: Algorithm
    parameters: tuple[Tensor, ...]
    groups: tuple[int, ...]
    layout: Layout
    ownership: Ownership | None
    kept: Mapping[str, KeptLayout] = field(default_factory=dict)
    seed: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """FQNs in flat order."""
        return tuple(spec.name for spec in self.layout.specs)

    @property
    def numel(self) -> int:
        """Elements of all parameters, without alignment."""
        return sum(spec.numel for spec in self.layout.specs)

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the state tensors; where tensors are kept whole, not each has all of them."""
        if is_whole(self.algorithm):
            return tuple(self.kept)
        return tuple(state_shapes(self.algorithm, self.layout.specs[0]))

    def places(self, state: str) -> Layout | KeptLayout:
        """Where a state lies; the fp32 "master" too.

        Args:
            state: Its name.
        """
        return self.kept.get(state, self.layout)

    def lines(self, options: Sequence[GroupOptions]) -> list[str]:
        """What every rank must have alike.

        Args:
            options: Of each parameter group.
        """
        first = self.parameters[0]
        head = f"{self.algorithm} parameters of {first.dtype} on {first.device.type}"
        head += "" if self.seed is None else f", rounded with seed {self.seed}"
        notes = [f"group {group}" for group in self.groups]
        if self.ownership is not None:
            owners = self.ownership.describe_owners()
            rows = zip(notes, owners, self.layout.specs, self.groups, strict=True)
            notes = [
                f"{note}, {owner}, lr factor {_lr_factors(options[group], spec)}"
                for note, owner, spec, group in rows
            ]
        # Last: where shapes differ, so do predictions, and the shape is the mistake to name.
        reasons = [self.ownership.reason] if self.ownership else []
        return [head, *describe(self.layout, notes), *reasons]

    def plan(self, rank: int, wave_numel: int, part_numel: int = 0) -> ExchangePlan | None:
        """One rank's transfers.

        Args:
            rank: The rank to plan for.
            wave_numel: Most elements that one owner fetches in a wave.
            part_numel: Elements of a shard that are published at a time; 0 for all at once.

        Returns:
            The plan; None for elementwise rules.
        """
        if self.ownership is None:
            return None
        return build_plan(
            self.ownership,
            rank,
            wave_numel=wave_numel,
            groups=self.groups,
            part_numel=part_numel,
        )


@dataclass(frozen=True, slots=True)
class Bucket(Generic[RangeT_co]):
    """A bucket in use: its buffers, and for Muon its exchange.

    Attributes:
        spec: What is in it.
        shard: This rank's range.
        plan: This rank's transfers; None for elementwise rules.
        exchange: Runs the plan; None for elementwise rules.
        split: Runs the plan's split matrices; None for elementwise rules.
    """

    spec: BucketSpec
    shard: RangeT_co
    plan: ExchangePlan | None
    exchange: Exchange | None
    split: SplitExchange | None

    def segments(self, state: str) -> tuple[Segment, ...]:
        """What this rank holds of a state, in the order of its buffer.

        Args:
            state: Its name.
        """
        return self.spec.places(state).segments(self.shard.rank)

    @property
    def owned(self) -> tuple[int, ...]:
        """For each matrix or block that this rank orthogonalizes, its parameter's index."""
        if self.plan is None:
            return ()
        ownership = self.plan.ownership
        return tuple(
            ownership.members[matrix]
            for matrix in self.plan.owned
            for _ in range(ownership.layout.specs[matrix].parts)
        )


def specify(
    groups: Sequence[Mapping[str, Any]],
    names: Mapping[Tensor, str],
    world_size: int,
    policy: Policy,
) -> list[BucketSpec]:
    """Decide the buckets, their order and their owners. Nothing is allocated.

    Args:
        groups: `param_groups`.
        names: FQN of each parameter.
        world_size: Ranks to cut each buffer over.
        policy: Says how Muon's buffers are laid out; elementwise rules are always flat, and those
            that look at whole tensors never cut one.

    Returns:
        One spec per (algorithm, dtype, device, seed): AdamW's first, then in order of appearance.

    Raises:
        ValueError: if a group has a tensor that has no name, or that cannot be rounded as it says.
    """
    members: dict[_Alike, list[tuple[int, Tensor]]] = {}
    for index, group in enumerate(groups):
        for parameter in group["params"]:
            seed = rounding_seed(group, parameter, _name(names, parameter, index))
            key = _Alike(group["algorithm"], parameter.dtype, parameter.device, seed)
            members.setdefault(key, []).append((index, parameter))
    result = []
    # AdamW first: its parameters travel while Newton-Schulz is computing.
    for (algorithm, dtype, device, seed), entries in sorted(
        members.items(), key=lambda m: m[0][0] in MATRIX_ALGORITHMS
    ):
        tensors = [
            read_spec(_name(names, p, index), p.shape, groups[index]) for index, p in entries
        ]
        ownership = None
        if algorithm in MATRIX_ALGORITHMS:
            ownership = choose(
                tensors,
                world_size,
                layout=policy.layout,
                model=policy.cost_model or default_cost_model(device.type),
                wave_numel=policy.wave_numel,
                itemsize=dtype.itemsize,
                wire_itemsize=policy.wire_itemsize,
                sharing=policy.sharing,
            )
        layout, order = _place(algorithm, tensors, ownership, world_size)
        result.append(
            BucketSpec(
                algorithm,
                tuple(entries[i][1] for i in order),
                tuple(entries[i][0] for i in order),
                layout,
                ownership,
                _keep(algorithm, layout, ownership),
                seed,
            )
        )
    return result


class _Alike(NamedTuple):
    """What parameters of one bucket have in common."""

    algorithm: Algorithm
    dtype: torch.dtype
    device: torch.device
    seed: int | None


def rounding_seed(group: Mapping[str, Any], parameter: Tensor, name: str) -> int | None:
    """Seed with which a parameter is rounded.

    Args:
        group: Its `param_groups` entry.
        parameter: The parameter.
        name: Its FQN, for the message.

    Returns:
        The seed; None where it is not rounded at random: its group does not say so, or it is as
        wide as its state.

    Raises:
        ValueError: for another narrow dtype than bfloat16.
    """
    seed: int | None = group.get("stochastic_rounding")
    if seed is None or torch.promote_types(parameter.dtype, torch.float32) == parameter.dtype:
        return None
    if parameter.dtype != torch.bfloat16:
        raise ValueError(
            f"{name} is {parameter.dtype}, and stochastic_rounding={seed} is for torch.bfloat16: "
            "its steps at small numbers would be lost in the other's. Leave stochastic_rounding "
            "out of its group, which keeps an fp32 master." + see("bad-option")
        )
    return seed


def _place(
    algorithm: Algorithm,
    tensors: Sequence[TensorSpec],
    ownership: Ownership | None,
    world_size: int,
) -> tuple[Layout, Sequence[int]]:
    """The layout of a bucket, and the index in `tensors` of each of its parameters."""
    if ownership is not None:
        return ownership.parameters, ownership.order
    if is_whole(algorithm):
        return keep_whole(tensors, world_size)
    return flat_layout(tensors, world_size), range(len(tensors))


def _keep(
    algorithm: Algorithm, layout: Layout, ownership: Ownership | None
) -> dict[str, KeptLayout]:
    """Places of the state that does not lie as the parameters do."""
    if ownership is not None:
        rows = set(ROW_STATE) & set(STATE_NAMES[algorithm])
        return {name: rows_at_owners(layout, ownership.members, ownership.owners) for name in rows}
    if not is_whole(algorithm):
        return {}
    shapes = [state_shapes(algorithm, spec) for spec in layout.specs]
    names = dict.fromkeys(name for each in shapes for name in each)
    return {name: kept_whole(layout, [each.get(name) for each in shapes]) for name in names}


def _name(names: Mapping[Tensor, str], parameter: Tensor, index: int) -> str:
    if parameter not in names:
        raise ValueError(
            f"Parameter group {index} has a tensor of shape {list(parameter.shape)} that the "
            "optimizer was not built with. DeepSpeed's ZeRO puts its partitions there: build the "
            "optimizer with distmuon.deepspeed.from_model instead." + see("sharded-elsewhere")
        )
    return names[parameter]


def _lr_factors(options: GroupOptions, spec: TensorSpec) -> str:
    shapes = dict.fromkeys(spec.orthogonalized)
    return ", ".join(str(shape_factor(options.adjust_lr_fn, spec.axes, s)) for s in shapes)


def open_bucket(spec: BucketSpec, communicator: Communicator, policy: Policy) -> Bucket:
    """Allocate a bucket's buffers and make its parameters views of them.

    Args:
        spec: What is in it.
        communicator: The group it is sharded over.
        policy: Says how large a wave is, and in what dtype split matrices are computed.

    Returns:
        The bucket, its state zero.
    """
    rank = communicator.rank
    state = {name: spec.places(name).shard_numel for name in spec.states}
    shard = Shard(spec.layout, rank, spec.parameters, state, seed=spec.seed)
    plan = spec.plan(rank, policy.wave_numel, policy.part_numel)
    if plan is None:
        return Bucket(spec, shard, None, None, None)
    split = SplitExchange(plan, communicator, getattr(torch, policy.split_dtype))
    wire = torch.bfloat16 if policy.wire == "bfloat16" else None
    return Bucket(spec, shard, plan, Exchange(plan, communicator, wire=wire), split)


def refuse_shared_storage(specs: Sequence[BucketSpec]) -> None:
    """Refuse two Parameters over the same memory: the flat buffers would part them silently.

    Args:
        specs: All buckets.

    Raises:
        ValueError: naming both.
    """
    spans = sorted(
        (str(p.device), p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), name)
        for spec in specs
        for name, p in zip(spec.names, spec.parameters, strict=True)
        if p.is_contiguous()
    )
    for (device, _, end, name), (next_device, start, _, other) in pairwise(spans):
        if device == next_device and start < end:
            raise ValueError(
                f"{name} and {other} are two Parameters over the same memory, which would part at "
                "the first step. Tie weights by using one Parameter in both places."
                + see("bad-group")
            )

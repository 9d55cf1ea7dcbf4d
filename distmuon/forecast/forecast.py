"""The optimizer's own plan for a model that is nowhere: routes, owners, loads, bytes, time."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from distmuon import Muon, build_param_groups
from distmuon.buckets import BucketSpec, is_whole, specify
from distmuon.choice import Prediction, predict
from distmuon.cost import CostModel
from distmuon.forecast.doubts import doubt_about, survey
from distmuon.forecast.folding import fold_names
from distmuon.forecast.traffic import (
    Move,
    bytes_per_rank,
    loads,
    master_itemsize,
    moves,
    state_bytes,
)
from distmuon.layout import read_spec
from distmuon.options import MATRIX_ALGORITHMS, GroupOptions, Policy, read_options
from distmuon.update_rules import shape_factor


@dataclass(frozen=True, slots=True)
class Row:
    """Parameters that are treated alike, under one folded name.

    Attributes:
        name: Such as `layers.{0..79}.mlp.up_proj.weight`.
        count: Parameters under it.
        shape: Of each.
        dtype: Of each.
        algorithm: "muon", "adamw", or "frozen".
        reason: Why.
        doubt: What should be confirmed; empty if the routing is certain.
        lr: Learning rate of its group; None if frozen.
        lr_factor: What lr is multiplied by for Muon's update; None for other rules.
        weight_decay: Decay per unit of lr; None if frozen.
        owners: Rank that orthogonalizes each matrix, in the model's order; none for other rules.
        shared: Matrices that several ranks share; their owner evaluates the polynomial.
        holders: Rank that keeps and updates each tensor whole, for classes that look at whole
            tensors; none for rules that cut them.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    dtype: str
    algorithm: str
    reason: str
    doubt: str
    lr: float | None
    lr_factor: float | None
    weight_decay: float | None
    owners: tuple[int, ...]
    shared: int
    holders: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements of all its parameters."""
        return self.count * math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Buffer:
    """One flat buffer, which is cut into equal shards.

    Attributes:
        algorithm: The update rule of its parameters.
        dtype: Their dtype.
        numel: Their elements.
        shard_numel: Elements of one rank's shard, padding included.
        state_bytes: Of the optimizer's state on each rank, a master copy included.
        layout: "flat" or "aligned" and why, for Muon; empty for other rules.
        prediction: Where the time of a step goes; None for elementwise rules.
        publish_seconds: Predicted time to publish the parameters.
        cut: "evenly", or "whole" for classes that look at whole tensors: then a shard is as long
            as the fullest rank's.
    """

    algorithm: str
    dtype: str
    numel: int
    shard_numel: int
    state_bytes: int
    layout: str
    prediction: Prediction | None
    publish_seconds: float
    cut: Literal["evenly", "whole"]


@dataclass(frozen=True, slots=True)
class AdamW:
    """What AdamW would send for the same parameters, in bytes per rank and step.

    Attributes:
        reduce_scatter: Averages the gradients for ZeRO-1, each range for its rank.
        all_gather: Publishes ZeRO-1's parameters.
        all_reduce: Averages the gradients for every rank, without ZeRO.
    """

    reduce_scatter: int
    all_gather: int
    all_reduce: int

    @property
    def zero1(self) -> int:
        """All that AdamW under ZeRO-1 sends."""
        return self.reduce_scatter + self.all_gather


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a step of the optimizer will do.

    Attributes:
        source: The model.
        world_size: Ranks.
        policy: How they work together.
        cost_model: Rates that the times are predicted with.
        rows: All parameters.
        buffers: As the optimizer has them, AdamW's first.
        loads: Newton-Schulz operations of each rank, as in `Report.loads`.
        sent: Bytes that each rank sends, by kind, as in `Report.bytes_sent`.
        moves: Bytes of momentum that go from one rank to another to be orthogonalized there; as
            many return.
        adamw: For comparison.
    """

    source: str
    world_size: int
    policy: Policy
    cost_model: CostModel
    rows: tuple[Row, ...]
    buffers: tuple[Buffer, ...]
    loads: tuple[int, ...]
    sent: Mapping[str, tuple[int, ...]]
    moves: tuple[Move, ...]
    adamw: AdamW

    @property
    def imbalance(self) -> float:
        """The largest rank's work over the mean."""
        return max(self.loads) * self.world_size / max(sum(self.loads), 1)

    @property
    def sent_by_rank(self) -> tuple[int, ...]:
        """Bytes that each rank sends, all kinds together."""
        return tuple(map(sum, zip(*self.sent.values(), strict=True))) or (0,) * self.world_size

    @property
    def doubts(self) -> tuple[Row, ...]:
        """Rows whose routing should be confirmed."""
        return tuple(row for row in self.rows if row.doubt)

    @property
    def step_seconds(self) -> float:
        """Predicted time of the optimizer's step, without elementwise work and reduction."""
        return sum(
            buffer.prediction.seconds if buffer.prediction else buffer.publish_seconds
            for buffer in self.buffers
        )

    @property
    def reduce_seconds(self) -> float:
        """Predicted time to average the gradients, which overlaps with the backward pass."""
        kind = "all-reduce" if self.policy.reduce == "ddp" else "reduce"
        counts = self.sent.get(kind)
        return self.cost_model.collective(max(counts), 1, self.world_size) if counts else 0.0


def make_forecast(
    name: str,
    model: nn.Module,
    *,
    world_size: int,
    cost_model: CostModel,
    groups: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Forecast:
    """Let the optimizer plan for a model as it would on real ranks, without any.

    Args:
        name: What to call it.
        model: On any device; only names, shapes and dtypes are read.
        world_size: Ranks, at least 1.
        cost_model: Rates to plan and to predict with.
        groups: Keyword arguments of `build_param_groups`.
        options: Of `Muon`.

    Returns:
        The forecast.

    Raises:
        ValueError: as `build_param_groups` and `Muon`, or if `world_size` is below 1.
        TypeError: as these.
    """
    built = build_param_groups(model, **(groups or {}))
    reasons = [reason for group in built for reason in group["reasons"]]
    optimizer = Muon(built, **{**(options or {}), "cost_model": cost_model})
    policy = optimizer.policy
    specs = specify(optimizer.param_groups, optimizer.parameter_names, world_size, policy)
    named = dict(zip(optimizer.parameter_names.values(), reasons, strict=True))
    trained = sum(spec.numel * spec.parameters[0].element_size() for spec in specs)
    one_way = trained * (world_size - 1) // world_size
    return Forecast(
        source=name,
        world_size=world_size,
        policy=policy,
        cost_model=cost_model,
        rows=tuple(_rows(model, optimizer, specs, named)),
        buffers=tuple(_buffer(spec, policy, cost_model) for spec in specs),
        loads=loads(specs),
        sent={k: tuple(counts) for k, counts in bytes_per_rank(specs, policy).items()},
        moves=moves(specs, policy),
        adamw=AdamW(one_way, one_way, 2 * one_way),
    )


class _Place(NamedTuple):
    """Who orthogonalizes the matrices of one parameter, or keeps it whole."""

    owners: tuple[int, ...]
    shared: int
    holders: tuple[int, ...] = ()


class _Kind(NamedTuple):
    """What parameters of one row have in common."""

    group: int | None
    shape: tuple[int, ...]
    dtype: str
    reason: str
    doubt: str


def _rows(
    model: nn.Module, optimizer: Muon, specs: Sequence[BucketSpec], reasons: Mapping[str, str]
) -> list[Row]:
    groups = {
        parameter: index
        for index, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
    }
    found_in = survey(model)
    trained = optimizer.parameter_names
    position: dict[str, int] = {}
    alike: defaultdict[_Kind, list[str]] = defaultdict(list)
    for parameter, own_name in found_in.names.items():
        fqn = trained.get(parameter, own_name)
        position[fqn] = len(position)
        group = groups.get(parameter)
        reason, doubt = "requires_grad=False", ""
        if group is not None:
            reason = reasons[fqn]
            owner = found_in.owners[parameter]
            doubt = doubt_about(fqn, parameter, reason, owner=owner, tables=found_in.tables)
        shape, dtype = tuple(parameter.shape), _say(parameter.dtype)
        alike[_Kind(group, shape, dtype, reason, doubt)].append(fqn)
    places = _places(specs)
    options = [read_options(group, index) for index, group in enumerate(optimizer.param_groups)]
    found = []
    for kind, names in alike.items():
        chosen = None if kind.group is None else options[kind.group]
        for folded, members in fold_names(names):
            mine = [names[index] for index in members]
            row = _row(folded, kind, chosen, [places[fqn] for fqn in mine if fqn in places])
            found.append((position[mine[0]], replace(row, count=len(mine))))
    return [row for _, row in sorted(found, key=lambda pair: pair[0])]


def _row(name: str, kind: _Kind, options: GroupOptions | None, places: Sequence[_Place]) -> Row:
    factor = None
    if options is not None and options.algorithm in MATRIX_ALGORITHMS:
        reading = {"axes": options.axes, "blocks": options.blocks}
        first, *_ = read_spec(name, kind.shape, reading).orthogonalized
        factor = shape_factor(options.adjust_lr_fn, options.axes, first)
    return Row(
        name=name,
        count=1,
        shape=kind.shape,
        dtype=kind.dtype,
        algorithm=options.algorithm if options else "frozen",
        reason=kind.reason,
        doubt=kind.doubt,
        lr=options.lr if options else None,
        lr_factor=factor,
        weight_decay=options.weight_decay if options else None,
        owners=tuple(owner for place in places for owner in place.owners),
        shared=sum(place.shared for place in places),
        holders=tuple(holder for place in places for holder in place.holders),
    )


def _places(specs: Sequence[BucketSpec]) -> dict[str, _Place]:
    """Of every parameter that is not cut wherever a shard ends, by FQN."""
    found: dict[str, _Place] = {}
    for spec in specs:
        ownership = spec.ownership
        if is_whole(spec.algorithm):
            layout = spec.layout
            ranks = (offset // layout.shard_numel for offset in layout.offsets)
            found |= {n: _Place((), 0, (rank,)) for n, rank in zip(spec.names, ranks, strict=True)}
        if ownership is None:
            continue
        owners: list[list[int]] = [[] for _ in spec.parameters]
        for member, owner in zip(ownership.members, ownership.owners, strict=True):
            owners[member].append(owner)
        shared = Counter(ownership.members[split.matrix] for split in ownership.splits)
        for index, name in enumerate(spec.names):
            found[name] = _Place(tuple(owners[index]), shared[index])
    return found


def _buffer(spec: BucketSpec, policy: Policy, model: CostModel) -> Buffer:
    itemsize, world_size = spec.parameters[0].element_size(), spec.layout.world_size
    prediction = None
    if spec.ownership is not None:
        prediction = predict(
            spec.ownership,
            model,
            wave_numel=policy.wave_numel,
            itemsize=itemsize,
            wire_itemsize=policy.wire_itemsize,
            sharing=policy.sharing,
        )
    others = (world_size - 1) * spec.layout.shard_numel
    wide = master_itemsize(spec)
    masters = wide * spec.layout.shard_numel if wide != itemsize else 0
    return Buffer(
        algorithm=spec.algorithm,
        dtype=_say(spec.parameters[0].dtype),
        numel=spec.numel,
        shard_numel=spec.layout.shard_numel,
        state_bytes=state_bytes(spec) + masters,
        layout=spec.ownership.reason if spec.ownership else "",
        prediction=prediction,
        publish_seconds=model.collective(others, itemsize, world_size),
        cut="whole" if is_whole(spec.algorithm) else "evenly",
    )


def _say(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

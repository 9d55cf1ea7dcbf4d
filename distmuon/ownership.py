"""Which rank orthogonalizes which matrix, and the flat order that keeps matrices near their owner.

Two decisions, both in integers:

1. Longest-processing-time first: the costliest matrix goes to the least loaded bin, which bounds
   the largest bin by 4/3 of the optimum (Graham 1969).
2. The bins are laid end to end in the flat buffer, one per rank, so that bin k belongs to rank k.
   The buffer is then cut into *equal* shards; a bin above or below the mean size is picked next so
   that the cumulative offset between bins and shards stays within one bin's deviation. Only the
   pieces that drifted across a boundary have to move.

A stack of matrices stays contiguous, so its matrices cannot be binned one by one: there the order
spreads the work evenly (stacks.py) and the owners are chosen for that order (fixed_order.py), which
is also what a given order wants.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

from distmuon.cost import CostModel, default_cost_model
from distmuon.errors import see
from distmuon.fixed_order import choose_owners, look_up
from distmuon.layout import (
    Layout,
    LayoutKind,
    TensorSpec,
    aligned_layout,
    flat_layout,
    units_of,
)
from distmuon.splits import Sharing, Split, choose_splits, loads_with
from distmuon.stacks import aligned_stacks, drift_bounded_order, spread


@dataclass(frozen=True, slots=True)
class Ownership:
    """Where the parameters lie, the matrices in them, and the owner of each matrix.

    Attributes:
        layout: One entry per matrix, in flat order; several in a row for a stacked parameter.
        owners: Rank that orthogonalizes `layout.specs[i]`, for each i.
        order: Index in the caller's sequence of `parameters.specs[j]`, for each j.
        parameters: One entry per parameter, over the same buffer as `layout`.
        members: Index in `parameters` of the parameter that each matrix belongs to.
        reason: Why this layout, with the figures of those it was compared with; for a person.
        splits: Matrices that several ranks share, by index in `layout`; each is still owned by one.
    """

    layout: Layout
    owners: tuple[int, ...]
    order: tuple[int, ...]
    parameters: Layout
    members: tuple[int, ...]
    reason: str = ""
    splits: tuple[Split, ...] = ()

    @property
    def shared(self) -> frozenset[int]:
        """Matrices that are split, by index in `layout`."""
        return frozenset(split.matrix for split in self.splits)

    def owned(self, rank: int) -> tuple[int, ...]:
        """Matrices that `rank` orthogonalizes, by index in the layout, in flat order."""
        return tuple(index for index, owner in enumerate(self.owners) if owner == rank)

    def counts(self) -> list[int]:
        """How many matrices each rank orthogonalizes, the blocks of fused ones counted apart."""
        counts = [0] * self.layout.world_size
        for owner, spec in zip(self.owners, self.layout.specs, strict=True):
            counts[owner] += spec.parts
        return counts

    def describe_owners(self) -> list[str]:
        """For each parameter the owners of its matrices, as words that differ where owners do."""
        found: list[list[str]] = [[] for _ in self.parameters.specs]
        for member, owner in zip(self.members, self.owners, strict=True):
            found[member].append(str(owner))
        for split in self.splits:
            first = bisect_left(self.members, self.members[split.matrix])
            words = f"{split.owner} for {list(split.ranks)} cut at {list(split.cuts)}"
            found[self.members[split.matrix]][split.matrix - first] = words
        return [
            f"owner {owners[0]}"
            if len(owners) == 1
            else "owners " + ", ".join(f"{len(list(run))}x {rank}" for rank, run in groupby(owners))
            for owners in found
        ]

    def waves(self, wave_numel: int) -> tuple[int | None, ...]:
        """In which round each matrix is brought together.

        Args:
            wave_numel: Most elements that one owner fetches in a round; a single matrix may
                exceed it.

        Returns:
            For each matrix its round, from 0; None if its owner holds all of it, or it is split.
        """
        shared = self.shared
        rounds: list[int | None] = []
        wave, fetched = [0] * self.layout.world_size, [0] * self.layout.world_size
        for index, (owner, missing) in enumerate(zip(self.owners, self._missing(), strict=True)):
            numel = 0 if index in shared else missing
            if fetched[owner] and fetched[owner] + numel > wave_numel:
                wave[owner], fetched[owner] = wave[owner] + 1, 0
            fetched[owner] += numel
            rounds.append(wave[owner] if numel else None)
        return tuple(rounds)

    def traffic(self) -> tuple[list[int], list[int]]:
        """Elements that each rank sends, and receives, when the whole matrices are gathered."""
        shared = self.shared
        sent, received = [0] * self.layout.world_size, [0] * self.layout.world_size
        for index, (owner, missing) in enumerate(zip(self.owners, self._missing(), strict=True)):
            if missing and index not in shared:
                received[owner] += missing
                for rank in self.layout.span(index):
                    sent[rank] += self.layout.held(index, rank) if rank != owner else 0
        return sent, received

    def _missing(self) -> Iterator[int]:
        """Elements of each matrix that its owner does not hold."""
        size = self.layout.shard_numel
        places = zip(self.layout.specs, self.layout.offsets, self.owners, strict=True)
        for index, (spec, offset, owner) in enumerate(places):
            # Nearly all lie whole at their owner; there are 70,000.
            whole = owner * size <= offset and offset + spec.numel <= (owner + 1) * size
            yield 0 if whole else spec.numel - self.layout.held(index, owner)

    def loads(self, model: CostModel) -> list[int]:
        """Work of each rank.

        Args:
            model: What a matrix costs.
        """
        work = model.works(self.layout.specs)
        return loads_with(self.layout, self.owners, work, self.splits)

    def with_splits(self, model: CostModel, sharing: Sharing) -> Ownership:
        """The same places and owners, with costly matrices shared where that is faster.

        Args:
            model: What a matrix costs.
            sharing: How far matrices may be split.

        Returns:
            Itself if no matrix is worth splitting.
        """
        work = model.works(self.layout.specs)
        splits = choose_splits(self.layout, self.owners, work, sharing)
        return replace(self, splits=splits) if splits else self


def assign(
    specs: Sequence[TensorSpec],
    world_size: int,
    *,
    layout: LayoutKind = "flat",
    model: CostModel | None = None,
) -> Ownership:
    """Balance the matrices over the ranks and lay their parameters out.

    Args:
        specs: Muon parameters in the caller's order: matrices [m, n] or stacks [..., m, n].
        world_size: Number of ranks.
        layout: "flat" balances work, cuts equal shards without padding, and moves what drifted over
            a border; "aligned" keeps every matrix whole at its owner, so that nothing moves, and
            pads the shards to the largest.
        model: What work and messages cost; None for the defaults of a GPU.

    Returns:
        The layout in its own order with one owner per matrix.

    Raises:
        ValueError: if `world_size` is below 1.
    """
    if world_size < 1:
        raise ValueError(f"Invalid {world_size=}. Must be >= 1." + see("bad-option"))
    model = model or default_cost_model("cuda")
    place = _flat if layout == "flat" else _aligned
    return place(specs, world_size, model)


def assign_fixed(parameters: Layout, *, model: CostModel | None = None) -> Ownership:
    """Choose owners where every parameter's place is given, and may not change.

    For an order that is somebody else's: DeepSpeed's flat partitions, a checkpoint's. An owner is
    one of the ranks that hold a piece, unless the balance gained elsewhere is worth the bytes.

    Args:
        parameters: Names, shapes, offsets, shard size and number of ranks. Offsets ascend, do not
            overlap, and need no alignment.
        model: What work and messages cost; None for the defaults of a GPU.

    Returns:
        The same places, with one owner per matrix; `order` is the identity.

    Raises:
        ValueError: if the parameters overlap or do not fit into the shards, naming the first.
    """
    end = 0
    for spec, offset in zip(parameters.specs, parameters.offsets, strict=True):
        if offset < end:
            raise ValueError(
                f"{spec.name} starts at element {offset}, inside the parameter before it, which "
                f"ends at {end}. Give the parameters in flat order, without overlap."
                + see("bad-option")
            )
        end = offset + spec.numel
        if end > parameters.numel:
            raise ValueError(
                f"{spec.name} ends at element {end}, past the last of {parameters.world_size} "
                f"shards of {parameters.shard_numel} elements. Give larger shards, or more of them."
                + see("bad-option")
            )
    model = model or default_cost_model("cuda")
    return _settle(parameters, range(len(parameters.specs)), model).ownership


def _flat(specs: Sequence[TensorSpec], world_size: int, model: CostModel) -> Ownership:
    work = model.works(specs)
    bins = balance(work, world_size)
    total = sum(spec.numel for spec in specs)
    sizes = [sum(specs[i].numel for i in members) for members in bins]
    bins = [bins[k] for k in drift_bounded_order([size * world_size - total for size in sizes])]
    order = [i for members in bins for i in members]
    packed = flat_layout([specs[i] for i in order], world_size)
    binned = [rank for rank, members in enumerate(bins) for _ in members]
    woven = spread([spec.numel for spec in specs], work)
    as_woven = flat_layout([specs[i] for i in woven], world_size)
    choices = (_settle(packed, order, model, binned), _settle(as_woven, woven, model))
    return min(choices, key=lambda choice: choice.objective).ownership


def _aligned(specs: Sequence[TensorSpec], world_size: int, model: CostModel) -> Ownership:
    # Both what a rank computes and what it holds count: the larger share sets the pace, or the
    # padding. In integers, so that every rank agrees.
    work = model.works(specs)
    cost, numel = sum(work), sum(spec.numel for spec in specs)
    shares = [each * numel + spec.numel * cost for each, spec in zip(work, specs, strict=True)]
    choices = []
    for weights in (shares, work):
        bins = balance(weights, world_size)
        whole = aligned_layout([[specs[i] for i in members] for members in bins])
        choices.append(_in_place(whole, [i for members in bins for i in members]))
    cut = aligned_stacks(specs, work, world_size)
    if cut is not None:
        choices.append(_in_place(*cut))

    def slowest_and_padded(choice: Ownership) -> int:
        slowest = max(choice.loads(model)) * world_size
        return slowest * numel + choice.layout.numel * cost

    return min(choices, key=slowest_and_padded)


def _in_place(parameters: Layout, order: Sequence[int]) -> Ownership:
    """Every matrix at its holder, where no matrix is cut."""
    units, members = units_of(parameters)
    owners = tuple(offset // units.shard_numel for offset in units.offsets)
    return Ownership(units, owners, tuple(order), parameters, members)


class _Settled(NamedTuple):
    objective: int
    ownership: Ownership


def _settle(
    parameters: Layout,
    order: Sequence[int],
    model: CostModel,
    binned: Sequence[int] | None = None,
) -> _Settled:
    """Owners for an order, whatever it is; `binned` has each parameter's owner if there is one."""
    units, members = units_of(parameters)
    work = model.works(units.specs)
    places = look_up(units, work, price=model.price)
    best = choose_owners(places)
    if binned is not None:
        by_bin = places.rate([binned[member] for member in members])
        best = min(by_bin, best, key=lambda owners: owners.objective(model.price))
    ownership = Ownership(units, best.ranks, tuple(order), parameters, members)
    return _Settled(best.objective(model.price), ownership)


def keep_whole(specs: Sequence[TensorSpec], world_size: int) -> tuple[Layout, list[int]]:
    """Lay tensors out so that none is cut and the fullest rank has as little as can be.

    Args:
        specs: The tensors in the caller's order.
        world_size: Number of ranks.

    Returns:
        The layout, its shards padded to the fullest, and the caller's index of each of its tensors.
    """
    bins = balance([spec.numel for spec in specs], world_size)
    layout = aligned_layout([[specs[i] for i in members] for members in bins])
    return layout, [i for members in bins for i in members]


def balance(costs: Sequence[int], world_size: int) -> list[list[int]]:
    """Longest-processing-time assignment of items to bins.

    Args:
        costs: Cost of each item.
        world_size: Number of bins.

    Returns:
        Item indices of each bin, ascending; ties are broken by index, so every rank agrees.
    """
    bins: list[list[int]] = [[] for _ in range(world_size)]
    heap = [(0, index) for index in range(world_size)]
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, index = heap[0]
        bins[index].append(item)
        heapq.heapreplace(heap, (load + costs[item], index))
    return [sorted(members) for members in bins]

"""State that a matrix's owner, or a tensor's, keeps: one value per row, or any. Integers only.

A row stands for an output: a matrix that is stored [in, out] has one value per column instead.
NorMuon's second moment belongs to whole rows of an orthogonalized matrix, and its result is scaled
by a norm over all of them: only the owner has these, whatever the layout. So the owner keeps the
moment too, and it never travels. What the ranks keep differs with what they own; every rank has a
buffer as long as the fullest, 1/n of the momentum for matrices with n columns. Optimizer classes
that look at whole tensors keep state of any shape at the rank that has the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from distmuon.errors import see
from distmuon.layout import Layout, Segment, TensorSpec, align


@dataclass(frozen=True, slots=True)
class KeptLayout:
    """Where each value that an owner keeps lies.

    It answers what a `Layout` does, so that either kind of state is saved, loaded and moved alike;
    but a rank may hold several ranges of one stack's values, one behind the other in its shard.

    Attributes:
        specs: For each parameter its name and the shape of its values; [0] if it has none.
        world_size: Number of shards.
        shard_numel: Values per shard, the same for every rank.
        starts: For each matrix, or tensor, the offset of its values in its owner's shard.
        pieces: For each parameter its ranges, in order; together they cover it exactly once.
    """

    specs: tuple[TensorSpec, ...]
    world_size: int
    shard_numel: int
    starts: tuple[int, ...]
    pieces: tuple[tuple[Segment, ...], ...]

    def segments(self, rank: int) -> tuple[Segment, ...]:
        """Ranges that `rank` holds, in shard order."""
        return tuple(each for pieces in self.pieces for each in pieces if each.rank == rank)

    def holders(self, tensor: int) -> tuple[Segment, ...]:
        """Ranges of one parameter's values over all ranks, in order."""
        return self.pieces[tensor]


def row_shape(spec: TensorSpec) -> tuple[int, ...]:
    """Shape of one value per output of a parameter.

    Args:
        spec: The parameter, and how it is read.

    Returns:
        [m, 1] for a matrix [m, n] and [E, m, 1] for a stack of them; [1, n] and [E, 1, n] where
        they are stored [in, out]; [out, 1] for a convolution's kernel.
    """
    rows, columns = spec.matrix
    shape = (1, columns) if spec.axes == "in_out" else (rows, 1)
    return shape if spec.axes == "conv" else (*spec.shape[:-2], *shape)


def refuse_cut_rows(spec: TensorSpec, algorithm: str) -> None:
    """Refuse blocks that each have a part of every output, where outputs have state.

    Args:
        spec: A parameter.
        algorithm: Its update rule.

    Raises:
        ValueError: naming the parameter.
    """
    outputs = "columns" if spec.axes == "in_out" else "rows"
    if algorithm == "normuon" and spec.blocks and spec.blocks.dim != outputs:
        raise ValueError(
            f"{spec.name} is cut into blocks of {spec.blocks.dim}, each {outputs[:-1]} in all of "
            "them; NorMuon keeps one second moment per output. Give its group "
            f'algorithm="muon", or cut {outputs}.' + see("bad-group")
        )


def rows_at_owners(parameters: Layout, members: Sequence[int], owners: Sequence[int]) -> KeptLayout:
    """Give every rank the values of the matrices that it owns, in flat order.

    Args:
        parameters: Where the parameters lie.
        members: For each matrix, in flat order, the parameter that it belongs to.
        owners: For each matrix the rank that orthogonalizes it.

    Returns:
        The places.
    """
    filled = [0] * parameters.world_size
    pieces: list[list[Segment]] = [[] for _ in parameters.specs]
    starts = []
    for member, owner in zip(members, owners, strict=True):
        spec, before = parameters.specs[member], pieces[member]
        rows = math.prod(row_shape(spec)) // spec.count
        starts.append(filled[owner])
        last = before[-1] if before else None
        if last is not None and last.rank == owner:
            before[-1] = Segment(
                member, owner, last.tensor_start, last.shard_start, last.numel + rows
            )
        else:
            start = last.tensor_start + last.numel if last else 0
            before.append(Segment(member, owner, start, filled[owner], rows))
        filled[owner] += rows
    specs = tuple(TensorSpec(spec.name, row_shape(spec)) for spec in parameters.specs)
    return KeptLayout(
        specs, parameters.world_size, max(filled), tuple(starts), tuple(map(tuple, pieces))
    )


def kept_whole(parameters: Layout, shapes: Sequence[tuple[int, ...] | None]) -> KeptLayout:
    """Give every rank the values of the tensors that it holds, in flat order.

    Args:
        parameters: Where the parameters lie, none of them cut.
        shapes: Of each parameter's values; None for one that has none.

    Returns:
        The places.
    """
    filled = [0] * parameters.world_size
    specs, starts, pieces = [], list[int](), list[tuple[Segment, ...]]()
    for index, (spec, shape) in enumerate(zip(parameters.specs, shapes, strict=True)):
        values = TensorSpec(spec.name, (0,) if shape is None else shape)
        owner = parameters.span(index)[0]
        start, numel = filled[owner], values.numel
        specs.append(values)
        starts.append(start)
        pieces.append((Segment(index, owner, 0, start, numel),) if numel else ())
        filled[owner] += align(numel)
    return KeptLayout(
        tuple(specs), parameters.world_size, max(filled), tuple(starts), tuple(pieces)
    )

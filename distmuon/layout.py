"""Where each tensor lies in a flat buffer that is cut into equal shards. Integers only."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Literal, NamedTuple, get_args

from distmuon.errors import see, with_entry
from distmuon.structure import Axes, Blocks, read_blocks

LayoutKind = Literal["flat", "aligned"]
LayoutChoice = Literal[LayoutKind, "auto"]

# [Note: alignment] Tensors and shards start on multiples of 16 elements, 64 bytes in fp32. Without
# it a parameter's address, and with it the kernel a matrix product picks, would depend on the
# world size; real matrices have sizes divisible by 16, so this costs them nothing.
ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A named shape.

    Attributes:
        name: Fully qualified name of the parameter.
        shape: Its shape; the last two dimensions of a Muon parameter are its matrices [m, n].
        axes: What they stand for; "conv" for a kernel, whose last dimensions are one together.
        blocks: Where each of its matrices is cut, every size spelled out.
        numel: Number of elements.
    """

    name: str
    shape: tuple[int, ...]
    axes: Axes = "out_in"
    blocks: Blocks | None = None
    numel: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Count the elements once: a plan for 70,000 matrices asks millions of times."""
        object.__setattr__(self, "numel", math.prod(self.shape))

    @property
    def count(self) -> int:
        """Number of matrices in it: more than one for a stack."""
        return 1 if self.axes == "conv" else math.prod(self.shape[:-2])

    @property
    def matrix(self) -> tuple[int, int]:
        """Shape of each of its matrices."""
        if self.axes == "conv":
            return self.shape[0], math.prod(self.shape[1:])
        return self.shape[-2], self.shape[-1]

    @property
    def orthogonalized(self) -> tuple[tuple[int, int], ...]:
        """Shapes of what is orthogonalized of each matrix: of its blocks, or its own."""
        return (self.matrix,) if self.blocks is None else self.blocks.shapes(*self.matrix)

    @property
    def parts(self) -> int:
        """How many matrices that makes of each of its own."""
        return 1 if self.blocks is None else len(self.orthogonalized)

    @property
    def reading(self) -> str:
        """How the shape is read, for a person; empty for plain matrices [out, in]."""
        axes = "" if self.axes == "out_in" else f" read as {self.axes}"
        if self.blocks is None:
            return axes
        sizes, dim, repeats = self.blocks
        return f"{axes} in blocks of {sizes} {dim}" + (f" x {repeats}" if repeats > 1 else "")


def read_spec(name: str, shape: Sequence[int], group: Mapping[str, Any]) -> TensorSpec:
    """A Muon parameter as its group says that it is to be read.

    Args:
        name: FQN.
        shape: Its shape.
        group: May have "axes" and "blocks".

    Raises:
        ValueError: if the blocks do not fit the shape, naming the parameter.
        TypeError: for blocks of a wrong type.
    """
    axes = group.get("axes", "out_in")
    if axes not in get_args(Axes):
        raise ValueError(
            f"Invalid {axes=} for {name}. Must be one of {get_args(Axes)}." + see("bad-group")
        )
    spec = TensorSpec(name, tuple(shape), axes)
    blocks = read_blocks(group.get("blocks"))
    if blocks is None:
        return spec
    try:
        return replace(spec, blocks=blocks.fit(*spec.matrix))
    except ValueError as error:
        message = f"{name} has shape {list(shape)}: {error}"
        raise ValueError(with_entry(message, "bad-group")) from None


@dataclass(frozen=True, slots=True)
class Segment:
    """A contiguous piece of one tensor inside one rank's shard.

    Attributes:
        tensor: Index into `Layout.specs`.
        rank: The rank whose shard holds the piece.
        tensor_start: Offset of the piece in the row-major tensor, in elements.
        shard_start: Offset of the piece in the rank's shard, in elements.
        numel: Length of the piece, in elements.
    """

    tensor: int
    rank: int
    tensor_start: int
    shard_start: int
    numel: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The flat order of tensors and its cut into `world_size` equal shards.

    Attributes:
        specs: The tensors in flat order.
        offsets: Start of each tensor in the flat buffer, in elements; ascending.
        world_size: Number of shards.
        shard_numel: Elements per shard, the same for every rank.
    """

    specs: tuple[TensorSpec, ...]
    offsets: tuple[int, ...]
    world_size: int
    shard_numel: int

    @property
    def numel(self) -> int:
        """Elements in the whole buffer, padding included: `world_size * shard_numel`."""
        return self.world_size * self.shard_numel

    def segments(self, rank: int) -> tuple[Segment, ...]:
        """Pieces that `rank` holds, in shard order."""
        start, stop = rank * self.shard_numel, (rank + 1) * self.shard_numel
        found: list[Segment] = []
        for tensor in range(max(bisect_right(self.offsets, start) - 1, 0), len(self.specs)):
            offset = self.offsets[tensor]
            if offset >= stop:
                break
            first, last = max(offset, start), min(offset + self.specs[tensor].numel, stop)
            if first < last:
                found.append(Segment(tensor, rank, first - offset, first - start, last - first))
        return tuple(found)

    def holders(self, tensor: int) -> tuple[Segment, ...]:
        """Pieces of `tensor` over all ranks, in order; together they cover it exactly once."""
        offset, numel = self.offsets[tensor], self.specs[tensor].numel
        pieces, position = [], 0
        while position < numel:
            rank, shard_start = divmod(offset + position, self.shard_numel)
            length = min(numel - position, self.shard_numel - shard_start)
            pieces.append(Segment(tensor, rank, position, shard_start, length))
            position += length
        return tuple(pieces)

    def span(self, tensor: int) -> range:
        """Ranks that hold a piece of `tensor`."""
        offset, size = self.offsets[tensor], self.shard_numel
        return range(offset // size, (offset + self.specs[tensor].numel - 1) // size + 1)

    def held(self, tensor: int, rank: int) -> int:
        """Elements of `tensor` that `rank` holds."""
        offset, start = self.offsets[tensor], rank * self.shard_numel
        stop = min(offset + self.specs[tensor].numel, start + self.shard_numel)
        return max(stop - max(offset, start), 0)


class Units(NamedTuple):
    """The matrices in a layout of parameters.

    Attributes:
        layout: One entry per matrix, over the same buffer.
        members: Parameter that each matrix belongs to, by index; never decreasing.
    """

    layout: Layout
    members: tuple[int, ...]


def units_of(parameters: Layout) -> Units:
    """Look at every stack [..., m, n] as its matrices [m, n], which lie end to end.

    A fused matrix stays one entry: its blocks have one owner, who sees all of them.

    Args:
        parameters: Where the parameters lie.

    Returns:
        The matrices of a stack are named `name[0]`, `name[1]`, ...
    """
    if all(len(spec.shape) == 2 for spec in parameters.specs):
        return Units(parameters, tuple(range(len(parameters.specs))))
    specs: list[TensorSpec] = []
    offsets: list[int] = []
    members: list[int] = []
    for index, (spec, offset) in enumerate(zip(parameters.specs, parameters.offsets, strict=True)):
        count, numel = spec.count, math.prod(spec.matrix)
        axes: Axes = "out_in" if spec.axes == "conv" else spec.axes
        rest = spec.matrix, axes, spec.blocks
        if len(spec.shape) == 2 or spec.axes == "conv":
            specs.append(TensorSpec(spec.name, *rest))
        else:
            specs.extend(TensorSpec(f"{spec.name}[{i}]", *rest) for i in range(count))
        offsets.extend(offset + i * numel for i in range(count))
        members.extend([index] * count)
    layout = Layout(tuple(specs), tuple(offsets), parameters.world_size, parameters.shard_numel)
    return Units(layout, tuple(members))


def flat_layout(specs: Sequence[TensorSpec], world_size: int) -> Layout:
    """Tensors end to end, cut into equal shards wherever the cuts fall.

    Args:
        specs: The tensors in flat order.
        world_size: Number of shards.

    Returns:
        The layout; it is padded by less than `world_size * ALIGNMENT` elements at its end.

    Raises:
        ValueError: if `world_size` is below 1.
    """
    if world_size < 1:
        raise ValueError(f"Invalid {world_size=}. Must be >= 1." + see("bad-option"))
    ends = list(accumulate((align(spec.numel) for spec in specs), initial=0))
    shard_numel = align(-(-ends[-1] // world_size))
    return Layout(tuple(specs), tuple(ends[:-1]), world_size, shard_numel)


def aligned_layout(bins: Sequence[Sequence[TensorSpec]]) -> Layout:
    """Whole tensors in every shard: nothing is cut, and shards are padded to the largest.

    Args:
        bins: The tensors of each rank.

    Returns:
        The layout.
    """
    sizes = [sum(align(spec.numel) for spec in members) for members in bins]
    shard_numel = max(sizes)
    offsets: list[int] = []
    for rank, members in enumerate(bins):
        ends = accumulate((align(spec.numel) for spec in members), initial=rank * shard_numel)
        offsets.extend(list(ends)[:-1])
    specs = tuple(spec for members in bins for spec in members)
    return Layout(specs, tuple(offsets), len(bins), shard_numel)


def align(numel: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-numel // ALIGNMENT) * ALIGNMENT

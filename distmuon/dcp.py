"""Handles that let torch.distributed.checkpoint save, load and reshard state where it lies."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from distmuon.errors import see

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem


class Box(NamedTuple):
    """A rectangle of a tensor whose elements follow each other in row-major order.

    Attributes:
        offsets: Its first index in each dimension.
        sizes: Its extent in each dimension.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Cut a range of a row-major tensor into rectangles, in order.

    Rows that are whole make one rectangle; a row cut at either end is cut again by its own rows.
    A range of a d-dimensional tensor gives at most 2d - 1 rectangles.

    Args:
        shape: Of the tensor.
        start: First element of the range.
        stop: One past its last.

    Yields:
        The rectangles; none for an empty range.
    """
    if start >= stop:
        return
    if not shape:
        yield Box((), ())
        return
    rows = tuple(shape[1:])
    width = math.prod(rows)
    first, last = -(-start // width), stop // width
    if first > last:  # within one row
        yield from _in_row(last, rows, start - last * width, stop - last * width)
        return
    yield from _in_row(first - 1, rows, start - (first - 1) * width, width)
    if first < last:
        yield Box((first, *(0 for _ in rows)), (last - first, *rows))
    yield from _in_row(last, rows, 0, stop - last * width)


def _in_row(row: int, shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    if start < stop:
        yield from (Box((row, *b.offsets), (1, *b.sizes)) for b in boxes(shape, start, stop))


class StateHandle(Tensor):
    """A state tensor's name, shape and dtype, and the ranges of it that this rank holds.

    [Note: handles] To torch it is a tensor of the whole shape without data, to
    torch.distributed.checkpoint a list of rectangles that are views of the optimizer's buffers
    (the protocol of `torch.distributed._checkpointable`). So a file is written and read in place,
    whatever the number of ranks, and nothing is ever whole on one rank. Any other use, pickling
    above all, would take a part for the whole and raises.

    Attributes:
        label: What it is called in messages.
        ranges: Of the row-major tensor's elements, ascending; none if the rank has nothing of it.
        local: [n], those elements; a view of the optimizer's buffer.
    """

    label: str
    ranges: tuple[range, ...]
    local: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, label: str, shape: Sequence[int], ranges: Sequence[range], local: Tensor
    ) -> StateHandle:
        """Make a tensor of this shape without data."""
        handle: StateHandle = Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), dtype=local.dtype, device=local.device
        )
        return handle

    def __init__(
        self, label: str, shape: Sequence[int], ranges: Sequence[range], local: Tensor
    ) -> None:
        """Describe what a rank holds.

        Args:
            label: What to call it in messages.
            shape: Of the whole tensor.
            ranges: Of the row-major tensor's elements, ascending.
            local: [n], those elements.
        """
        super().__init__()
        self.label, self.ranges, self.local = label, tuple(ranges), local

    @classmethod
    @override
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        handle = args[0]
        kwargs = {k: v for k, v in (kwargs or {}).items() if k in ("dtype", "device")}
        match func.overloadpacket.__name__:  # type: ignore[attr-defined]
            case "detach" | "alias":
                return handle
            case "clone" | "_to_copy":
                return handle._with(handle.local.to(**kwargs, copy=True))
            case "empty_like" | "zeros_like":
                return handle._with(torch.zeros_like(handle.local, **kwargs))
            case "new_empty" if tuple(args[1]) == tuple(handle.shape):
                return handle._with(torch.empty_like(handle.local, **kwargs))
            case "copy_" if all(isinstance(each, StateHandle) for each in args[:2]):
                return handle._take(args[1])
            case operation:
                found = [each for each in args if isinstance(each, StateHandle)]
                # A TypeError would become Python's own "unsupported operand" in `handle + 1`.
                raise RuntimeError(
                    f"{operation} does not work on {found or 'a StateHandle'}, which stands for "
                    f"one rank's part of a sharded tensor. {_WAYS_OUT}" + see("partial-state")
                )

    def _with(self, local: Tensor) -> StateHandle:
        return StateHandle(self.label, self.shape, self.ranges, local)

    def _take(self, other: StateHandle) -> StateHandle:
        if not self.covers_as(other):
            raise ValueError(
                f"{other!r} covers other elements than {self!r}." + see("partial-state")
            )
        self.local.copy_(other.local)
        return self

    def covers_as(self, other: StateHandle) -> bool:
        """Whether another handle is of the same elements of the same shape."""
        return (self.shape, self.ranges) == (other.shape, other.ranges)

    @override
    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"StateHandle({self.label}, shape {list(self.shape)}, this rank's elements "
            f"{describe_ranges(self.ranges)})"
        )

    @override
    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"{self!r} cannot be pickled: torch.save would write one rank's part, and the other "
            f"ranks' would be lost. {_WAYS_OUT}" + see("partial-state")
        )

    def _pieces(self) -> Iterator[tuple[Box, Tensor]]:
        position = 0
        for held in self.ranges:
            for box in boxes(self.shape, held.start, held.stop):
                numel = math.prod(box.sizes)
                yield box, self.local[position : position + numel].view(box.sizes)
                position += numel

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        """What this rank writes; called by torch.distributed.checkpoint.

        Args:
            fqn: Key in the file.

        Returns:
            One item for each rectangle.
        """
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """What this rank reads; called by torch.distributed.checkpoint.

        Returns:
            One entry for each rectangle.
        """
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return [
            ChunkStorageMetadata(offsets=torch.Size(box.offsets), sizes=torch.Size(box.sizes))
            for box, _ in self._pieces()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """Where a rectangle lies; called by torch.distributed.checkpoint.

        Args:
            index: Its key and offsets.

        Returns:
            A view of the optimizer's buffer in the rectangle's shape.

        Raises:
            ValueError: if this rank does not hold it.
        """
        for box, piece in self._pieces():
            if torch.Size(box.offsets) == index.offset:
                return piece
        raise ValueError(
            f"{index.fqn} has no piece at {index.offset} on this rank: {self!r}."
            + see("partial-state")
        )


def describe_ranges(ranges: Sequence[range]) -> str:
    """Ranges of elements for a person: "3 to 12, 20 to 24", or "none"."""
    return ", ".join(f"{held.start} to {held.stop}" for held in ranges) or "none"


_WAYS_OUT = (
    "Save it with torch.distributed.checkpoint.save on every rank. For one whole dictionary build "
    'the optimizer with state_dict_kind="whole" and call consolidate_state_dict(to=0); '
    "full_state_dict=True in torch's StateDictOptions gathers DTensors only."
)

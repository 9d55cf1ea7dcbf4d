"""How a parameter is read as matrices, and where a fused matrix is cut into blocks.

A fused matrix holds several linear maps: queries, keys and values; gate and up; one map per head.
Its *blocks* are orthogonalized apart, each scaled for its own shape, as if they were parameters of
their own. That is no matter of ranks: a matrix that several *ranks* share is split (splits.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

from distmuon.errors import see

Axes = Literal["out_in", "in_out", "conv"]
BlockDim = Literal["rows", "columns"]


class Blocks(NamedTuple):
    """The matrices inside a fused matrix [m, n].

    `Blocks((4096, 1024, 1024))` are three row blocks; `Blocks(2)` two equal ones. With
    `repeats=heads` the sizes come once per head, and block i is made of every head's i-th piece,
    joined: `Blocks((128, 64), repeats=16)` cuts 16 x (128 + 64) rows into a matrix of 16 x 128
    rows and one of 16 x 64.

    Attributes:
        sizes: Rows or columns of each block within one repetition, or how many equal blocks.
        dim: What is cut, of the matrix as it is stored: "rows", the first dimension, or "columns".
        repeats: How often the sizes follow each other.
    """

    sizes: int | tuple[int, ...]
    dim: BlockDim = "rows"
    repeats: int = 1

    def fit(self, rows: int, columns: int) -> Blocks:
        """The same with every size spelled out for a matrix.

        Args:
            rows: Of the matrix.
            columns: Of the matrix.

        Raises:
            ValueError: if the blocks do not cover the matrix exactly.
        """
        length = rows if self.dim == "rows" else columns
        if isinstance(self.sizes, tuple):
            period = sum(self.sizes)
            sizes = self.sizes
        else:
            size, rest = divmod(length, self.sizes * self.repeats)
            sizes = (size,) * self.sizes if not rest else ()
            period = sum(sizes)
        if period * self.repeats != length:
            wanted = (
                f"{self.sizes} equal blocks"
                if isinstance(self.sizes, int)
                else f"sizes {list(self.sizes)}, {sum(self.sizes)} in all"
            )
            times = f", {self.repeats} times" if self.repeats > 1 else ""
            raise ValueError(
                f"its {length} {self.dim} cannot be cut into {wanted}{times}. The blocks must "
                f"cover all {self.dim} exactly." + see("bad-group")
            )
        return Blocks(sizes, self.dim, self.repeats)

    def shapes(self, rows: int, columns: int) -> tuple[tuple[int, int], ...]:
        """Shape of each block of a matrix that it fits.

        Args:
            rows: Of the matrix.
            columns: Of the matrix.
        """
        sizes, _, repeats = self.fit(rows, columns)
        assert isinstance(sizes, tuple), "fit spells them out"
        if self.dim == "rows":
            return tuple((repeats * size, columns) for size in sizes)
        return tuple((rows, repeats * size) for size in sizes)


def qkv_blocks(
    heads: int,
    head_dim: int,
    *,
    kv_heads: int | None = None,
    order: Literal["stacked", "by_head"] = "stacked",
    dim: BlockDim = "rows",
) -> Blocks:
    """Blocks of a fused query-key-value matrix: all queries, all keys, all values.

    Args:
        heads: Query heads.
        head_dim: Size of a head.
        kv_heads: Key-value heads; None: as many as query heads.
        order: "stacked": all queries, then all keys, then all values (Phi-3, GPT-2,
            torch.nn.MultiheadAttention). "by_head": for each key-value head its queries, its key,
            its value (GPT-NeoX, BLOOM, Falcon, Megatron-LM).
        dim: "columns" where the matrix is stored [in, out] (GPT-2).

    Returns:
        The blocks.

    Raises:
        ValueError: if `kv_heads` does not divide `heads`, or a number is below 1.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    if min(heads, head_dim, kv_heads) < 1 or heads % kv_heads:
        raise ValueError(
            f"Invalid {heads=}, {kv_heads=}, {head_dim=}. Must be >= 1, and kv_heads must divide "
            "heads." + see("bad-option")
        )
    if order == "stacked":
        return Blocks((heads * head_dim, kv_heads * head_dim, kv_heads * head_dim), dim)
    return Blocks((heads // kv_heads * head_dim, head_dim, head_dim), dim, kv_heads)


def read_blocks(value: Any) -> Blocks | None:
    """Blocks from what a parameter group or a checkpoint says.

    Args:
        value: None, a number of equal row blocks, their sizes, `Blocks`, or its three values.

    Returns:
        The blocks; None for a matrix that is one.

    Raises:
        TypeError: for anything else.
        ValueError: for a size or count below 1, or an unknown dimension.
    """
    if value is None:
        return None
    spelled = isinstance(value, Sequence) and len(value) == 3 and isinstance(value[1], str)
    sizes, dim, repeats = value if spelled else (value, "rows", 1)
    if isinstance(sizes, Sequence) and not isinstance(sizes, str):
        sizes = tuple(sizes)
    numbers = (*(sizes if isinstance(sizes, tuple) else (sizes,)), repeats)
    if any(isinstance(each, bool) or not isinstance(each, int) for each in numbers):
        raise TypeError(
            f"Invalid blocks={value!r}. Must be a number of equal row blocks, their sizes, or "
            "distmuon.Blocks(sizes, dim, repeats)." + see("bad-group")
        )
    if sizes == () or min(numbers) < 1:
        raise ValueError(f"Invalid blocks={value!r}. Every number must be >= 1." + see("bad-group"))
    if dim not in get_args(BlockDim):
        raise ValueError(
            f"Invalid blocks={value!r}. Must cut one of {get_args(BlockDim)}." + see("bad-group")
        )
    return Blocks(sizes, cast(BlockDim, dim), repeats)


def cut(matrix: Tensor, blocks: Blocks) -> list[Tensor]:
    """The blocks of a matrix.

    Args:
        matrix: [m, n], contiguous.
        blocks: That fit it.

    Returns:
        Each block, contiguous; views where they lie in one piece.
    """
    return [window.flatten(*_joined(blocks)).contiguous() for window in _windows(matrix, blocks)]


def join(values: Sequence[Tensor], shape: Sequence[int], blocks: Blocks) -> Tensor:
    """Put blocks together to a matrix.

    Args:
        values: As `cut` returns them.
        shape: [m, n] of the matrix.
        blocks: That fit it.

    Returns:
        [m, n], contiguous.
    """
    whole = torch.empty(tuple(shape), dtype=values[0].dtype, device=values[0].device)
    for window, value in zip(_windows(whole, blocks), values, strict=True):
        window.copy_(value.view(window.shape))
    return whole


def _windows(matrix: Tensor, blocks: Blocks) -> list[Tensor]:
    """Views of each block: [repeats, size, n] for rows, [m, repeats, size] for columns."""
    m, n = matrix.shape
    sizes = blocks.fit(m, n).sizes
    assert isinstance(sizes, tuple), "fit spells them out"
    if blocks.dim == "rows":
        periods, inner = matrix.view(blocks.repeats, m // blocks.repeats, n), 1
    else:
        periods, inner = matrix.view(m, blocks.repeats, n // blocks.repeats), 2
    starts = accumulate(sizes, initial=0)
    return [periods.narrow(inner, start, size) for start, size in zip(starts, sizes, strict=False)]


def _joined(blocks: Blocks) -> tuple[int, int]:
    return (0, 1) if blocks.dim == "rows" else (1, 2)

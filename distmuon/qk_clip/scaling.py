"""Which elements of a rank's range a head's factor multiplies. Integers, and one multiplication."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distmuon.errors import see
from distmuon.layout import Layout, Segment
from distmuon.qk_clip.layers import AttentionLayer, HeadRows

# The last part of a module's name, where queries and keys are normalized one by one. Not
# DeepSeek's q_a_layernorm: what it normalizes is projected to queries afterwards.
_QK_NORM = re.compile(r"(q|k|qk|query|key)_?(layer_?)?norm", re.IGNORECASE)


class Piece(NamedTuple):
    """Elements of a rank's range that share a factor: `rows` runs of `width`, `stride` apart.

    Attributes:
        layer: Index of the layer.
        slot: Index of the factor among those of the layer.
        start: First element in the range.
        rows: Number of runs.
        width: Elements of each.
        stride: Elements from one run to the next.
    """

    layer: int
    slot: int
    start: int
    rows: int
    width: int
    stride: int


def locate(layers: Sequence[AttentionLayer], layout: Layout, rank: int) -> tuple[Piece, ...]:
    """Find the rows of all heads in one rank's range of a buffer.

    Args:
        layers: The attention layers; parameters that are in another buffer are left out.
        layout: Where the buffer's parameters lie.
        rank: Whose range.

    Returns:
        Pieces that do not overlap.
    """
    tensors = {spec.name: index for index, spec in enumerate(layout.specs)}
    mine: dict[int, Segment] = {segment.tensor: segment for segment in layout.segments(rank)}
    found: list[Piece] = []
    for number, layer in enumerate(layers):
        slot = 0
        for block in layer.blocks:
            segment = mine.get(tensors.get(block.parameter, -1))
            if segment is not None:
                columns = _columns(layout.specs[segment.tensor].shape)
                for head, start in enumerate(block.starts):
                    cuts = _cut(segment, columns, start, block)
                    found.extend(Piece(number, slot + head, *cut) for cut in cuts)
            slot += len(block.starts)
    return tuple(found)


def _cut(
    segment: Segment, columns: int, start: int, block: HeadRows
) -> Iterator[tuple[int, int, int, int]]:
    """A head's elements in a segment as (start in the range, rows, width, stride)."""
    first, last = segment.tensor_start, segment.tensor_start + segment.numel
    offset = segment.shard_start - segment.tensor_start
    if block.axis == "rows":
        low, high = max(first, start * columns), min(last, (start + block.count) * columns)
        if low < high:
            yield low + offset, 1, high - low, high - low
        return
    top, bottom = first // columns, (last - 1) // columns
    # The segment may begin and end inside a row; all rows between are alike.
    ends = [(top, 1)] if top == bottom else [(top, 1), (top + 1, bottom - top - 1), (bottom, 1)]
    for row, rows in ends:
        low = max(first, row * columns + start)
        high = min(last, row * columns + start + block.count)
        if rows > 0 and low < high:
            yield low + offset, rows, high - low, columns


def scale_(master: Tensor, pieces: Sequence[Piece], factors: Sequence[Sequence[float]]) -> None:
    """Multiply the heads' rows; those with a factor of 1 are not touched.

    Args:
        master: [shard_numel], contiguous, fp32 or wider; changed in place.
        pieces: From `locate`.
        factors: From `QKClip.settle`.
    """
    for piece in pieces:
        factor = factors[piece.layer][piece.slot]
        if factor != 1.0:
            size, strides = (piece.rows, piece.width), (piece.stride, 1)
            offset = master.storage_offset() + piece.start
            torch.as_strided(master, size, strides, offset).mul_(factor)


def check_layers(layers: Sequence[AttentionLayer], shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse a description that the optimizer's parameters do not bear out.

    Args:
        layers: The attention layers.
        shapes: FQN and shape of each of the optimizer's parameters.

    Raises:
        ValueError: naming the layer and the parameter: if it is not the optimizer's, has fewer
            rows, has a bias that is left out, or if its queries or keys are normalized.
    """
    listed = {block.parameter for layer in layers for block in layer.blocks}
    for layer in layers:
        for block in layer.blocks:
            name = block.parameter
            if name not in shapes:
                close = difflib.get_close_matches(name, shapes, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise ValueError(
                    f"QK-Clip of {layer.name} needs {name!r}, which is no parameter of the "
                    f"optimizer.{hint} Frozen weights cannot be clipped; names come from "
                    "build_param_groups(model) or model.named_parameters()." + see("qk-clip-layers")
                )
            columns = _columns(shapes[name])
            extent = columns if block.axis == "columns" else math.prod(shapes[name]) // columns
            if block.stop > extent:
                raise ValueError(
                    f"QK-Clip of {layer.name}: {name} has {extent} {block.axis}, but its heads "
                    f"reach to {block.stop}. Its shape is {list(shapes[name])}."
                    + see("qk-clip-layers")
                )
            bias = f"{name.removesuffix('weight')}bias"
            if name.endswith("weight") and bias in shapes and bias not in listed:
                raise ValueError(
                    f"QK-Clip of {layer.name}: {name} has a bias, {bias}, that is not listed. "
                    "Logits would not scale as the weight does; list both." + see("qk-clip-layers")
                )
            _refuse_norm(layer, name, shapes)


def _refuse_norm(layer: AttentionLayer, name: str, shapes: Mapping[str, Sequence[int]]) -> None:
    # `attention.q_proj.weight` -> what else is in `attention`.
    parent = name.rpartition(".")[0].rpartition(".")[0]
    inside = f"{parent}." if parent else ""
    for other in shapes:
        part = other.removeprefix(inside).partition(".")[0]
        if other.startswith(inside) and is_qk_norm(part):
            raise ValueError(inert(layer.name, f"{inside}{part}") + see("qk-norm"))


def is_qk_norm(name: str) -> bool:
    """Whether a module's name says that it normalizes queries or keys.

    Args:
        name: The last part of its name.
    """
    return _QK_NORM.fullmatch(name) is not None


def inert(layer: str, norm: str) -> str:
    """The message for attention that QK-Clip cannot act on.

    Args:
        layer: Name of the layer.
        norm: Name of the norm.
    """
    return (
        f"{layer} normalizes its queries or keys ({norm}): scaling their weights changes nothing "
        "after a norm, so QK-Clip would be inert. Its logits are bounded by the norm's own weight; "
        "leave QK-Clip out."
    )


def _columns(shape: Sequence[int]) -> int:
    return shape[-1] if len(shape) > 1 else 1

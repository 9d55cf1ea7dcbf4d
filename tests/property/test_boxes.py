"""A range of a row-major tensor as rectangles."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from distmuon.dcp import boxes

shapes = st.lists(st.integers(1, 6), max_size=4).map(tuple)


@given(shapes, st.data())
def test_boxes_cover_the_range_once_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    tensor = torch.arange(numel).view(shape)
    found, count = [], 0
    for box in boxes(shape, start, stop):
        piece = tensor[tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))]
        assert piece.shape == torch.Size(box.sizes)
        found += piece.reshape(-1).tolist()
        count += 1
    assert found == list(range(start, stop))
    assert count <= max(2 * len(shape) - 1, 1)

"""Flat layouts: equal shards, and every element in exactly one place."""

import itertools

import pytest

from distmuon.layout import ALIGNMENT, TensorSpec, aligned_layout, flat_layout

SPECS = (
    TensorSpec("a", (5, 7)),
    TensorSpec("b", (64, 64)),
    TensorSpec("c", (1, 3)),
    TensorSpec("d", (3, 8, 6)),
)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 100])
def test_segments_cover_every_tensor_exactly_once(world_size: int) -> None:
    layout = flat_layout(SPECS, world_size)
    seen: dict[int, list[tuple[int, int]]] = {i: [] for i in range(len(SPECS))}
    for rank in range(world_size):
        previous = 0
        for segment in layout.segments(rank):
            assert segment.rank == rank
            assert segment.shard_start >= previous
            previous = segment.shard_start + segment.numel
            assert previous <= layout.shard_numel
            position = rank * layout.shard_numel + segment.shard_start
            assert position == layout.offsets[segment.tensor] + segment.tensor_start
            start = segment.tensor_start
            seen[segment.tensor].append((start, start + segment.numel))
    for index, spec in enumerate(SPECS):
        pieces = sorted(seen[index])
        assert pieces[0][0] == 0
        assert pieces[-1][1] == spec.numel
        assert all(a[1] == b[0] for a, b in itertools.pairwise(pieces))


def test_tensors_and_shards_start_aligned() -> None:
    layout = flat_layout(SPECS, 3)
    assert all(offset % ALIGNMENT == 0 for offset in layout.offsets)
    assert layout.shard_numel % ALIGNMENT == 0
    assert layout.numel == 3 * layout.shard_numel


def test_holders_are_the_segments_seen_from_the_tensor() -> None:
    layout = flat_layout(SPECS, 4)
    by_rank = [segment for rank in range(4) for segment in layout.segments(rank)]
    by_tensor = [segment for index in range(len(SPECS)) for segment in layout.holders(index)]
    assert by_rank == by_tensor


def test_real_shapes_pad_by_less_than_a_hundredth() -> None:
    specs = tuple(TensorSpec(str(i), (1024, 4096)) for i in range(10))
    for world_size in (3, 7, 64):
        layout = flat_layout(specs, world_size)
        assert layout.numel <= 1.01 * sum(spec.numel for spec in specs)


def test_aligned_shards_hold_whole_tensors_and_are_padded_to_the_largest() -> None:
    layout = aligned_layout([SPECS[:1], SPECS[1:3], [], SPECS[3:]])
    assert layout.specs == SPECS
    assert layout.shard_numel == 64 * 64 + ALIGNMENT
    assert all(len(layout.holders(index)) == 1 for index in range(len(SPECS)))
    assert [layout.holders(index)[0].rank for index in range(len(SPECS))] == [0, 1, 1, 3]
    assert layout.segments(2) == ()
    by_rank = [segment for rank in range(4) for segment in layout.segments(rank)]
    assert [segment.tensor for segment in by_rank] == [0, 1, 2, 3]


@pytest.mark.parametrize("world_size", [0, -1])
def test_a_world_size_below_one_is_refused(world_size: int) -> None:
    with pytest.raises(ValueError, match="world_size"):
        flat_layout(SPECS, world_size)

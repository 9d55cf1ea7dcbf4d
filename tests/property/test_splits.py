"""Split plans for any shapes and ranks: cover, matching messages, identity, bounded waves."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from distmuon.cost import CostModel, default_cost_model
from distmuon.layout import TensorSpec
from distmuon.ownership import Ownership, assign
from distmuon.plan import ExchangePlan, build_plan
from distmuon.split_plan import Block, Part, SplitWave
from distmuon.splits import Sharing, packed_numel, packed_panels

# Long ones, so that several parts pay, and some that are never split.
shapes = st.lists(
    st.tuples(st.integers(1, 9), st.integers(40, 300))
    | st.tuples(st.integers(40, 300), st.integers(1, 9))
    | st.tuples(st.integers(1, 30), st.integers(1, 30))
    | st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(20, 90)),
    min_size=1,
    max_size=5,
)
world_sizes = st.integers(2, 9)
wave_numels = st.sampled_from([1, 500, 10**9])
MODEL: CostModel = default_cost_model("cuda")


def owned(chosen: Sequence[tuple[int, ...]], world_size: int, most: int = 4) -> Ownership:
    specs = [TensorSpec(f"p{i}", shape) for i, shape in enumerate(chosen)]
    return assign(specs, world_size, model=MODEL).with_splits(MODEL, Sharing(most))


def plans(ownership: Ownership, wave_numel: int) -> list[ExchangePlan]:
    ranks = range(ownership.layout.world_size)
    return [build_plan(ownership, rank, wave_numel=wave_numel) for rank in ranks]


def elements(block: Block, start: int, stride: int) -> list[int]:
    return [start + r * stride + c for r in range(block.rows) for c in range(block.columns)]


def in_shard(block: Block) -> list[int]:
    return elements(block, block.shard_start, block.shard_stride)


def in_slice(block: Block) -> list[int]:
    return elements(block, block.slice_start, block.slice_stride)


@given(shapes, world_sizes, st.integers(1, 4))
def test_splits_are_shared_by_different_ranks_and_only_where_that_is_faster(
    chosen: list[tuple[int, ...]], world_size: int, most: int
) -> None:
    ownership = owned(chosen, world_size, most)
    whole = owned(chosen, world_size, 1)
    assert whole.splits == ()
    assert ownership.owners == whole.owners
    if ownership.splits:
        assert max(ownership.loads(MODEL)) < max(whole.loads(MODEL))
    for split in ownership.splits:
        assert list(split.ranks) == sorted(set(split.ranks))
        assert split.owner in split.ranks
        assert split.owner == ownership.owners[split.matrix]
        assert 2 <= len(split.ranks) <= most
        assert split.cuts[0] == 0
        assert split.cuts[-1] == max(ownership.layout.specs[split.matrix].shape)
        assert all(start < stop for start, stop in pairwise(split.cuts))


@given(shapes, world_sizes, wave_numels)
def test_every_part_gets_its_slice_once_and_every_element_comes_from_its_place(
    chosen: list[tuple[int, ...]], world_size: int, wave_numel: int
) -> None:
    ownership = owned(chosen, world_size)
    layout = ownership.layout
    everyone = plans(ownership, wave_numel)
    # What each holder has, named by matrix and position: what a slice then holds says where from.
    held = {
        (s.rank, s.shard_start + i): (s.tensor, s.tensor_start + i)
        for plan in everyone
        for s in plan.segments
        for i in range(s.numel)
    }
    for plan in everyone:
        for wave in plan.split.waves:
            for part in wave.parts:
                columns = layout.specs[part.split.matrix].shape[1]
                begin = part.split.cuts[part.split.ranks.index(plan.rank)]
                top, left = (0, begin) if part.sliced == "columns" else (begin, 0)
                found: dict[int, tuple[int, int]] = {}
                for block in (*wave.kept, *wave.incoming):
                    if block.matrix == part.split.matrix:
                        source = zip(in_slice(block), in_shard(block), strict=True)
                        for place, origin in source:
                            assert place not in found, "fetched twice"
                            found[place] = held[block.peer, origin]
                assert found == {
                    r * part.columns + c: (part.split.matrix, (top + r) * columns + left + c)
                    for r in range(part.rows)
                    for c in range(part.columns)
                }


@given(shapes, world_sizes, wave_numels)
def test_what_one_rank_sends_is_what_the_other_expects(
    chosen: list[tuple[int, ...]], world_size: int, wave_numel: int
) -> None:
    everyone = plans(owned(chosen, world_size), wave_numel)
    assert len({len(plan.split.waves) for plan in everyone}) == 1, "all take part in every wave"
    for index in range(len(everyone[0].split.waves)):
        waves: list[SplitWave] = [plan.split.waves[index] for plan in everyone]
        for here in range(world_size):
            for there in range(world_size):
                sent = [
                    (b.matrix, b.rows, b.columns, b.shard_start, b.slice_start)
                    for b in waves[here].outgoing
                    if b.peer == there
                ]
                assert sent == [
                    (b.matrix, b.rows, b.columns, b.shard_start, b.slice_start)
                    for b in waves[there].incoming
                    if b.peer == here
                ]
                to = [r.part.split for r in waves[here].to_owners if r.peer == there]
                assert to == [r.part.split for r in waves[there].to_parts if r.peer == here]
            for blocks in (waves[here].outgoing, waves[here].incoming):
                position = 0
                for block in blocks:
                    assert block.peer != here
                    assert block.buffer_start == position
                    position += block.numel


@given(shapes, world_sizes, wave_numels)
def test_each_split_matrix_is_in_one_wave_and_waves_are_bounded(
    chosen: list[tuple[int, ...]], world_size: int, wave_numel: int
) -> None:
    ownership = owned(chosen, world_size)
    everyone = plans(ownership, wave_numel)
    seen: Counter[tuple[int, int]] = Counter()
    for plan in everyone:
        whole = {t for wave in plan.waves for t in wave.tensors} | set(plan.local)
        assert not whole & ownership.shared
        assert whole | (ownership.shared & set(plan.owned)) == set(plan.owned)
        for wave in plan.split.waves:
            seen.update((part.split.matrix, plan.rank) for part in wave.parts)
            used = sum(block.numel for block in wave.incoming)
            used += sum(route.part.message_numel("transform") for route in wave.to_owners)
            used += sum(route.part.message_numel("gram") for route in wave.to_parts)
            assert used <= wave_numel or len(wave.parts) == 1
    parts = {(split.matrix, rank): 1 for split in ownership.splits for rank in split.ranks}
    assert seen == parts


@given(st.integers(1, 200))
def test_panels_cover_the_lower_triangle(m: int) -> None:
    covered = {
        (row, column)
        for start, stop in packed_panels(m)
        for row in range(start, stop)
        for column in range(stop)
    }
    assert len(covered) == packed_numel(m)
    assert all((row, column) in covered for row in range(m) for column in range(row + 1))
    assert packed_numel(m) <= m * (m + 32) / 2 + 512


@settings(max_examples=5, deadline=None)
@given(st.integers(1000, 10000), st.integers(2, 4))
def test_ten_thousand_ranks_share_costly_matrices(world_size: int, most: int) -> None:
    chosen: Sequence[tuple[int, ...]] = [(24, 56)] * 3000 + [(64, 4096)] * 60
    ownership = owned(chosen, world_size, most)
    whole = max(owned(chosen, world_size, 1).loads(MODEL))
    assert max(ownership.loads(MODEL)) < whole
    assert len(ownership.splits) == 60
    layout = ownership.layout
    part: Part
    for rank in ownership.splits[7].ranks:
        (wave,) = build_plan(ownership, rank, wave_numel=10**9).split.waves
        fetched = Counter({part.split.matrix: 0 for part in wave.parts})
        for block in (*wave.kept, *wave.incoming):
            fetched[block.matrix] += block.numel
        for part in wave.parts:
            assert fetched[part.split.matrix] == part.rows * part.columns
            assert max(layout.specs[part.split.matrix].shape) == 4096

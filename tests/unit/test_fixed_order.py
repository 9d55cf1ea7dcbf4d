"""Owners for an order that may not change: holders first, others where the balance is worth it."""

import random

import pytest

from distmuon.cost import CostModel, newton_schulz_cost
from distmuon.layout import Layout, TensorSpec, flat_layout
from distmuon.ownership import assign_fixed

# Messages that cost nothing, and messages that cost everything.
FREE = CostModel(latency=1e-12, bandwidth=1e18, flops=1e9)
DEAR = CostModel(latency=1e-12, bandwidth=1.0, flops=1e12)


def squares(sides: list[int], world_size: int) -> Layout:
    return flat_layout([TensorSpec(f"w{i}", (s, s)) for i, s in enumerate(sides)], world_size)


def test_the_order_is_kept() -> None:
    layout = squares([32, 16, 64, 48], 3)
    ownership = assign_fixed(layout)
    assert ownership.parameters == ownership.layout == layout
    assert ownership.order == (0, 1, 2, 3)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 40])
def test_where_messages_are_dear_every_owner_holds_as_much_as_anyone(world_size: int) -> None:
    layout = squares([32, 16, 64, 48, 16, 16, 80, 32], world_size)
    ownership = assign_fixed(layout, model=DEAR)
    for index, owner in enumerate(ownership.owners):
        pieces = {s.rank: s.numel for s in layout.holders(index)}
        assert pieces[owner] == max(pieces.values())


def test_where_messages_are_free_the_slowest_rank_decides() -> None:
    # Rank 0 holds two large matrices, the others a hundred small ones: by elements they are even.
    layout = squares([112, 112] + [16] * 196, 3)
    free, dear = (max(assign_fixed(layout, model=m).loads(m)) for m in (FREE, DEAR))
    assert dear == 2 * newton_schulz_cost((112, 112))
    assert free == newton_schulz_cost((112, 112)), "cannot be less"


def test_among_holders_balance_decides_between_equal_pieces() -> None:
    # Three matrices on two ranks, the middle one cut in halves; rank 0 has the costlier first.
    specs = [TensorSpec("a", (64, 64)), TensorSpec("b", (64, 64)), TensorSpec("c", (16, 256))]
    ownership = assign_fixed(flat_layout(specs, 2))
    assert ownership.owners == (0, 1, 1)


def test_dearer_messages_never_move_more() -> None:
    generator = random.Random(5)
    sides = [16 * generator.randint(1, 9) for _ in range(60)]
    layout = squares(sides, 6)
    moved = [
        sum(assign_fixed(layout, model=CostModel(1e-9, bandwidth, 1e10)).traffic()[0])
        for bandwidth in (1e2, 1e6, 1e8, 1e10, 1e14)
    ]
    assert moved == sorted(moved)
    assert moved[0] < moved[-1]


def test_offsets_need_no_alignment_and_may_leave_gaps() -> None:
    specs = (TensorSpec("a", (3, 5)), TensorSpec("stack", (3, 3, 3)), TensorSpec("b", (2, 7)))
    ownership = assign_fixed(Layout(specs, (1, 17, 50), world_size=4, shard_numel=17))
    assert ownership.layout.offsets == (1, 17, 26, 35, 50)
    assert [spec.name for spec in ownership.layout.specs[1:4]] == [f"stack[{i}]" for i in range(3)]
    assert ownership.members == (0, 1, 1, 1, 2)
    assert ownership.owners[0] == 0


def test_overlapping_parameters_are_refused_by_name() -> None:
    specs = (TensorSpec("a", (4, 4)), TensorSpec("b", (4, 4)))
    with pytest.raises(ValueError, match=r"b starts at element 8, inside .* ends at 16"):
        assign_fixed(Layout(specs, (0, 8), world_size=2, shard_numel=16))


def test_parameters_past_the_last_shard_are_refused_by_name() -> None:
    specs = (TensorSpec("a", (4, 4)), TensorSpec("b", (4, 4)))
    with pytest.raises(ValueError, match=r"b ends at element 33, past the last of 2 shards of 16"):
        assign_fixed(Layout(specs, (0, 17), world_size=2, shard_numel=16))

"""Stacks of matrices: their units, and layouts that cut stacks between two matrices."""

import math

import pytest

from distmuon.layout import ALIGNMENT, Layout, TensorSpec, flat_layout, units_of
from distmuon.ownership import assign
from distmuon.stacks import aligned_stacks, spread


def moe(layers: int, experts: int, width: int, hidden: int) -> list[TensorSpec]:
    specs = []
    for i in range(layers):
        specs.append(TensorSpec(f"{i}.o", (width, width)))
        specs.append(TensorSpec(f"{i}.up", (experts, hidden, width)))
        specs.append(TensorSpec(f"{i}.down", (experts, width, hidden)))
    return specs


def work(specs: list[TensorSpec]) -> list[int]:
    return [spec.numel * spec.shape[-1] for spec in specs]


def test_units_lie_end_to_end_in_their_parameter() -> None:
    parameters = flat_layout([TensorSpec("a", (5, 7)), TensorSpec("s", (3, 5, 3))], 2)
    units, members = units_of(parameters)
    assert [spec.name for spec in units.specs] == ["a", "s[0]", "s[1]", "s[2]"]
    assert [spec.shape for spec in units.specs] == [(5, 7)] + [(5, 3)] * 3
    assert units.offsets == (0, 48, 63, 78)
    assert members == (0, 1, 1, 1)
    assert units.shard_numel == parameters.shard_numel


def test_without_stacks_units_are_the_parameters() -> None:
    parameters = flat_layout([TensorSpec("a", (5, 7)), TensorSpec("b", (2, 3))], 2)
    assert units_of(parameters).layout is parameters


def test_spread_follows_dear_matrices_by_cheap_ones() -> None:
    numels, costs = [100] * 9, [1, 1, 1, 1, 1, 1, 1, 10, 10]
    order = spread(numels, costs)
    ahead = 0.0
    for index in order:
        ahead += costs[index] - 3
        assert abs(ahead) <= 7


@pytest.mark.parametrize("world_size", [2, 3, 5, 8, 24])
@pytest.mark.parametrize(("width", "hidden"), [(32, 48), (7, 9), (8, 10)])
def test_aligned_stacks_cut_no_matrix_and_keep_stacks_contiguous(
    world_size: int, width: int, hidden: int
) -> None:
    specs = moe(3, 12, width, hidden)
    placed = aligned_stacks(specs, work(specs), world_size)
    assert placed is not None
    layout, order = placed
    assert sorted(order) == list(range(len(specs)))
    assert layout.specs == tuple(specs[i] for i in order)
    units, _ = units_of(layout)
    assert all(len(units.span(i)) == 1 for i in range(len(units.specs)))
    assert all(offset % ALIGNMENT == 0 for offset in layout.offsets)
    assert layout.shard_numel % ALIGNMENT == 0
    end = 0
    for spec, offset in zip(layout.specs, layout.offsets, strict=True):
        assert offset >= end
        end = offset + spec.numel
    assert end <= layout.numel


def test_small_stacks_are_not_cut() -> None:
    specs = [TensorSpec("s", (2, 16, 16))] + [TensorSpec(f"w{i}", (64, 64)) for i in range(8)]
    assert aligned_stacks(specs, work(specs), 4) is None


def test_aligned_cuts_a_large_stack_over_the_ranks_instead_of_padding_to_it() -> None:
    specs = moe(2, 16, 32, 64)
    ownership = assign(specs, 8, layout="aligned")
    assert ownership.layout.numel <= 1.25 * sum(spec.numel for spec in specs)
    assert sum(ownership.traffic()[0]) == 0
    assert len(set(ownership.owners)) == 8


def test_flat_balances_the_matrices_of_stacks_among_the_ranks() -> None:
    specs = moe(4, 64, 512, 256)
    ownership = assign(specs, 8)
    assert len(ownership.owners) == 4 * (1 + 2 * 64)
    assert ownership.layout.numel - sum(spec.numel for spec in specs) < 8 * ALIGNMENT
    loads = [0] * 8
    for spec, owner in zip(ownership.layout.specs, ownership.owners, strict=True):
        loads[owner] += math.prod(spec.shape) * min(spec.shape)
    assert max(loads) * 8 <= 1.05 * sum(loads)


def test_owners_are_described_by_parameter() -> None:
    specs = (TensorSpec("w", (4, 4)), TensorSpec("s", (4, 4, 4)))
    ownership = assign(specs, 1)
    assert isinstance(ownership.parameters, Layout)
    assert sorted(ownership.describe_owners()) == ["owner 0", "owners 4x 0"]

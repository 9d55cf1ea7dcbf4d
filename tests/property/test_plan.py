"""Plans for any shapes and any number of ranks: cover, one owner, matching messages, identity."""

import itertools
import math
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from distmuon.choice import CANDIDATES, choose, predict
from distmuon.cost import CostModel
from distmuon.layout import Layout, LayoutKind, TensorSpec
from distmuon.ownership import Ownership, assign, assign_fixed
from distmuon.plan import ExchangePlan, build_plan, describe, digest, peer_counts
from tests.counting import count_calls

Shape = tuple[int, ...]

shapes = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 40))
    | st.tuples(st.integers(1, 24), st.integers(1, 9), st.integers(1, 9)),
    min_size=1,
    max_size=12,
)
world_sizes = st.integers(1, 9)
wave_numels = st.sampled_from([1, 40, 10**9])
kinds: st.SearchStrategy[LayoutKind] = st.sampled_from(CANDIDATES)
rates = st.floats(1e-3, 1e15, allow_nan=False)
models = st.builds(CostModel, latency=st.floats(1e-9, 1e3), bandwidth=rates, flops=rates)


def named(chosen: list[Shape]) -> list[TensorSpec]:
    return [TensorSpec(f"p{i}", shape) for i, shape in enumerate(chosen)]


@st.composite
def foreign(draw: st.DrawFn) -> Layout:
    """Somebody else's order: any gaps, any shard size that holds it."""
    specs = named(draw(shapes))
    offsets, end = [], 0
    for spec in specs:
        offsets.append(end + draw(st.integers(0, 20)))
        end = offsets[-1] + spec.numel
    world_size = draw(world_sizes)
    size = -(-end // world_size) + draw(st.integers(0, 30))
    return Layout(tuple(specs), tuple(offsets), world_size, size)


# Every way to come by owners: a layout of ours, or an order that is given; at any price of bytes.
ownerships: st.SearchStrategy[Ownership] = st.builds(
    lambda chosen, world_size, kind, model: assign(
        named(chosen), world_size, layout=kind, model=model
    ),
    shapes,
    world_sizes,
    kinds,
    models,
) | st.builds(lambda layout, model: assign_fixed(layout, model=model), foreign(), models)


def plans_of(ownership: Ownership, wave_numel: int = 10**9) -> list[ExchangePlan]:
    ranks = range(ownership.layout.world_size)
    return [build_plan(ownership, rank, wave_numel=wave_numel) for rank in ranks]


@given(ownerships)
def test_every_element_is_held_once_and_every_matrix_has_one_owner(ownership: Ownership) -> None:
    plans = plans_of(ownership)
    held = [[0] * math.prod(spec.shape) for spec in ownership.layout.specs]
    for plan in plans:
        for s in plan.segments:
            for position in range(s.tensor_start, s.tensor_start + s.numel):
                held[s.tensor][position] += 1
    assert all(count == 1 for counts in held for count in counts)
    assert sorted(t for plan in plans for t in plan.owned) == list(range(len(held)))


@given(ownerships)
def test_the_matrices_of_a_parameter_cover_it_in_order(ownership: Ownership) -> None:
    assert sorted(ownership.order) == list(range(len(ownership.parameters.specs)))
    rows = zip(ownership.layout.specs, ownership.layout.offsets, ownership.members, strict=True)
    grouped = itertools.groupby(rows, key=lambda row: row[2])
    for member, (spec, offset) in enumerate(
        zip(ownership.parameters.specs, ownership.parameters.offsets, strict=True)
    ):
        found, units = next(grouped)
        assert found == member
        position = offset
        for unit, start, _ in units:
            assert start == position
            assert unit.shape == spec.shape[-2:]
            position += unit.numel
        assert position == offset + spec.numel


@given(shapes, world_sizes, models)
def test_aligned_moves_nothing(chosen: list[Shape], world_size: int, model: CostModel) -> None:
    ownership = assign(named(chosen), world_size, layout="aligned", model=model)
    assert not any(plan.waves for plan in plans_of(ownership))
    assert sum(ownership.traffic()[0]) == 0


@given(shapes, world_sizes)
def test_flat_pads_by_alignment_only(chosen: list[Shape], world_size: int) -> None:
    layout = assign(named(chosen), world_size).layout
    aligned = sum(-(-math.prod(shape) // 16) * 16 for shape in chosen)
    assert layout.numel - aligned < 16 * world_size


@given(ownerships, wave_numels)
def test_what_one_rank_sends_in_a_wave_is_what_the_other_receives(
    ownership: Ownership, wave_numel: int
) -> None:
    plans = plans_of(ownership, wave_numel)
    world_size = len(plans)
    assert len({len(plan.waves) for plan in plans}) == 1, "every rank takes part in every wave"
    for index in range(len(plans[0].waves)):
        for here in range(world_size):
            wave = plans[here].waves[index]
            for there in range(world_size):
                sent = [t.segment for t in wave.outgoing if t.peer == there]
                incoming = plans[there].waves[index].incoming
                assert sent == [t.segment for t in incoming if t.peer == here]
            counts = peer_counts(wave.outgoing, world_size)
            assert counts[here] == 0
            assert sum(counts) == wave.outgoing_numel


@given(ownerships, wave_numels)
def test_traffic_is_what_the_plans_send(ownership: Ownership, wave_numel: int) -> None:
    plans = plans_of(ownership, wave_numel)
    sent, received = ownership.traffic()
    assert sent == [plan.outgoing_numel for plan in plans]
    assert received == [plan.incoming_numel for plan in plans]


@given(ownerships, wave_numels)
def test_an_owner_gets_its_matrices_whole_and_each_in_one_wave(
    ownership: Ownership, wave_numel: int
) -> None:
    for plan in plans_of(ownership, wave_numel):
        in_waves = [tensor for wave in plan.waves for tensor in wave.tensors]
        assert sorted([*plan.local, *in_waves]) == list(plan.owned)
        for tensor in plan.owned:
            pieces = [s for s in plan.segments if s.tensor == tensor]
            for wave in plan.waves:
                fetched = [t.segment for t in wave.incoming if t.segment.tensor == tensor]
                assert not fetched or tensor in wave.tensors
                pieces += fetched
            covered = sorted((s.tensor_start, s.tensor_start + s.numel) for s in pieces)
            assert covered[0][0] == 0
            assert covered[-1][1] == plan.ownership.layout.specs[tensor].numel
            assert all(a[1] == b[0] for a, b in itertools.pairwise(covered))


@given(ownerships, wave_numels)
def test_scatter_undoes_gather(ownership: Ownership, wave_numel: int) -> None:
    plans = plans_of(ownership, wave_numel)
    layout = ownership.layout
    buffer = list(range(layout.numel))
    shards = [buffer[r * layout.shard_numel :][: layout.shard_numel] for r in range(len(plans))]
    returned = [[-1] * layout.shard_numel for _ in plans]
    for plan in plans:
        whole = {index: [-1] * layout.specs[index].numel for index in plan.owned}
        kept = [(plan.rank, s) for s in plan.segments if s.tensor in whole]
        fetched = [(t.peer, t.segment) for wave in plan.waves for t in wave.incoming]
        for rank, s in kept + fetched:
            piece = shards[rank][s.shard_start : s.shard_start + s.numel]
            whole[s.tensor][s.tensor_start : s.tensor_start + s.numel] = piece
        for index, matrix in whole.items():
            start = layout.offsets[index]
            assert matrix == list(range(start, start + len(matrix))), "gathered in order"
        for rank, s in kept + fetched:
            piece = whole[s.tensor][s.tensor_start : s.tensor_start + s.numel]
            returned[rank][s.shard_start : s.shard_start + s.numel] = piece
    for plan, shard, back in zip(plans, shards, returned, strict=True):
        for s in plan.segments:
            assert back[s.shard_start :][: s.numel] == shard[s.shard_start :][: s.numel]


@given(ownerships, wave_numels)
def test_waves_are_packed_and_bounded(ownership: Ownership, wave_numel: int) -> None:
    for plan in plans_of(ownership, wave_numel):
        for wave in plan.waves:
            for transfers in (wave.outgoing, wave.incoming):
                position = 0
                for transfer in transfers:
                    assert transfer.buffer_start == position
                    position += transfer.segment.numel
            assert wave.incoming_numel <= wave_numel or len(wave.tensors) == 1


@given(ownerships, st.integers(1, 3))
def test_batches_are_the_local_matrices_of_one_shape_and_group(
    ownership: Ownership, groups: int
) -> None:
    group = [i % groups for i in range(len(ownership.parameters.specs))]
    for rank in range(ownership.layout.world_size):
        plan = build_plan(ownership, rank, wave_numel=100, groups=group)
        assert sorted(itertools.chain(*plan.batches)) == list(plan.local)
        alike = [
            {(ownership.layout.specs[i].shape, group[ownership.members[i]]) for i in batch}
            for batch in plan.batches
        ]
        assert all(len(keys) == 1 for keys in alike)
        assert len(set.union(set(), *alike)) == len(alike), "as few as can be"


def described(ownership: Ownership) -> list[str]:
    return describe(ownership.parameters, ownership.describe_owners())


@given(shapes, world_sizes, kinds, models)
def test_the_digest_names_the_plan(
    chosen: list[Shape], world_size: int, kind: LayoutKind, model: CostModel
) -> None:
    first, again = (assign(named(chosen), world_size, layout=kind, model=model) for _ in range(2))
    lines = described(first)
    assert digest(lines) == digest(described(again))
    wider = assign(named([*chosen, (3, 3)]), world_size, layout=kind, model=model)
    assert digest(lines) != digest(described(wider))


@given(shapes, world_sizes, models, wave_numels)
def test_auto_is_never_slower_than_the_best_single_layout_by_prediction(
    chosen: list[Shape], world_size: int, model: CostModel, wave_numel: int
) -> None:
    def seconds(layout: Any) -> float:
        taken = choose(
            named(chosen),
            world_size,
            layout=layout,
            model=model,
            wave_numel=wave_numel,
            itemsize=4,
        )
        return predict(taken, model, wave_numel=wave_numel, itemsize=4).seconds

    assert seconds("auto") == min(seconds(kind) for kind in CANDIDATES)


def mixture(experts: int, *, stacked: bool) -> list[TensorSpec]:
    attention = [TensorSpec(f"a{i}", (64, 512)) for i in range(experts // 50)]
    if stacked:
        stacks = range(experts // 100)
        return [*attention, *(TensorSpec(f"e{i}", (100, 24, 56)) for i in stacks)]
    return [*attention, *(TensorSpec(f"e{i}", (24, 56)) for i in range(experts))]


@settings(max_examples=6, deadline=None)
@given(st.integers(1000, 10000), kinds, st.booleans(), st.data())
def test_ten_thousand_ranks_are_covered_and_their_messages_match(
    world_size: int, kind: LayoutKind, stacked: bool, data: st.DataObject
) -> None:
    specs = mixture(3000, stacked=stacked)
    ownership = assign(specs, world_size, layout=kind)
    layout = ownership.layout
    covered = sum(s.numel for rank in range(world_size) for s in layout.segments(rank))
    assert covered == sum(spec.numel for spec in specs)
    assert set(ownership.owners) <= set(range(world_size))
    sent, received = ownership.traffic()
    assert sum(sent) == sum(received)
    here = data.draw(st.sampled_from(range(world_size)))
    plan = build_plan(ownership, here, wave_numel=10**4)
    assert (plan.outgoing_numel, plan.incoming_numel) == (sent[here], received[here])
    peers = {t.peer for wave in plan.waves for t in (*wave.outgoing, *wave.incoming)}
    for there in sorted(peers)[:4]:
        other = build_plan(ownership, there, wave_numel=10**4)
        for mine, theirs in zip(plan.waves, other.waves, strict=True):
            assert [t.segment for t in mine.outgoing if t.peer == there] == [
                t.segment for t in theirs.incoming if t.peer == here
            ]
            assert [t.segment for t in mine.incoming if t.peer == there] == [
                t.segment for t in theirs.outgoing if t.peer == here
            ]


@settings(max_examples=8, deadline=None)
@given(kinds, st.booleans(), st.sampled_from([8, 300, 1500]))
def test_i8_twice_the_matrices_and_ranks_are_little_more_than_twice_the_work(
    kind: LayoutKind, stacked: bool, world_size: int
) -> None:
    def plan(times: int) -> int:
        specs = mixture(1500 * times, stacked=stacked)

        def work() -> None:
            ownership = assign(specs, world_size * times, layout=kind)
            build_plan(ownership, world_size // 2, wave_numel=10**4)
            described(ownership)

        return count_calls(work)

    # n log n would be 2.2; a quadratic step anywhere is 4.
    assert plan(2) <= 2.6 * plan(1)

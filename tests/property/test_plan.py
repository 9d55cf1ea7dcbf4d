"""Plans for any shapes and any number of ranks: cover, one owner, matching messages, identity."""

import itertools
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from distmuon.layout import LayoutKind, TensorSpec
from distmuon.ownership import Ownership, assign
from distmuon.plan import ExchangePlan, build_plan, describe, digest, peer_counts

shapes = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 40))
    | st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    min_size=1,
    max_size=12,
)
world_sizes = st.integers(1, 9)


def described(ownership: Ownership) -> list[str]:
    return describe(ownership.parameters, ownership.describe_owners())


wave_numels = st.sampled_from([1, 40, 10**9])


def plans_for(
    chosen: list[tuple[int, ...]],
    world_size: int,
    wave_numel: int = 10**9,
    layout: LayoutKind = "flat",
) -> list[ExchangePlan]:
    specs = [TensorSpec(f"p{i}", shape) for i, shape in enumerate(chosen)]
    ownership = assign(specs, world_size, layout=layout)
    return [build_plan(ownership, rank, wave_numel=wave_numel) for rank in range(world_size)]


@given(shapes, world_sizes, st.sampled_from(["flat", "aligned"]))
def test_every_element_is_held_once_and_every_matrix_has_one_owner(
    chosen: list[tuple[int, ...]], world_size: int, layout: LayoutKind
) -> None:
    plans = plans_for(chosen, world_size, layout=layout)
    assert layout == "flat" or not any(plan.waves for plan in plans), "aligned moves nothing"
    held = [[0] * math.prod(spec.shape) for spec in plans[0].ownership.layout.specs]
    for plan in plans:
        for s in plan.segments:
            for position in range(s.tensor_start, s.tensor_start + s.numel):
                held[s.tensor][position] += 1
    assert all(count == 1 for counts in held for count in counts)
    assert sorted(t for plan in plans for t in plan.owned) == list(range(len(held)))


@given(shapes, world_sizes, wave_numels)
def test_what_one_rank_sends_in_a_wave_is_what_the_other_receives(
    chosen: list[tuple[int, ...]], world_size: int, wave_numel: int
) -> None:
    plans = plans_for(chosen, world_size, wave_numel)
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


@given(shapes, world_sizes, wave_numels)
def test_an_owner_gets_its_matrices_whole_and_each_in_one_wave(
    chosen: list[tuple[int, ...]], world_size: int, wave_numel: int
) -> None:
    for plan in plans_for(chosen, world_size, wave_numel):
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


@given(shapes, world_sizes, wave_numels)
def test_waves_are_packed_and_bounded(
    chosen: list[tuple[int, ...]], world_size: int, wave_numel: int
) -> None:
    for plan in plans_for(chosen, world_size, wave_numel):
        for wave in plan.waves:
            for transfers in (wave.outgoing, wave.incoming):
                position = 0
                for transfer in transfers:
                    assert transfer.buffer_start == position
                    position += transfer.segment.numel
            assert wave.incoming_numel <= wave_numel or len(wave.tensors) == 1


@given(shapes, world_sizes)
def test_the_digest_names_the_plan(chosen: list[tuple[int, ...]], world_size: int) -> None:
    first, again = (plans_for(chosen, world_size)[0].ownership for _ in range(2))
    lines = described(first)
    assert digest(lines) == digest(described(again))
    wider = plans_for([*chosen, (3, 3)], world_size)[0].ownership
    assert digest(lines) != digest(described(wider))


@settings(max_examples=5, deadline=None)
@given(st.integers(1000, 10000))
def test_ten_thousand_ranks_are_covered(world_size: int) -> None:
    specs = [TensorSpec(f"e{i}", (24, 56)) for i in range(3000)]
    specs += [TensorSpec(f"a{i}", (64, 512)) for i in range(60)]
    ownership = assign(specs, world_size)
    layout = ownership.layout
    covered = sum(s.numel for rank in range(world_size) for s in layout.segments(rank))
    assert covered == sum(spec.numel for spec in specs)
    assert set(ownership.owners) <= set(range(world_size))

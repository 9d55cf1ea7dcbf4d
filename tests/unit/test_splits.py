"""Which matrices are split: balance on real shapes, bytes, options."""

import pytest
import torch
from torch import nn

from distmuon import Muon
from distmuon.choice import choose
from distmuon.cost import CostModel, default_cost_model
from distmuon.layout import TensorSpec, flat_layout
from distmuon.ownership import Ownership, assign
from distmuon.plan import build_plan
from distmuon.split_plan import build_split_plan
from distmuon.splits import Sharing, Split, most_parts, part_work

MODEL = default_cost_model("cuda")


def llama_7b() -> list[TensorSpec]:
    d, hidden = 4096, 11008
    shapes = [(d, d)] * 4 + [(hidden, d)] * 2 + [(d, hidden)]
    return [TensorSpec(f"layers.{i}.{j}", s) for i in range(32) for j, s in enumerate(shapes)]


def over_fair_share(ownership: Ownership, specs: list[TensorSpec]) -> float:
    """The slowest rank's work over its share of all matrices' work, as one rank would do it."""
    whole = sum(MODEL.work(spec.shape) for spec in specs)
    return max(ownership.loads(MODEL)) * ownership.layout.world_size / whole


def test_splitting_brings_7b_on_512_ranks_from_3_3_to_1_6() -> None:
    specs = llama_7b()
    whole = assign(specs, 512, model=MODEL)
    assert over_fair_share(whole, specs) == pytest.approx(3.277, abs=1e-3)
    shared = whole.with_splits(MODEL, Sharing(4))
    assert over_fair_share(shared, specs) <= 1.6
    # The square ones would send more than they do whole; the others pay up to three ranks.
    assert {len(split.ranks) for split in shared.splits} == {3}
    assert len(shared.splits) == 3 * 32


def test_nothing_is_split_where_no_matrix_is_above_a_fair_share() -> None:
    whole = assign(llama_7b(), 64, model=MODEL)
    assert whole.with_splits(MODEL, Sharing(4)) is whole


def bytes_of(m: int, n: int, k: int, *, splits: bool, tall: bool) -> int:
    """Sent by all ranks for one matrix whose pieces lie equally on k ranks."""
    layout = flat_layout([TensorSpec("w", (n, m) if tall else (m, n))], k)
    if not splits:
        ownership = Ownership(layout, (0,), (0,), layout, (0,))
        whole = [build_plan(ownership, rank, wave_numel=10**12) for rank in range(k)]
        return sum(4 * (plan.outgoing_numel + plan.incoming_numel) for plan in whole)
    cuts = tuple(n * i // k for i in range(k + 1))
    split = Split(0, 0, tuple(range(k)), cuts)
    parts = [build_split_plan(layout, [split], rank, wave_numel=10**12) for rank in range(k)]
    return sum(
        4 * (p.outgoing_numel + p.incoming_numel + p.sent_numel("gram") + p.sent_numel("transform"))
        for p in parts
    )


@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_rule_for_the_number_of_parts_is_where_the_bytes_break_even(k: int) -> None:
    m = 256
    widths = range(264, 5 * m, 8 * k)
    for n in widths:
        fewer = bytes_of(m, n, k, splits=True, tall=True) <= bytes_of(
            m, n, k, splits=False, tall=True
        )
        pays = most_parts(n, m, itemsize=4) >= k
        # The rule leaves out the scales, one number a message.
        assert fewer == pays or abs(8 * m * n - 12 * k * m * (m + 32) // 2) < 64 * k
    assert any(most_parts(n, m, itemsize=4) < k for n in widths)
    assert any(most_parts(n, m, itemsize=4) >= k for n in widths)


def test_a_cut_along_the_columns_sends_no_more_than_its_parts_need() -> None:
    m, n, k = 64, 960, 4
    layout = flat_layout([TensorSpec("w", (m, n))], k)
    split = Split(0, 0, tuple(range(k)), tuple(n * i // k for i in range(k + 1)))
    for rank in range(k):
        plan = build_split_plan(layout, [split], rank, wave_numel=10**12)
        # Each holds a quarter of the rows and needs a quarter of the columns of all of them.
        assert plan.outgoing_numel == plan.incoming_numel == m * n // k * (k - 1) // k


def test_parts_cost_what_they_compute() -> None:
    # 17 m³ for the polynomial and 5 m²w a part of 5 (3 m²n + m³), by hand for n = 4m, k = 4.
    whole = MODEL.work((256, 1024))
    assert part_work((256, 1024), 256, is_owner=True) == pytest.approx(whole * 22 / 65, abs=1)
    assert part_work((1024, 256), 256, is_owner=False) == pytest.approx(whole * 5 / 65, abs=1)


def test_the_digest_sees_how_a_matrix_is_shared() -> None:
    specs = [TensorSpec("a", (20, 900)), TensorSpec("b", (8, 9))]
    whole = assign(specs, 4, model=MODEL)
    two, four = (whole.with_splits(MODEL, Sharing(most)) for most in (2, 4))
    lines = [each.describe_owners() for each in (whole, two, four)]
    assert lines[0] != lines[1] != lines[2]
    assert "cut at [0, 450, 900]" in lines[1][0] + lines[1][1]


def test_auto_splits_where_that_is_predicted_to_be_faster_and_says_so() -> None:
    specs = [TensorSpec("large", (64, 8000)), *(TensorSpec(f"s{i}", (8, 8)) for i in range(9))]
    fast_network = CostModel(latency=1e-9, bandwidth=1e15, flops=1e9)
    slow_network = CostModel(latency=1.0, bandwidth=1e15, flops=1e12)
    for model, expected in ((fast_network, 1), (slow_network, 0)):
        found = choose(
            specs,
            4,
            layout="auto",
            model=model,
            wave_numel=10**9,
            itemsize=4,
            sharing=Sharing(4),
        )
        assert len(found.splits) == expected
        assert 'layout="flat" with 1 split matrices' in found.reason
    asked = choose(
        specs,
        4,
        layout="flat",
        model=slow_network,
        wave_numel=10**9,
        itemsize=4,
        sharing=Sharing(4),
    )
    assert len(asked.splits) == 1
    assert "was asked for" in asked.reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_split": 0}, r"Invalid max_split=0\. Must be >= 1"),
        ({"max_split": 5}, r"Invalid max_split=5\. Must be <= 4"),
        ({"max_split": 2, "layout": "aligned"}, r'max_split=2 needs layout="flat" or "auto"'),
        ({"split_dtype": "bfloat16"}, r"Invalid split_dtype='bfloat16'"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Muon([nn.Parameter(torch.ones(3, 3))], **options)  # type: ignore[arg-type]


def test_one_process_splits_nothing() -> None:
    parameter = nn.Parameter(torch.ones(6, 200))
    optimizer = Muon([("w", parameter)], max_split=4)
    parameter.grad = torch.randn(6, 200)
    optimizer.step()
    assert optimizer.plan[0].ownership.splits == ()
    assert optimizer.report().newton_schulz_calls == 1

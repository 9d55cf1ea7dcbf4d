"""Stacks of experts on real gloo ranks: cut between and inside experts, bitwise as one process."""

from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distmuon import CostModel, Muon, Report
from distmuon.ownership import Ownership
from distmuon.plan import ExchangePlan
from tests.harness import run_ranks

WORLDS = [1, 2, 3, 4]
Layout = Literal["flat", "aligned", "auto"]
# "ragged" has 63 elements an expert: most of them start where nothing is aligned.
MIXTURE = {"o": (24, 24), "up": (13, 16, 24), "router": (8, 24), "ragged": (9, 7, 9)}
# Here whole experts fit the shards: aligned cuts a stack between two experts.
EVEN = {"o": (40, 24), "up": (24, 16, 24), "down": (8, 24, 16)}
ONE_STACK = {"experts": (2, 12, 20)}
# Messages that cost nothing: balance alone decides, so that much has to be moved.
FREE = CostModel(latency=1e-12, bandwidth=1e18, flops=1e9)


def train(
    shapes: dict[str, tuple[int, ...]], process_group: Any, **options: Any
) -> tuple[dict[str, Tensor], Muon]:
    generator = torch.Generator().manual_seed(3)
    model = {
        name: nn.Parameter(torch.randn(shape, generator=generator))
        for name, shape in shapes.items()
    }
    optimizer = Muon(list(model.items()), lr=2e-2, process_group=process_group, **options)
    for _ in range(3):
        for parameter in model.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in model.items()}, optimizer


def on_rank(
    shapes: dict[str, tuple[int, ...]], options: dict[str, Any]
) -> tuple[dict[str, Tensor], Report, ExchangePlan]:
    result, optimizer = train(shapes, dist.group.WORLD, **options)
    return result, optimizer.report(), optimizer.plan[0]


def assert_same_bits(results: list[dict[str, Tensor]], reference: dict[str, Tensor]) -> None:
    for rank, result in enumerate(results):
        for name, expected in reference.items():
            assert torch.equal(result[name], expected), f"{name} differs on rank {rank}"


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize(
    ("layout", "shapes"), [("flat", MIXTURE), ("aligned", EVEN), ("auto", MIXTURE)]
)
def test_i1_experts_of_a_cut_stack_are_bitwise_those_of_one_process(
    world_size: int, layout: Layout, shapes: dict[str, tuple[int, ...]]
) -> None:
    reference, _ = train(shapes, None)
    options = {"layout": layout, "cost_model": FREE, "wave_bytes": 2000}
    results, reports, plans = zip(*run_ranks(world_size, on_rank, shapes, options), strict=True)
    assert_same_bits(list(results), reference)
    matrices = sum(shape[0] if len(shape) == 3 else 1 for shape in shapes.values())
    assert sum(report.newton_schulz_calls for report in reports) == 3 * matrices
    assert sum(report.matrices_owned for report in reports) == matrices
    assert {report.matrices for report in reports} == {matrices}
    assert len({plan.reason for plan in plans}) == 1
    ownership = plans[0].ownership
    owners = {ownership.owners[i] for i in _experts(ownership, "up")}
    assert len(owners) > 1 or world_size == 1, "a stack has several owners"
    if layout == "flat" and world_size > 1:
        spans = [ownership.layout.span(i) for i in _experts(ownership, "up")]
        assert any(len(span) > 1 for span in spans), "an expert is cut"
    for plan, report in zip(plans, reports, strict=True):
        assert report.bytes_sent.get("gather", 0) == 3 * 4 * plan.outgoing_numel
        assert report.bytes_sent.get("scatter", 0) == 3 * 4 * plan.incoming_numel


def _experts(ownership: Ownership, stack: str) -> list[int]:
    specs = ownership.layout.specs
    return [i for i, spec in enumerate(specs) if spec.name.startswith(f"{stack}[")]


def test_i1_more_ranks_than_matrices_of_a_stack() -> None:
    reference, _ = train(ONE_STACK, None)
    options = {"layout": "flat", "cost_model": FREE}
    results, reports, _ = zip(*run_ranks(4, on_rank, ONE_STACK, options), strict=True)
    assert_same_bits(list(results), reference)
    assert sorted(report.matrices_owned for report in reports) == [0, 0, 1, 1]


def test_an_empty_stack_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"experts has shape \[0, 4, 6\], no elements"):
        Muon([("experts", nn.Parameter(torch.empty(0, 4, 6)))])


def with_its_own_rates() -> str:
    rank = dist.get_rank()
    model = CostModel(latency=1e-5, bandwidth=1e9, flops=1e9 * (1 + rank))
    try:
        train(ONE_STACK, dist.group.WORLD, layout="auto", cost_model=model)
    except RuntimeError as error:
        return str(error)
    return ""


def test_i7_ranks_with_different_cost_models_all_raise_and_say_so() -> None:
    messages = run_ranks(2, with_its_own_rates)
    assert messages[0] == messages[1]
    assert "flops=1000000000.0" in messages[0]

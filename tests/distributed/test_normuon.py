"""NorMuon on real gloo ranks: one process's bits in every layout, and after every resumption."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from distmuon import Muon, Report, checkpoint
from tests.distributed.test_optimizer import RAGGED
from tests.distributed.test_optimizer import train as train_plain
from tests.harness import run_ranks

SHAPES = {
    "wide": (61, 150),
    "experts": (7, 11, 6),
    "row": (1, 37),
    "square": (17, 17),
    "tall": (40, 9),
}
Weights = dict[str, Tensor]


class Model(nn.Module):
    """Matrices, a stack, and a bias for AdamW."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        for name, shape in {**SHAPES, "late": (9, 31), "bias": (23,)}.items():
            values = torch.randn(shape, generator=generator).to(dtype)
            self.register_parameter(name, nn.Parameter(values))

    @property
    def weights(self) -> Weights:
        return {name: p.detach().clone() for name, p in self.named_parameters()}


def build(process_group: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = Model(dtype)
    named = dict(model.named_parameters())
    names = list(SHAPES)
    groups: list[dict[str, Any]] = [
        {"params": [(n, named[n]) for n in names[:3]], "algorithm": "normuon"},
        {"params": [(n, named[n]) for n in names[3:]], "algorithm": "normuon", "nesterov": False},
        {"params": [("bias", named["bias"])], "algorithm": "adamw"},
    ]
    return model, Muon(groups, lr=2e-2, process_group=process_group, **options)


def add_late(model: Model, optimizer: Muon) -> None:
    optimizer.add_param_group({"params": [("late", model.late)], "algorithm": "normuon"})
    optimizer.refresh()


def train(model: Model, optimizer: Muon, steps: range) -> Weights:
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for name, parameter in model.named_parameters():
            grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            absent = name == "late" and len(optimizer.param_groups) == 3
            parameter.grad = None if absent or (step == 1 and name == "square") else grad
        optimizer.step()
    return model.weights


def assert_same_bits(found: Weights, expected: Weights) -> None:
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def run_all(folder: Path) -> tuple[list[Weights], Any]:
    """Every layout and wave size; then state as a whole, in handles and in our own files."""
    group = dist.group.WORLD
    results = []
    for options in ({}, {"layout": "aligned"}, {"wave_bytes": 512}):
        model, optimizer = build(group, **options)
        results.append(train(model, optimizer, range(4)))
    model, optimizer = build(group)
    train(model, optimizer, range(3))
    add_late(model, optimizer)
    results.append(train(model, optimizer, range(3, 5)))
    model, optimizer = build(group, torch.bfloat16)
    results.append(train(model, optimizer, range(3)))
    model, optimizer = build(group)
    train(model, optimizer, range(2))
    optimizer.consolidate_state_dict(to=0)
    whole = optimizer.state_dict() if dist.get_rank() == 0 else None
    dcp.save({"optimizer": optimizer.sharded_state_dict()}, checkpoint_id=folder / "dcp")
    checkpoint.save(folder / "own", optimizer, model=model)
    return results, whole


def resume_all(folder: Path, whole: Any, weights: Weights) -> list[Weights]:
    results = []
    for source in ("whole", "dcp", "own"):
        model, optimizer = build(dist.group.WORLD)
        model.load_state_dict(weights)
        if source == "own":
            checkpoint.load(folder / "own", optimizer, model=model)
        elif source == "dcp":
            saved = optimizer.sharded_state_dict()
            dcp.load({"optimizer": saved}, checkpoint_id=folder / "dcp")
            optimizer.load_state_dict(saved)
        else:
            optimizer.load_state_dict(whole)
        results.append(train(model, optimizer, range(2, 4)))
    return results


@pytest.mark.parametrize(("world_size", "after"), [(1, 3), (2, 4), (3, 1), (4, 2)])
def test_i1_i6_every_layout_and_every_resumption_has_one_processs_bits(
    world_size: int, after: int, tmp_path: Path
) -> None:
    model, optimizer = build(None)
    weights = train(model, optimizer, range(2))
    plain = train(model, optimizer, range(2, 4))
    model, optimizer = build(None)
    train(model, optimizer, range(3))
    add_late(model, optimizer)
    late = train(model, optimizer, range(3, 5))
    narrow = train(*build(None, torch.bfloat16), range(3))
    found = run_ranks(world_size, run_all, tmp_path)
    for results, _ in found:
        for result, expected in zip(results, (plain, plain, plain, late, narrow), strict=True):
            assert_same_bits(result, expected)
    for results in run_ranks(after, resume_all, tmp_path, found[0][1], weights):
        for result in results:
            assert_same_bits(result, plain)


def test_i1_ranks_that_own_nothing() -> None:
    plain = train(*build(None), range(3))
    for result in run_ranks(4, one_matrix_each):
        assert_same_bits(result, {name: plain[name] for name in ("wide",)})


def one_matrix_each() -> Weights:
    model = Model()
    groups = [{"params": [("wide", model.wide)], "algorithm": "normuon"}]
    optimizer = Muon(groups, lr=2e-2, process_group=dist.group.WORLD)
    for step in range(3):
        generator = torch.Generator().manual_seed(100 + step)
        model.wide.grad = torch.randn(model.wide.shape, generator=generator)
        optimizer.step()
    return {"wide": model.wide.detach().clone()}


def count_state() -> Report:
    parameters = {f"layer{i}": nn.Parameter(torch.randn(96, 96)) for i in range(8)}
    wide = {f"up{i}": nn.Parameter(torch.randn(384, 96)) for i in range(4)}
    down = {f"down{i}": nn.Parameter(torch.randn(96, 384)) for i in range(4)}
    named = [*parameters.items(), *wide.items(), *down.items()]
    optimizer = Muon([{"params": named, "algorithm": "normuon"}], process_group=dist.group.WORLD)
    for _, parameter in named:
        parameter.grad = torch.ones_like(parameter)
        dist.broadcast(parameter.data, 0)
    optimizer.step()
    return optimizer.report()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_i3_state_is_one_nth_with_the_rows_under_one_percent_off(world_size: int) -> None:
    elements = 8 * 96 * 96 + 8 * 96 * 384
    rows = 8 * 96 + 4 * 384 + 4 * 96
    share = 4 * (elements + rows) / world_size
    reports = run_ranks(world_size, count_state)
    assert len({report.state_bytes for report in reports}) == 1, "equal on every rank"
    assert share <= reports[0].state_bytes < 1.01 * share
    assert reports[0].muon_parameters == elements


def refuse_split() -> str:
    named = [("wide", nn.Parameter(torch.ones(64, 512)))]
    groups = [{"params": named, "algorithm": "normuon"}]
    optimizer = Muon(groups, process_group=dist.group.WORLD, max_split=2)
    named[0][1].grad = torch.ones(64, 512)
    with pytest.raises(ValueError, match="wide is split over 2 ranks") as caught:
        optimizer.step()
    assert bool((named[0][1] == 1).all())
    return str(caught.value)


def test_split_matrices_are_refused_before_anything_is_changed() -> None:
    for message in run_ranks(2, refuse_split):
        assert "max_split=1" in message


VARIANTS: list[dict[str, Any]] = [
    {"decay_rule": "cautious", "weight_decay": 1.0},
    {"adjust_lr_fn": "max_dim", "max_update_rms": 0.15},
    {"adjust_lr_fn": "update_rms"},
]


def train_variants() -> list[Weights]:
    group = dist.group.WORLD if dist.is_initialized() else None
    return [
        train_plain(RAGGED, torch.float32, group, steps=3, **options)[0] for options in VARIANTS
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_i1_cautious_decay_and_bounded_updates_have_one_processs_bits(world_size: int) -> None:
    expected = train_variants()
    for results in run_ranks(world_size, train_variants):
        for result, reference in zip(results, expected, strict=True):
            assert_same_bits(result, reference)

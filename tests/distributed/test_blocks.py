"""Fused matrices, kernels and turned weights on real gloo ranks: bitwise as in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distmuon import Blocks, CostModel, Muon, checkpoint, qkv_blocks
from distmuon.checkpoint import CheckpointError
from distmuon.checkpoint.manifest import read_manifest
from tests.harness import run_ranks

# Messages that cost nothing: balance alone decides, so that much has to be moved.
FREE = CostModel(latency=1e-12, bandwidth=1e18, flops=1e9)
SHAPES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "qkv": ((40, 24), {"blocks": (24, 8, 8)}),
    "by_head": ((36, 17), {"blocks": qkv_blocks(4, 3, order="by_head")}),
    "c_attn": ((14, 30), {"blocks": Blocks(3, "columns"), "axes": "in_out"}),
    "experts": ((5, 18, 7), {"blocks": 2}),
    "conv": ((12, 5, 3, 3), {"axes": "conv"}),
    "grouped": ((12, 5, 3), {"axes": "conv", "blocks": 4}),
    "plain": ((33, 9), {}),
}
MATRICES = 3 + 3 + 3 + 10 + 1 + 4 + 1
VARIANTS: tuple[dict[str, Any], ...] = (
    {"layout": "flat", "wave_bytes": 1500},
    {"layout": "flat", "max_split": 4},
    {"layout": "aligned"},
    {"layout": "auto"},
)


def build(process_group: Any, change: dict[str, Any] | None = None, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    model = nn.ParameterDict(
        {name: torch.randn(shape, generator=generator) for name, (shape, _) in SHAPES.items()}
        | {"bias": torch.randn(13, generator=generator)}
    )
    groups = [
        {"params": [(name, model[name])], **group, **((change or {}).get(name, {}))}
        for name, (_, group) in SHAPES.items()
    ]
    groups.append({"params": [("bias", model["bias"])], "algorithm": "adamw"})
    options = {"cost_model": FREE, "adjust_lr_fn": "original", **options}
    return model, Muon(groups, lr=2e-2, process_group=process_group, **options)


def coefficients(step: int, rank: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return {
        name: torch.randn(shape, generator=generator)
        for name, shape in [*((n, s) for n, (s, _) in SHAPES.items()), ("bias", (13,))]
    }


def train(model: nn.ParameterDict, optimizer: Muon, steps: range) -> dict[str, Tensor]:
    for step in steps:
        for name, grad in coefficients(step, 0).items():
            model[name].grad = grad
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in model.items()}


def every_variant() -> list[tuple[dict[str, Tensor], tuple[int, int], int]]:
    found = []
    for options in VARIANTS:
        model, optimizer = build(dist.group.WORLD, **options)
        result = train(model, optimizer, range(3))
        report = optimizer.report()
        moved = sum(plan.outgoing_numel for plan in optimizer.plan)
        assert report.newton_schulz_calls == report.newton_schulz_expected
        found.append((result, (report.matrices, report.newton_schulz_calls), moved))
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_i1_blocks_are_bitwise_those_of_one_process_in_every_layout(world_size: int) -> None:
    reference = train(*build(None), range(3))
    outcome = run_ranks(world_size, every_variant)
    for rank, variants in enumerate(outcome):
        for options, (result, _, _) in zip(VARIANTS, variants, strict=True):
            for name, expected in reference.items():
                if "max_split" in options and name == "plain":
                    continue  # the one matrix that may be shared between ranks
                assert torch.equal(result[name], expected), f"{name} on rank {rank}, {options}"
    for each in zip(*outcome, strict=True):
        assert {matrices for _, (matrices, _), _ in each} == {MATRICES}
        assert sum(calls for _, (_, calls), _ in each) == 3 * MATRICES
    if world_size > 1:
        assert sum(variants[0][2] for variants in outcome) > 0, "something had to be moved"


class Weighted(nn.Module):
    """Its gradients are the coefficients of the rank and step."""

    def __init__(self, weights: nn.ParameterDict) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, step: int) -> Tensor:
        factors = coefficients(step, dist.get_rank())
        return torch.stack([(p * factors[n]).sum() for n, p in self.weights.items()]).sum()


def reduced() -> dict[str, dict[str, Tensor]]:
    found = {}
    for reduce in ("hook", "owned"):
        weights, optimizer = build(dist.group.WORLD, reduce=reduce)
        model: nn.Module = Weighted(weights)
        if reduce == "hook":
            model = DistributedDataParallel(model)
        optimizer.attach(model)
        for step in range(2):
            optimizer.zero_grad()
            model(step).backward()
            optimizer.step()
        found[reduce] = {name: parameter.detach().clone() for name, parameter in weights.items()}
    return found


def test_i1_blocks_with_gradients_that_the_optimizer_averages() -> None:
    model, optimizer = build(None)
    for step in range(2):
        each = [coefficients(step, rank) for rank in range(3)]
        for name, parameter in model.items():
            parameter.grad = (each[0][name] + each[1][name] + each[2][name]) / 3
        optimizer.step()
    for outcome in run_ranks(3, reduced):
        for reduce, result in outcome.items():
            for name, expected in model.items():
                assert torch.equal(result[name], expected), f"{name} with {reduce}"


# Checkpoints --------------------------------------------------------------------------------------


def save(folder: Path) -> None:
    model, optimizer = build(dist.group.WORLD)
    train(model, optimizer, range(2))
    checkpoint.save(folder, optimizer, model=model)


def load(folder: Path) -> tuple[dict[str, Tensor], str]:
    model, optimizer = build(dist.group.WORLD)
    checkpoint.load(folder, optimizer, model=model)
    result = train(model, optimizer, range(2, 3))
    other, changed = build(dist.group.WORLD, {"qkv": {"blocks": 5}, "conv": {"blocks": 2}})
    before = {name: parameter.detach().clone() for name, parameter in other.items()}
    try:
        checkpoint.load(folder, changed, model=other)
    except CheckpointError as error:
        assert all(torch.equal(other[name], value) for name, value in before.items())
        return result, str(error)
    return result, ""


def test_i6_blocks_belong_to_a_checkpoint(tmp_path: Path) -> None:
    reference = train(*build(None), range(3))
    run_ranks(2, save, tmp_path / "saved")
    for result, message in run_ranks(3, load, tmp_path / "saved"):
        assert all(torch.equal(result[name], value) for name, value in reference.items())
        assert "does not fit in 2 places; nothing was changed" in message
        assert "group 0 (qkv, ...): it was saved with blocks=((24, 8, 8), 'rows', 1)" in message
        assert "group 4 (conv, ...): it was saved with blocks=None" in message
    written = checkpoint.reshard(tmp_path / "saved", tmp_path / "four", 4)
    assert read_manifest(written).groups[0]["blocks"] == [[24, 8, 8], "rows", 1]
    again = run_ranks(4, load, written)
    assert all(torch.equal(again[3][0][name], value) for name, value in reference.items())
    with pytest.raises(CheckpointError, match=r"Group 0 has blocks=.*orthogonalize its matrices"):
        checkpoint.export(written, tmp_path / "torch.safetensors", "muon")


def other_blocks_on_one_rank() -> str:
    sizes = 5 if dist.get_rank() else (24, 8, 8)
    model, optimizer = build(dist.group.WORLD, {"qkv": {"blocks": sizes}})
    try:
        train(model, optimizer, range(1))
    except RuntimeError as error:
        return str(error)
    return ""


def test_i7_ranks_that_cut_otherwise_all_raise_and_say_where() -> None:
    messages = run_ranks(2, other_blocks_on_one_rank)
    assert messages[0] == messages[1]
    assert "blocks=Blocks(sizes=5, dim='rows', repeats=1)" in messages[0]

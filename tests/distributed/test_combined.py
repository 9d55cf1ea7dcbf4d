"""Features together, each tested alone elsewhere: real gloo ranks have one process's bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distmuon import Blocks, CostModel, Muon, QKClip, checkpoint, qkv_blocks
from distmuon.qk_clip import AttentionLayer, attention_layer, head_rows
from tests.harness import run_ranks

# Messages that cost nothing: balance alone decides, so that much has to be moved.
FREE = CostModel(latency=1e-12, bandwidth=1e18, flops=1e9)
COMPANION = {"algorithm": "torch.optim.SGD(momentum=0.9, nesterov=True)", "weight_decay": 0.02}
NORMUON = {"algorithm": "normuon", "betas": (0.9, 0.8)}
# Shape and group of each parameter.
PARTS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "qkv": ((40, 24), {**NORMUON, "blocks": (24, 8, 8)}),
    "by_head": ((36, 17), {**NORMUON, "blocks": qkv_blocks(4, 3, order="by_head")}),
    "c_attn": ((14, 30), {**NORMUON, "blocks": Blocks(3, "columns"), "axes": "in_out"}),
    "turned": ((13, 29), {**NORMUON, "axes": "in_out", "adjust_lr_fn": "original"}),
    "turned_stack": ((3, 7, 10), {**NORMUON, "axes": "in_out"}),
    "experts": ((5, 18, 7), {**NORMUON, "blocks": 2}),
    "kernel": ((12, 5, 3, 3), {**NORMUON, "axes": "conv"}),
    "grouped": ((12, 5, 3), {**NORMUON, "axes": "conv", "blocks": 4, "max_update_rms": 0.1}),
    "plain_stack": ((4, 6, 9), {"blocks": 3, "max_update_rms": 0.15}),
    "plain": ((33, 9), {"adjust_lr_fn": "update_rms", "decay_rule": "cautious"}),
    "key": ((24, 19), COMPANION),
    "query": ((24, 19), {**NORMUON, "decay_rule": "cautious"}),
    "head": ((9, 24), {"algorithm": "torch.optim.Adafactor"}),
    "scale": ((24,), {"algorithm": "torch.optim.Adafactor"}),
    "bias": ((30,), {"algorithm": "adamw", "decay_rule": "cautious"}),
}
STEPS = 4


def heads() -> list[AttentionLayer]:
    """A fused matrix, one stored [in, out], and keys that are a companion's."""
    fused = [head_rows("qkv", 2, 4, first=first) for first in (0, 24)]
    turned = [head_rows("c_attn", 2, 5, first=first, axis="columns") for first in (0, 10)]
    biases = [head_rows("bias", 2, 5, first=first) for first in (0, 10)]
    return [
        AttentionLayer("fused", (fused[0],), (fused[1],)),
        AttentionLayer("turned", (turned[0], biases[0]), (turned[1], biases[1])),
        attention_layer("apart", query="query", key="key", heads=4, head_dim=6),
    ]


class Model(nn.Module):
    """Its gradients are the coefficients of the rank and step."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        for name, (shape, _) in PARTS.items():
            values = torch.randn(shape, generator=generator).to(dtype)
            self.register_parameter(name, nn.Parameter(values))

    def forward(self, factors: dict[str, Tensor]) -> Tensor:
        return torch.stack([(p * factors[n]).sum() for n, p in self.named_parameters()]).sum()


def coefficients(step: int, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    shapes = {name: shape for name, (shape, _) in PARTS.items()}
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}


def build(process_group: Any, dtype: torch.dtype, **options: Any) -> tuple[Model, Muon]:
    model = Model(dtype)
    groups = [
        {"params": [(name, parameter)], **PARTS[name][1]}
        for name, parameter in model.named_parameters()
    ]
    clip = QKClip(heads(), threshold=20.0, alpha=0.4)
    options = {"cost_model": FREE, "lr": 2e-2, "qk_clip": clip, **options}
    return model, Muon(groups, process_group=process_group, **options)


def observe(optimizer: Muon, step: int) -> None:
    for index, layer in enumerate(optimizer.qk_clip.layers if optimizer.qk_clip else ()):
        generator = torch.Generator().manual_seed(7 * step + index)
        assert optimizer.qk_clip is not None
        optimizer.qk_clip.observe(layer.name, 60.0 * torch.rand(layer.heads, generator=generator))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def train(model: Model, optimizer: Muon, steps: range, *, averaged: int = 1) -> dict[str, Tensor]:
    """Steps with gradients that are there, each the average over a number of ranks."""
    for step in steps:
        each = [coefficients(step, rank, model.bias.dtype) for rank in range(averaged)]
        for name, parameter in model.named_parameters():
            parameter.grad = sum((e[name] for e in each[1:]), each[0][name]) / averaged
            if (step, name) in {(1, "experts"), (1, "key"), (2, "turned")}:
                parameter.grad = None
        observe(optimizer, step)
        optimizer.step()
    return weights(model)


VARIANTS: tuple[tuple[torch.dtype, dict[str, Any]], ...] = (
    (torch.float32, {"wave_bytes": 1500, "diagnostics_every": 2}),
    (torch.float32, {"layout": "aligned"}),
    (torch.bfloat16, {"diagnostics_every": 1}),
    (torch.bfloat16, {"layout": "aligned"}),
    (torch.bfloat16, {"stochastic_rounding": 5, "wave_bytes": 1500}),
    (torch.bfloat16, {"stochastic_rounding": 5, "layout": "aligned"}),
)
Kind = tuple[torch.dtype, int | None]


def kind(dtype: torch.dtype, options: dict[str, Any]) -> Kind:
    """What of a variant one process's bits depend on."""
    return dtype, options.get("stochastic_rounding")


def every_variant(folder: Path) -> list[dict[str, Tensor]]:
    found = []
    for number, (dtype, options) in enumerate(VARIANTS):
        model, optimizer = build(dist.group.WORLD, dtype, **options)
        train(model, optimizer, range(2))
        checkpoint.save(folder / str(number), optimizer, model=model)
        found.append(train(model, optimizer, range(2, STEPS)))
        report = optimizer.report()
        assert report.newton_schulz_calls == report.newton_schulz_expected
        assert (report.diagnostics is None) == ("diagnostics_every" not in options)
    return found


def resume(folder: Path) -> list[dict[str, Tensor]]:
    found = []
    for number, (dtype, options) in enumerate(VARIANTS):
        model, optimizer = build(dist.group.WORLD, dtype, **options)
        checkpoint.load(folder / str(number), optimizer, model=model)
        found.append(train(model, optimizer, range(2, STEPS)))
    return found


@pytest.fixture(scope="module")
def one_process() -> dict[Kind, dict[str, Tensor]]:
    found = {}
    for dtype, seed in sorted({kind(*variant) for variant in VARIANTS}, key=str):
        model, optimizer = build(None, dtype, stochastic_rounding=seed)
        found[dtype, seed] = train(model, optimizer, range(STEPS))
        assert optimizer.qk_clip is not None
        assert optimizer.qk_clip.stats()["clipped_heads_total"] > 10
    return found


def assert_same_bits(
    found: list[dict[str, Tensor]], expected: dict[Kind, dict[str, Tensor]]
) -> None:
    for (dtype, options), result in zip(VARIANTS, found, strict=True):
        for name, value in expected[kind(dtype, options)].items():
            assert torch.equal(result[name], value), f"{name}, {dtype}, {options}"


@pytest.mark.parametrize(("world_size", "after"), [(1, 3), (2, 4), (3, 1), (4, 2)])
def test_i1_i6_all_together_is_bitwise_one_process_and_so_it_goes_on(
    world_size: int,
    after: int,
    one_process: dict[Kind, dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    for found in run_ranks(world_size, every_variant, tmp_path):
        assert_same_bits(found, one_process)
    for found in run_ranks(after, resume, tmp_path):
        assert_same_bits(found, one_process)


def reduced() -> list[dict[str, Tensor]]:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for reduce in ("hook", "owned"):
            model, optimizer = build(dist.group.WORLD, dtype, reduce=reduce)
            wrapped = DistributedDataParallel(model) if reduce == "hook" else model
            optimizer.attach(wrapped)
            for step in range(STEPS):
                optimizer.zero_grad()
                wrapped(coefficients(step, dist.get_rank(), dtype)).backward()
                observe(optimizer, step)
                optimizer.step()
            found.append(weights(model))
    return found


def test_all_together_with_gradients_that_the_optimizer_averages() -> None:
    first, second = run_ranks(2, reduced)
    for found, again in zip(first, second, strict=True):
        assert all(torch.equal(found[name], again[name]) for name in PARTS)
    model, optimizer = build(None, torch.float32)
    for step in range(STEPS):
        each = [coefficients(step, rank, torch.float32) for rank in range(2)]
        for name, parameter in model.named_parameters():
            parameter.grad = (each[0][name] + each[1][name]) / 2
        observe(optimizer, step)
        optimizer.step()
    for found in first[:2]:
        for name, value in weights(model).items():
            assert torch.equal(found[name], value), name


def test_heads_of_every_rule_are_scaled_after_the_step() -> None:
    ends = []
    for logit in (20.0, 40.0):
        model, optimizer = build(None, torch.float32)
        for name, value in coefficients(0, 0, torch.float32).items():
            model.get_parameter(name).grad = value
        assert optimizer.qk_clip is not None
        for layer in optimizer.qk_clip.layers:
            optimizer.qk_clip.observe(layer.name, [logit] * layer.heads)
        optimizer.step()
        ends.append(weights(model))
    free, clipped = ends
    # Threshold 20, alpha 0.4; NorMuon's queries, SGD's keys, AdamW's bias.
    for name, exponent in (("query", 0.4), ("key", 0.6)):
        torch.testing.assert_close(clipped[name], free[name] * 0.5**exponent)
    torch.testing.assert_close(clipped["bias"][:10], free["bias"][:10] * 0.5**0.4)
    assert torch.equal(clipped["bias"][20:], free["bias"][20:])
    assert torch.equal(clipped["experts"], free["experts"])


EARLY: tuple[tuple[torch.dtype, dict[str, Any]], ...] = (
    (torch.float32, {"layout": "flat", "wave_bytes": 1500}),
    (torch.float32, {"layout": "aligned"}),
    (torch.bfloat16, {"layout": "flat", "wave_bytes": 1500, "stochastic_rounding": 5}),
)


def published_early() -> list[dict[str, Tensor]]:
    group = dist.group.WORLD if dist.is_initialized() else None
    found = []
    for dtype, options in EARLY:
        # QK-Clip would have everything wait: it scales last.
        options = {**options, "publish_bytes": 512, "qk_clip": None}
        model, optimizer = build(group, dtype, **options)
        found.append(train(model, optimizer, range(STEPS)))
        assert any(plan.parts for plan in optimizer.plan)
    return found


def test_parameters_published_in_parts_have_the_same_bits() -> None:
    expected = []
    for dtype, options in EARLY:
        seed = options.get("stochastic_rounding")
        one = build(None, dtype, qk_clip=None, stochastic_rounding=seed)
        expected.append(train(*one, range(STEPS)))
    for results in run_ranks(3, published_early):
        for result, wanted in zip(results, expected, strict=True):
            assert all(torch.equal(result[name], value) for name, value in wanted.items())


def rounded_wire() -> dict[str, Tensor]:
    model, optimizer = build(dist.group.WORLD, torch.float32, wire="bfloat16", wave_bytes=1500)
    return train(model, optimizer, range(STEPS))


def test_a_rounded_wire_is_near_for_blocks_rows_and_kernels(
    one_process: dict[Kind, dict[str, Tensor]],
) -> None:
    before = weights(Model(torch.float32))
    first, *others = run_ranks(3, rounded_wire)
    for name, value in one_process[torch.float32, None].items():
        assert all(torch.equal(first[name], other[name]) for other in others)
        moved = float((value - before[name]).norm())
        assert float((first[name] - value).norm()) < 0.02 * moved, name


def refuse_splits() -> list[str]:
    said = []
    for options in (NORMUON, {"adjust_lr_fn": "update_rms"}, {"max_update_rms": 0.1}):
        weight = nn.Parameter(torch.ones(64, 512))
        groups = [{"params": [("wide", weight)], **options}]
        optimizer = Muon(groups, process_group=dist.group.WORLD, max_split=2, cost_model=FREE)
        weight.grad = torch.ones(64, 512)
        with pytest.raises(ValueError, match="wide is split over 2 ranks") as caught:
            optimizer.step()
        assert bool((weight == 1).all())
        said.append(str(caught.value))
    return said


def test_rules_that_need_the_whole_update_refuse_splits() -> None:
    for said in run_ranks(2, refuse_splits):
        for message, name in zip(said, ("normuon", "update_rms", "max_update_rms"), strict=True):
            assert name in message

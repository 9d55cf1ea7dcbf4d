"""Every preset on a model with tied and fused weights, experts and kernels, on real gloo ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distmuon import Blocks, Muon, build_param_groups, recipes
from distmuon.recipes import Recipe
from tests.harness import run_ranks

PRESETS: dict[str, Callable[[], Recipe]] = {
    "moonlight": recipes.moonlight,
    "kimi_k2": recipes.kimi_k2,
    "keller": recipes.keller,
    "mup": lambda: recipes.mup(width=24),
    "normuon": recipes.normuon,
}
HEADS, NOPE, ROPE, VALUE, RANK = 4, 6, 4, 5, 8
STRUCTURE: dict[str, Any] = {
    "blocks": {
        "qkv.weight": 3,
        "q_b_proj.weight": Blocks((NOPE, ROPE), "rows", HEADS),
        "kv_a_proj.weight": (RANK, ROPE),
        "kv_b_proj.weight": Blocks((NOPE, VALUE), "rows", HEADS),
        "experts": 2,
    },
    "axes": {"c_fc.weight": "in_out"},
}


class Model(nn.Module):
    """One of each; nothing is computed with it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(37, 24)
        self.qkv = nn.Linear(24, 72)
        self.q_b_proj = nn.Linear(RANK, HEADS * (NOPE + ROPE), bias=False)
        self.kv_a_proj = nn.Linear(24, RANK + ROPE, bias=False)
        self.kv_b_proj = nn.Linear(RANK, HEADS * (NOPE + VALUE), bias=False)
        self.experts = nn.Parameter(torch.empty(5, 26, 24))
        self.c_fc = nn.Linear(50, 24)
        self.conv = nn.Conv2d(16, 11, 3)
        self.norm = nn.LayerNorm(24)
        self.lm_head = nn.Linear(24, 37, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.1, generator=generator)


def train(name: str) -> dict[str, Tensor]:
    """Three steps; the fourth expert gets no tokens in the second."""
    recipe, model = PRESETS[name](), Model()
    groups = build_param_groups(model, **recipe.groups, **STRUCTURE)
    group = dist.group.WORLD if dist.is_initialized() else None
    optimizer = Muon(groups, process_group=group, **recipe.optimizer)
    generator = torch.Generator().manual_seed(2)
    for step in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        if step == 1:
            assert model.experts.grad is not None
            model.experts.grad[3] = 0.0
        optimizer.step()
    algorithm = {n: g["algorithm"] for g in groups for n, _ in g["params"]}
    assert algorithm["embed_tokens.weight"] == "adamw"
    assert "lm_head.weight" not in algorithm, "a tied weight counts once"
    assert set(algorithm.values()) == {"normuon" if name == "normuon" else "muon", "adamw"}
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def train_all() -> dict[str, dict[str, Tensor]]:
    return {name: train(name) for name in PRESETS}


@pytest.fixture(scope="module")
def one_process() -> dict[str, dict[str, Tensor]]:
    return train_all()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_i1_every_preset_has_the_bits_of_one_process(
    world_size: int, one_process: dict[str, dict[str, Tensor]]
) -> None:
    for rank, found in enumerate(run_ranks(world_size, train_all)):
        for name, expected in one_process.items():
            for parameter, value in expected.items():
                assert torch.equal(found[name][parameter], value), (name, parameter, rank)


def test_presets_differ(one_process: dict[str, dict[str, Tensor]]) -> None:
    weights = [found["qkv.weight"] for found in one_process.values()]
    for index, first in enumerate(weights):
        assert not any(torch.equal(first, other) for other in weights[index + 1 :])

"""QK-Clip on real ranks: the same bits as in one process, and errors that all ranks raise."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distmuon import Muon, QKClip, build_param_groups
from distmuon.qk_clip import (
    AttentionLayer,
    attention_layer,
    attention_layers,
    head_rows,
    latent_attention_layer,
    record,
)
from distmuon.training.config import ModelConfig
from distmuon.training.model import Transformer
from tests.harness import run_ranks

SHAPES = {
    "mha.q.weight": (24, 19),
    "mha.q.bias": (24,),
    "mha.k.weight": (24, 19),
    "mha.k.bias": (24,),
    "gqa.q.weight": (40, 23),
    "gqa.k.weight": (10, 23),
    "mla.q_b.weight": (30, 11),
    "mla.kv_b.weight": (33, 13),
    "fused.weight": (17, 54),
    "fused.bias": (54,),
    "other.weight": (21, 34),
}
# Biases and this one are AdamW's.
BY_ADAMW = ("gqa.q.weight",)
STEPS = 3


def describe() -> list[AttentionLayer]:
    columns = [head_rows("fused.weight", 3, 6, first=first, axis="columns") for first in (0, 18)]
    biases = [head_rows("fused.bias", 3, 6, first=first) for first in (0, 18)]
    return [
        attention_layer(
            "mha",
            query=["mha.q.weight", "mha.q.bias"],
            key=["mha.k.weight", "mha.k.bias"],
            heads=4,
            head_dim=6,
        ),
        attention_layer(
            "gqa", query="gqa.q.weight", key="gqa.k.weight", heads=4, head_dim=10, kv_heads=1
        ),
        latent_attention_layer(
            "mla",
            query="mla.q_b.weight",
            key_value="mla.kv_b.weight",
            heads=3,
            nope_dim=6,
            rope_dim=4,
            value_dim=5,
        ),
        AttentionLayer("fused", (columns[0], biases[0]), (columns[1], biases[1])),
    ]


def train(
    dtype: torch.dtype, process_group: Any, grouped: Any, *, rank: int, size: int, **options: Any
) -> dict[str, Tensor]:
    """Three steps with one gradient; each rank sees a part of what one process sees."""
    generator = torch.Generator().manual_seed(3)
    model = {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in SHAPES.items()
    }
    matrices = [(n, p) for n, p in model.items() if p.dim() == 2 and n not in BY_ADAMW]
    rest = [(n, p) for n, p in model.items() if p.dim() == 1 or n in BY_ADAMW]
    clip = QKClip(describe(), threshold=20.0, alpha=0.4, grouped=grouped)
    optimizer = Muon(
        [{"params": matrices}, {"params": rest, "algorithm": "adamw"}],
        lr=2e-2,
        process_group=process_group,
        qk_clip=clip,
        **options,
    )
    for _ in range(STEPS):
        for parameter in model.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
        for index, layer in enumerate(clip.layers):
            found = 60.0 * torch.rand(layer.heads, generator=generator)
            for part in range(2):  # micro-batches
                turns = (torch.arange(layer.heads) + index) % (2 * size)
                mine = turns == 2 * rank + part
                clip.observe(layer.name, torch.where(mine | (size == 1), found, 0.3 * found))
        optimizer.step()
    values = {name: parameter.detach().clone() for name, parameter in model.items()}
    return values | {name: torch.tensor(value) for name, value in clip.stats().items()}


CASES = list(product((torch.float32, torch.bfloat16), ("query", "balanced"), ("flat", "aligned")))


def all_cases_on_rank() -> list[dict[str, Tensor]]:
    group = dist.group.WORLD
    place = {"rank": dist.get_rank(), "size": dist.get_world_size()}
    return [
        train(dtype, group, grouped, layout=layout, **place)  # type: ignore[arg-type]
        for dtype, grouped, layout in CASES
    ]


@pytest.fixture(scope="module")
def one_process() -> list[dict[str, Tensor]]:
    return [train(dtype, None, grouped, rank=0, size=1) for dtype, grouped, _ in CASES]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_clipping_gives_the_bits_of_one_process(
    world_size: int, one_process: list[dict[str, Tensor]]
) -> None:
    for results in run_ranks(world_size, all_cases_on_rank):
        for case, expected, found in zip(CASES, one_process, results, strict=True):
            assert expected["clipped_heads_total"] > 10
            for name, value in expected.items():
                assert torch.equal(found[name], value), f"{case} {name}"


# --------------------------------------------------------------------------------------------------
# A model, its own logits, and all three ways to average gradients.


def trained_model(reduce: Any) -> tuple[dict[str, Tensor], list[float]]:
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)
    model = Transformer(ModelConfig(layers=2, dim=16, heads=2), context=16)
    clip = QKClip(attention_layers(model), threshold=1.5)
    cores = {layer.name: model.get_submodule(f"{layer.name}.core") for layer in clip.layers}
    record(clip, cores, masking="causal")
    group = build_param_groups(model)
    optimizer = Muon(group, lr=2e-2, process_group=dist.group.WORLD, reduce=reduce, qk_clip=clip)
    wrapped: nn.Module = model if reduce == "owned" else DistributedDataParallel(model)
    if reduce != "ddp":
        optimizer.attach(wrapped)
    batches = torch.randint(256, (3, 4 * size, 17), generator=torch.Generator().manual_seed(2))
    largest = []
    for batch in batches:
        mine = batch[4 * rank : 4 * (rank + 1)]
        optimizer.zero_grad()
        logits = wrapped(mine[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), mine[:, 1:].flatten()).backward()
        optimizer.step()
        largest.append(clip.stats()["max_logit"])
    return {name: p.detach().clone() for name, p in model.named_parameters()}, largest


def every_reduce() -> list[tuple[dict[str, Tensor], list[float]]]:
    return [trained_model(reduce) for reduce in ("ddp", "hook", "owned")]


def test_all_ways_to_average_gradients_clip_alike() -> None:
    first, second = run_ranks(2, every_reduce)
    for (weights, largest), (others, same) in zip(first, second, strict=True):
        assert largest == same, "the largest over all ranks, on every rank"
        assert all(torch.equal(weights[name], others[name]) for name in weights)
        assert largest == first[0][1]
        assert largest[0] > 1.5
        assert all(torch.equal(weights[name], first[0][0][name]) for name in weights)


# --------------------------------------------------------------------------------------------------
# Errors.


def _small(threshold: float = 5.0, **options: Any) -> tuple[nn.Linear, nn.Linear, QKClip, Muon]:
    torch.manual_seed(0)
    q, k = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    layer = attention_layer("layer", query="q", key="k", heads=2, head_dim=4)
    clip = QKClip([layer], threshold=threshold)
    params = [("q", q.weight), ("k", k.weight)]
    optimizer = Muon([{"params": params}], process_group=dist.group.WORLD, qk_clip=clip, **options)
    for linear in (q, k):
        linear.weight.grad = torch.ones_like(linear.weight)
    return q, k, clip, optimizer


def other_thresholds() -> str:
    _, _, clip, optimizer = _small(threshold=5.0 + dist.get_rank())
    clip.observe("layer", [1.0, 1.0])
    with pytest.raises(RuntimeError, match="threshold=") as caught:
        optimizer.step()
    return str(caught.value)


def test_ranks_with_other_thresholds_are_told_so() -> None:
    assert all("QK-Clip" in text for text in run_ranks(2, other_thresholds))


def nan_on_one_rank(nonfinite: Any) -> tuple[bool, int]:
    q, _, clip, optimizer = _small(nonfinite=nonfinite)
    before = q.weight.detach().clone()
    clip.observe("layer", [1.0, math.nan if dist.get_rank() == 1 else 9.0])
    if nonfinite == "raise":
        with pytest.raises(FloatingPointError, match="logits of layer, head 1,"):
            optimizer.step()
    else:
        optimizer.step()
    return torch.equal(q.weight, before), optimizer.report().skipped


@pytest.mark.parametrize(("nonfinite", "skipped"), [("raise", 0), ("skip", 1)])
def test_a_logit_that_is_not_finite_on_one_rank_is_seen_by_all(
    nonfinite: str, skipped: int
) -> None:
    assert run_ranks(2, nan_on_one_rank, nonfinite) == [(True, skipped)] * 2


def observed_by_one_rank() -> dict[str, float]:
    _, _, clip, optimizer = _small()
    if dist.get_rank() == 1:
        clip.observe("layer", [1.0, 7.0])
    optimizer.step()
    return clip.stats()


def observed_by_nobody() -> str:
    q, _, _, optimizer = _small()
    before = q.weight.detach().clone()
    with pytest.raises(RuntimeError, match="no attention logits of layer") as caught:
        optimizer.step()
    assert torch.equal(q.weight, before)
    return str(caught.value)


def test_one_rank_that_observes_is_enough_and_none_is_not() -> None:
    first, second = run_ranks(2, observed_by_one_rank)
    assert first == second
    assert first["layer/max_logit"] == 7.0
    assert len(set(run_ranks(2, observed_by_nobody))) == 1


def skipped_by_a_scaler() -> tuple[bool, list[float]]:
    q, k, clip, optimizer = _small(reduce="owned")
    optimizer.attach(nn.ModuleList([q, k]))
    before = q.weight.detach().clone()
    (q.weight.sum() + k.weight.sum()).backward()
    clip.observe("layer", [1.0, math.inf])
    optimizer.unscale_(1.0)
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]  # as a GradScaler does
    optimizer.step()
    return torch.equal(q.weight, before), clip.take()


def test_a_step_that_a_scaler_skips_forgets_its_logits() -> None:
    assert run_ranks(2, skipped_by_a_scaler) == [(True, [-math.inf] * 2)] * 2


def clip_after_refresh() -> Tensor:
    _, _, clip, optimizer = _small(threshold=1.0)
    clip.observe("layer", [1.0, 1.0])
    optimizer.step()
    optimizer.add_param_group({"params": [("late", nn.Parameter(torch.ones(31, 7)))]})
    optimizer.refresh()
    for group in optimizer.param_groups:
        group.update(lr=0.0)
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    q, k = (parameter.detach().clone() for parameter in optimizer.param_groups[0]["params"])
    clip.observe("layer", [4.0, 1.0])
    optimizer.step()
    scaled = [parameter.detach() for parameter in optimizer.param_groups[0]["params"]]
    return torch.stack((scaled[0] / q, scaled[1] / k)).amin(-1)


def test_a_new_layout_clips_the_same_rows() -> None:
    expected = torch.tensor([[0.5] * 4 + [1.0] * 4] * 2)
    assert all(torch.equal(ratios, expected) for ratios in run_ranks(2, clip_after_refresh))


def bytes_of_a_step() -> tuple[int, int]:
    sent = []
    for clipped in (True, False):
        _, _, clip, optimizer = _small()
        if not clipped:
            optimizer.qk_clip = None
        clip.observe("layer", [1.0, 7.0])
        optimizer.step()
        sent.append(optimizer.report().bytes_sent["agree"])
    return sent[0], sent[1]


def test_clipping_sends_eight_bytes_a_head_and_no_weights() -> None:
    # An all-reduce over two ranks sends its payload once: two heads.
    assert all(a - b == 2 * 8 for a, b in run_ranks(2, bytes_of_a_step))

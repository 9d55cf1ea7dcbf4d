"""QK-Clip: what clipping does to attention logits, and to nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distmuon import Muon, QKClip, build_param_groups
from distmuon.layout import TensorSpec, flat_layout
from distmuon.qk_clip import (
    AttentionLayer,
    HeadRows,
    attention_layer,
    attention_layers,
    head_rows,
    latent_attention_layer,
    max_logit_bound,
    max_logits,
    record,
)
from distmuon.qk_clip.scaling import locate, scale_
from distmuon.training.config import ModelConfig
from distmuon.training.model import Transformer

DIM, HEADS, WIDTH = 24, 4, 6
INPUT = torch.randn(2, 7, DIM, generator=torch.Generator().manual_seed(1))


class Grouped(nn.Module):
    """Attention with biases and, if `kv_heads` is smaller than `heads`, shared keys."""

    def __init__(self, kv_heads: int = HEADS, gain: float = 3.0) -> None:
        super().__init__()
        self.num_heads, self.kv_heads = HEADS, kv_heads
        self.q_proj = nn.Linear(DIM, HEADS * WIDTH)
        self.k_proj = nn.Linear(DIM, kv_heads * WIDTH)
        self.v_proj = nn.Linear(DIM, kv_heads * WIDTH)
        generator = torch.Generator().manual_seed(2)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3 * gain, generator=generator)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, WIDTH)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """All logits [batch, heads, length, length]."""
        q, k = self.split(self.q_proj(x)), self.split(self.k_proj(x))
        k = k.repeat_interleave(HEADS // self.kv_heads, dim=1)
        return q @ k.transpose(-1, -2) / math.sqrt(WIDTH)


class Latent(nn.Module):
    """Multi-head latent attention: each head's keys have a part that all share."""

    NOPE, ROPE, VALUE, RANK = 6, 4, 5, 8

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qk_nope_head_dim, self.qk_rope_head_dim = self.NOPE, self.ROPE
        self.v_head_dim = self.VALUE
        self.q_a_proj = nn.Linear(DIM, self.RANK, bias=False)
        self.q_a_layernorm = nn.RMSNorm(self.RANK)  # normalizes what q_b_proj then projects
        self.q_b_proj = nn.Linear(self.RANK, HEADS * (self.NOPE + self.ROPE), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(DIM, self.RANK + self.ROPE, bias=False)
        self.kv_b_proj = nn.Linear(self.RANK, HEADS * (self.NOPE + self.VALUE), bias=False)
        generator = torch.Generator().manual_seed(3)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).unflatten(-1, (HEADS, -1))
        latent, shared = self.kv_a_proj_with_mqa(x).split([self.RANK, self.ROPE], dim=-1)
        k = self.kv_b_proj(latent).unflatten(-1, (HEADS, -1))[..., : self.NOPE]
        k = torch.cat((k, shared[:, :, None].expand(-1, -1, HEADS, -1)), dim=-1)
        logits = q.transpose(1, 2) @ k.permute(0, 2, 3, 1)
        return logits / math.sqrt(self.NOPE + self.ROPE)


def largest(logits: Tensor) -> Tensor:
    return logits.detach().amax(dim=(0, 2, 3))


def step_once(model: nn.Module, clip: QKClip, **options: Any) -> Muon:
    """Clip by one step that changes nothing else."""
    groups = build_param_groups(model)
    optimizer = Muon(groups, lr=0.0, qk_clip=clip, **options)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


# --------------------------------------------------------------------------------------------------
# What happens to the logits (oracle 16).


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_clipped_heads_have_the_threshold_as_their_largest_logit(alpha: float) -> None:
    model = Grouped()
    before = model(INPUT)
    threshold = float(largest(before).sort().values[:2].mean())  # all heads but one exceed it
    clip = QKClip(attention_layers(model), threshold=threshold, alpha=alpha)
    clip.observe("", largest(before))
    step_once(model, clip)
    after = model(INPUT)
    gamma = (threshold / largest(before)).clamp(max=1.0)
    assert (gamma == 1).sum() == 1
    torch.testing.assert_close(after, before * gamma[:, None, None], rtol=1e-5, atol=1e-5)
    expected = largest(before).clamp(max=threshold)
    torch.testing.assert_close(largest(after), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("grouped", ["query", "balanced"])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_heads_that_share_keys_are_clipped_one_by_one(kv_heads: int, grouped: Any) -> None:
    model = Grouped(kv_heads)
    before = model(INPUT)
    keys = model.k_proj.weight.detach().clone()
    values = model.v_proj.weight.detach().clone()
    threshold = float(largest(before).sort().values[:2].mean())
    clip = QKClip(attention_layers(model), threshold=threshold, grouped=grouped)
    clip.observe("", largest(before))
    step_once(model, clip)
    gamma = (threshold / largest(before)).clamp(max=1.0)
    # Also the heads that share their keys with one that was clipped.
    torch.testing.assert_close(model(INPUT), before * gamma[:, None, None], rtol=1e-5, atol=1e-5)
    ratio = (model.k_proj.weight / keys).detach().unflatten(0, (kv_heads, WIDTH)).mean(dim=(1, 2))
    worst = gamma.view(kv_heads, -1).amin(dim=1)
    expected = torch.ones(kv_heads) if grouped == "query" else worst.sqrt()
    torch.testing.assert_close(ratio, expected, rtol=1e-6, atol=0)
    assert torch.equal(model.v_proj.weight, values)


def test_latent_attention_leaves_the_shared_key_and_the_values_alone() -> None:
    model = Latent()
    before = model(INPUT)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters()}
    threshold = float(largest(before).sort().values[:2].mean())
    clip = QKClip(attention_layers(model), threshold=threshold)
    clip.observe("", largest(before))
    step_once(model, clip)
    gamma = (threshold / largest(before)).clamp(max=1.0)
    torch.testing.assert_close(model(INPUT), before * gamma[:, None, None], rtol=1e-5, atol=1e-5)
    for name in ("kv_a_proj_with_mqa.weight", "q_a_proj.weight", "q_a_layernorm.weight"):
        assert torch.equal(model.get_parameter(name), frozen[name]), name
    rows = model.kv_b_proj.weight.view(HEADS, -1, Latent.RANK)
    earlier = frozen["kv_b_proj.weight"].view(HEADS, -1, Latent.RANK)
    assert torch.equal(rows[:, Latent.NOPE :], earlier[:, Latent.NOPE :])
    assert not torch.equal(rows[:, : Latent.NOPE], earlier[:, : Latent.NOPE])


def test_an_infinite_threshold_only_measures() -> None:
    model = Grouped()
    frozen = [p.detach().clone() for p in model.parameters()]
    clip = QKClip(attention_layers(model), threshold=math.inf)
    clip.observe("", [1e30, 2.0, -3.0, 4.0])
    step_once(model, clip)
    assert all(map(torch.equal, model.parameters(), frozen))
    assert clip.stats()["max_logit"] == pytest.approx(1e30)


def test_negative_and_zero_logits_are_left_alone() -> None:
    model = Grouped()
    frozen = [p.detach().clone() for p in model.parameters()]
    clip = QKClip(attention_layers(model), threshold=1.0)
    clip.observe("", [-50.0, 0.0, 1.0, -0.0])
    step_once(model, clip)
    assert all(map(torch.equal, model.parameters(), frozen))


def test_momentum_and_moments_are_not_scaled() -> None:
    torch.manual_seed(0)
    states = []
    for threshold in (math.inf, 1.0):
        model = Grouped()
        clip = QKClip(attention_layers(model), threshold=threshold)
        clip.observe("", [9.0] * HEADS)
        states.append(step_once(model, clip).state_dict()["state"])
    for key, row in states[0].items():
        for name, value in row.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][key][name]))


def test_the_update_comes_first() -> None:
    # The clipped weight is the updated one times the factor, not the old one.
    def trained(threshold: float) -> Tensor:
        model = Grouped()
        clip = QKClip(attention_layers(model), threshold=threshold)
        optimizer = Muon(build_param_groups(model), lr=0.1, weight_decay=0.1, qk_clip=clip)
        for parameter in model.parameters():
            parameter.grad = torch.linspace(-1, 1, parameter.numel()).view_as(parameter)
        clip.observe("", [100.0, 1.0, 1.0, 1.0])
        optimizer.step()
        return model.q_proj.weight.detach()

    free, clipped = trained(math.inf), trained(25.0)
    torch.testing.assert_close(clipped[:WIDTH], free[:WIDTH] * 0.5, rtol=0, atol=0)
    assert torch.equal(clipped[WIDTH:], free[WIDTH:])


def test_weights_that_adamw_updates_are_clipped_too() -> None:
    model = Grouped()
    overrides = {"q_proj.weight": "adamw"}
    clip = QKClip(attention_layers(model), threshold=1.0)
    optimizer = Muon(build_param_groups(model, overrides=overrides), lr=0.0, qk_clip=clip)
    before = model(INPUT)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    clip.observe("", largest(before))
    optimizer.step()
    torch.testing.assert_close(largest(model(INPUT)), torch.ones(HEADS), rtol=2e-6, atol=0)


# --------------------------------------------------------------------------------------------------
# Observing.


def test_the_largest_of_all_micro_batches_counts() -> None:
    clip = QKClip([simple()], threshold=10.0)
    clip.observe("layer", [1.0, 30.0])
    clip.observe("layer", torch.tensor([20.0, 2.0], requires_grad=True))
    assert clip.take() == [20.0, 30.0]
    assert clip.take() == [-math.inf, -math.inf]


def test_what_was_observed_belongs_to_one_step() -> None:
    model = Grouped()
    clip = QKClip(attention_layers(model), threshold=1.0, unobserved="keep")
    clip.observe("", [2.0] * HEADS)
    optimizer = step_once(model, clip)
    frozen = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(map(torch.equal, model.parameters(), frozen))
    assert clip.stats() == {}, "nothing was observed in the last step"


def test_a_layer_that_nobody_observed_raises_and_changes_nothing() -> None:
    model = Grouped()
    clip = QKClip(attention_layers(model))
    frozen = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"no attention logits of .* \(1 of 1 layers"):
        step_once(model, clip)
    assert all(map(torch.equal, model.parameters(), frozen))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_stop_or_skip_the_step(value: float) -> None:
    model = Grouped()
    frozen = [p.detach().clone() for p in model.parameters()]
    clip = QKClip(attention_layers(model))
    clip.observe("", [1.0, value, 1.0, 1.0])
    with pytest.raises(FloatingPointError, match="head 1, have a NaN or an infinity"):
        step_once(model, clip)
    clip.observe("", [1.0, value, 1.0, 1.0])
    clip.observe("", [1.0] * HEADS)  # does not hide it
    optimizer = step_once(model, clip, nonfinite="skip")
    assert optimizer.report().skipped == 1
    assert all(map(torch.equal, model.parameters(), frozen))
    assert clip.take() == [-math.inf] * HEADS


def test_a_skipped_step_does_not_clip_and_forgets() -> None:
    model = Grouped()
    clip = QKClip(attention_layers(model), threshold=1.0)
    optimizer = Muon(build_param_groups(model), qk_clip=clip, nonfinite="skip")
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    frozen = [p.detach().clone() for p in model.parameters()]
    clip.observe("", [50.0] * HEADS)
    optimizer.step()
    assert all(map(torch.equal, model.parameters(), frozen))
    assert clip.take() == [-math.inf] * HEADS
    assert clip.stats() == {}


def test_stats_are_plain_numbers_of_the_last_step() -> None:
    model = Grouped()
    clip = QKClip(attention_layers(model), threshold=10.0)
    assert clip.stats() == {}
    clip.observe("", [50.0, 20.0, 10.0, 3.0])
    optimizer = step_once(model, clip)
    clip.observe("", [5.0, 11.0, 1.0, 3.0])
    optimizer.step()
    stats = clip.stats()
    assert stats == {
        "max_logit": 11.0,
        "clipped_heads": 1.0,
        "clipped_heads_total": 3.0,
        "/max_logit": 11.0,
        "/clipped_heads": 1.0,
    }
    assert all(type(value) is float for value in stats.values())


@pytest.mark.parametrize("measure", ["exact", "bound"])
def test_recording_sees_training_passes_and_no_others(measure: Any) -> None:
    torch.manual_seed(4)
    model = Transformer(ModelConfig(layers=2, dim=16, heads=2), context=12)
    clip = QKClip(attention_layers(model))
    names = [layer.name for layer in clip.layers]
    assert names == ["layers.0.attention", "layers.1.attention"]
    cores = {name: model.get_submodule(f"{name}.core") for name in names}
    handles = record(clip, cores, masking="causal", measure=measure)
    seen: list[tuple[Tensor, Tensor]] = []
    core = model.get_submodule("layers.1.attention.core")
    core.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[0], inputs[1])))
    tokens = torch.randint(256, (3, 12))
    with torch.no_grad():
        model(tokens)
    assert clip.take() == [-math.inf] * 4
    model(tokens)
    query, key = seen[-1]
    logits = query @ key.transpose(-1, -2) / math.sqrt(8)
    logits.masked_fill_(torch.ones(12, 12, dtype=torch.bool).triu(1), -math.inf)
    found = torch.tensor(clip.take()[2:])
    if measure == "exact":
        torch.testing.assert_close(found, largest(logits).detach(), rtol=1e-5, atol=0)
    else:
        assert (found >= largest(logits) * (1 - 1e-6)).all()
    for handle in handles:
        handle.remove()
    model(tokens)
    assert clip.take() == [-math.inf] * 4


# --------------------------------------------------------------------------------------------------
# Largest logits from queries and keys.


def sample(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("most", [1, 60, 700, 10**9])
@pytest.mark.parametrize("masking", ["none", "causal"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_any_block_size_finds_the_largest_logits(most: int, masking: Any, kv_heads: int) -> None:
    query, key = sample(3, 4, 13, 8, seed=5), sample(3, kv_heads, 13, 8, seed=6)
    logits = query @ key.repeat_interleave(4 // kv_heads, dim=1).transpose(-1, -2) * 0.25
    if masking == "causal":
        logits.masked_fill_(torch.ones(13, 13, dtype=torch.bool).triu(1), -math.inf)
    found = max_logits(query, key, scale=0.25, masking=masking, most_logits=most)
    torch.testing.assert_close(found, largest(logits), rtol=1e-5, atol=1e-6)
    bound = max_logit_bound(query, key, scale=0.25)
    assert (bound >= found).all()


@pytest.mark.parametrize("kind", ["bool", "least", "infinity"])
def test_pairs_that_are_masked_do_not_count(kind: str) -> None:
    query, key = sample(2, 3, 9, 8, seed=5), sample(2, 3, 11, 8, seed=6)
    opened = sample(2, 1, 9, 11, seed=7) > 0
    logits = query @ key.transpose(-1, -2) / math.sqrt(8)
    expected = largest(logits.masked_fill(~opened, -math.inf))
    closed = {"least": torch.finfo(torch.float32).min, "infinity": -math.inf}
    mask = opened if kind == "bool" else torch.zeros(2, 1, 9, 11).masked_fill(~opened, closed[kind])
    found = max_logits(query, key, mask=mask, most_logits=100)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_bias_on_the_logits_is_no_mask() -> None:
    query, key = sample(1, 2, 5, 8, seed=5), sample(1, 2, 5, 8, seed=6)
    slope = -10.0 * torch.arange(5.0).expand(1, 2, 5, 5)
    assert torch.equal(max_logits(query, key, mask=slope), max_logits(query, key))


def test_half_precision_products_do_not_overflow() -> None:
    query = torch.full((1, 1, 4, 128), 40.0, dtype=torch.float16)
    found = max_logits(query, query)  # the plain product, 204,800, is beyond fp16
    torch.testing.assert_close(
        found, torch.tensor([128 * 1600 / math.sqrt(128)]), rtol=2e-3, atol=0
    )


def test_not_even_one_row_block_is_larger_than_asked() -> None:
    largest_seen = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest_seen
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.shape[-1] == 256 and "bmm" in str(func):
                largest_seen = max(largest_seen, result.numel())
            return result

    query, key = sample(2, 4, 256, 8, seed=5), sample(2, 2, 256, 8, seed=6)
    with Watch():
        max_logits(query, key, most_logits=4 * 256 * 16)
    assert 0 < largest_seen <= 4 * 256 * 16


@pytest.mark.parametrize(
    ("query", "key"),
    [((2, 4, 5, 8), (2, 3, 5, 8)), ((2, 4, 5, 8), (2, 4, 5, 6)), ((4, 5, 8), (4, 5, 8))],
)
def test_shapes_that_do_not_fit_are_refused(query: Sequence[int], key: Sequence[int]) -> None:
    for function in (max_logits, max_logit_bound):
        with pytest.raises(ValueError, match="do not fit"):
            function(torch.zeros(query), torch.zeros(key))
    with pytest.raises(ValueError, match="positions are not given"):
        max_logits(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 3, 4), masking="causal")


# --------------------------------------------------------------------------------------------------
# Where the rows lie.


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_the_ranks_ranges_together_are_scaled_as_the_whole(world_size: int, axis: Any) -> None:
    specs = [
        TensorSpec("first", (13, 9)),
        TensorSpec("fused", (37, 41)),
        TensorSpec("bias", (37,)),
        TensorSpec("stack", (2, 5, 7)),
    ]
    layer = AttentionLayer(
        "layer",
        (
            head_rows("fused", 3, 5, first=2, stride=11, axis=axis),
            head_rows("bias", 3, 5, stride=9),
        ),
        (head_rows("first", 3, 2, first=1, stride=3, axis=axis), HeadRows("stack", (0, 3, 8), 2)),
    )
    layout = flat_layout(specs, world_size)
    flat = torch.randn(layout.numel, generator=torch.Generator().manual_seed(8))
    values = [2.0**-k for k in range(1, 13)]
    expected = flat.clone()
    slot = 0
    for block in layer.blocks:
        index = next(i for i, spec in enumerate(specs) if spec.name == block.parameter)
        spec, offset = specs[index], layout.offsets[index]
        columns = spec.shape[-1] if len(spec.shape) > 1 else 1
        matrix = expected[offset : offset + spec.numel].view(-1, columns)
        for start in block.starts:
            place = slice(start, start + block.count)
            if block.axis == "rows":
                matrix[place] *= values[slot]
            else:
                matrix[:, place] *= values[slot]
            slot += 1
    for rank in range(world_size):
        shard = flat.view(world_size, -1)[rank]
        scale_(shard, locate([layer], layout, rank), [values])
    assert torch.equal(flat, expected)


# --------------------------------------------------------------------------------------------------
# Descriptions.


def simple(name: str = "layer", prefix: str = "") -> AttentionLayer:
    return attention_layer(name, query=f"{prefix}q", key=f"{prefix}k", heads=2, head_dim=3)


def test_separate_projections_and_their_biases_are_found() -> None:
    expected = attention_layer(
        "",
        query=["q_proj.weight", "q_proj.bias"],
        key=["k_proj.weight", "k_proj.bias"],
        heads=HEADS,
        head_dim=WIDTH,
        kv_heads=2,
    )
    assert attention_layers(Grouped(2)) == (expected,)


def test_latent_attention_is_found() -> None:
    expected = latent_attention_layer(
        "block",
        query="block.q_b_proj.weight",
        key_value="block.kv_b_proj.weight",
        heads=HEADS,
        nope_dim=Latent.NOPE,
        rope_dim=Latent.ROPE,
        value_dim=Latent.VALUE,
    )
    assert attention_layers(nn.ModuleDict({"block": Latent()})) == (expected,)


def test_wrappers_do_not_change_names() -> None:
    wrapped = torch.compile(Transformer(ModelConfig(layers=1, dim=8, heads=2), context=4))
    assert [layer.name for layer in attention_layers(wrapped)] == ["layers.0.attention"]


def test_a_model_whose_attention_is_unknown_is_refused() -> None:
    with pytest.raises(ValueError, match="no module with projections of a known name"):
        attention_layers(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"0 looks like attention, but"):
        attention_layers(nn.Sequential(nn.MultiheadAttention(8, 2)))


def with_norm() -> Grouped:
    model = Grouped()
    model.q_norm = nn.RMSNorm(WIDTH)
    return model


def test_normalized_queries_are_refused_as_inert() -> None:
    with pytest.raises(ValueError, match=r"\(q_norm\).* would be inert"):
        attention_layers(with_norm())
    # Described by hand, the optimizer sees the norm's weight.
    layers = attention_layers(nn.ModuleDict({"x": Grouped()}))
    model = nn.ModuleDict({"x": with_norm()})
    with pytest.raises(ValueError, match=r"\(x\.q_norm\).* would be inert"):
        Muon(build_param_groups(model), qk_clip=QKClip(layers))
    with pytest.raises(ValueError, match=r"\(q_norm\).* would be inert"):
        Muon(build_param_groups(with_norm()), qk_clip=QKClip(attention_layers(Grouped())))


def test_a_description_must_fit_the_optimizer() -> None:
    model = Grouped()

    def refused(match: str, *, query: Any, key: Any = "k_proj.weight", heads: int = HEADS) -> None:
        layer = attention_layer("layer", query=query, key=key, heads=heads, head_dim=WIDTH)
        with pytest.raises(ValueError, match=match):
            Muon(build_param_groups(model), qk_clip=QKClip([layer]))

    refused("no parameter of the optimizer. Did you mean 'q_proj.weight'", query="q_pro.weight")
    refused(r"q_proj.weight has 24 rows, but its heads reach to 48", query="q_proj.weight", heads=8)
    refused("has a bias, q_proj.bias, that is not listed", query="q_proj.weight")
    with pytest.raises(TypeError, match="Invalid qk_clip of type float"):
        Muon(build_param_groups(model), qk_clip=100.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("no attention layers", lambda: QKClip([])),
        ("threshold=0", lambda: QKClip([simple()], threshold=0)),
        ("threshold=nan", lambda: QKClip([simple()], threshold=math.nan)),
        ("alpha=1.5", lambda: QKClip([simple()], alpha=1.5)),
        ("grouped=", lambda: QKClip([simple()], grouped="k")),  # type: ignore[arg-type]
        ("unobserved=", lambda: QKClip([simple()], unobserved="no")),  # type: ignore[arg-type]
        ("Two attention layers are called 'layer'", lambda: QKClip([simple(), simple(prefix="x")])),
        ("q belong to two heads, in a and b", lambda: QKClip([simple("a"), simple("b")])),
        (
            "3 query heads and 2 key heads",
            lambda: AttentionLayer("x", (head_rows("q", 3, 4),), (head_rows("k", 2, 4),)),
        ),
        (
            "rows of 3 query heads. Must be 2",
            lambda: AttentionLayer(
                "x", (head_rows("q", 2, 4), head_rows("b", 3, 4)), (head_rows("k", 2, 4),)
            ),
        ),
        ("needs the rows", lambda: AttentionLayer("x", (), (head_rows("k", 2, 4),))),
        ("at least one row", lambda: head_rows("q", 2, 0)),
    ],
)
def test_wrong_descriptions_are_refused(message: str, make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_observations_are_refused() -> None:
    clip = QKClip([simple()])
    with pytest.raises(KeyError, match="No attention layer 'lair'"):
        clip.observe("lair", [1.0, 2.0])
    with pytest.raises(ValueError, match=r"shape \[3\]. Must be \[2\]"):
        clip.observe("layer", [1.0, 2.0, 3.0])
    with pytest.raises(KeyError, match="No attention layer 'lair'"):
        record(clip, {"lair": nn.Identity()})


def test_a_compiled_model_is_observed() -> None:
    torch.manual_seed(4)
    model = Transformer(ModelConfig(layers=2, dim=16, heads=2), context=12)
    clip = QKClip(attention_layers(model))
    cores = {layer.name: model.get_submodule(f"{layer.name}.core") for layer in clip.layers}
    record(clip, cores, masking="causal")
    tokens = torch.randint(256, (3, 12))
    expected = model(tokens)
    seen = clip.take()
    torch.testing.assert_close(torch.compile(model, backend="eager")(tokens), expected)
    assert clip.take() == pytest.approx(seen, rel=1e-5)

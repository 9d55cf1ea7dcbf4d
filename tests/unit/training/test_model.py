from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from distmuon import build_param_groups
from distmuon.training.config import ModelConfig, SampleConfig
from distmuon.training.model import Transformer, rotary_table, rotate
from distmuon.training.sample import generate, printable

CONTEXT = 24


def small(**changes: object) -> Transformer:
    sizes: dict[str, object] = {"layers": 2, "dim": 16, "heads": 2} | changes
    return Transformer(ModelConfig(**sizes), context=CONTEXT)  # type: ignore[arg-type]


def tokens(batch: int = 3, length: int = CONTEXT) -> torch.Tensor:
    return torch.randint(256, (batch, length))


@pytest.mark.parametrize("length", [1, 5, CONTEXT])
def test_logits_have_one_row_per_position(length: int) -> None:
    logits = small()(tokens(length=length))
    assert logits.shape == (3, length, 256)
    assert logits.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("place", [0, 1, 11, CONTEXT - 1])
def test_a_byte_changes_no_logits_before_it(place: int) -> None:
    model = small()
    before = tokens()
    after = before.clone()
    after[:, place] = (after[:, place] + 1) % 256
    first, second = model(before), model(after)
    torch.testing.assert_close(first[:, :place], second[:, :place], rtol=0, atol=1e-6)
    changed = (first - second).abs().amax(dim=(0, 2))
    assert (changed[place:] > 1e-5).all(), "every later position should see the change"


@torch.no_grad()
def test_sequences_of_a_batch_do_not_see_each_other() -> None:
    model, batch = small(), tokens(4)
    alone = torch.cat([model(row[None]) for row in batch])
    torch.testing.assert_close(model(batch), alone, rtol=0, atol=1e-5)


def test_rotation_keeps_lengths_and_leaves_position_zero() -> None:
    table = rotary_table(8, length=CONTEXT, base=10000.0)
    x = torch.randn(2, 3, CONTEXT, 8)
    turned = rotate(x, table)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turned[:, :, 0], x[:, :, 0])
    assert not torch.allclose(turned[:, :, 1], x[:, :, 1])


def test_rotated_products_depend_on_the_distance_only() -> None:
    table = rotary_table(8, length=CONTEXT, base=10000.0)
    query, key = torch.randn(8), torch.randn(8)
    queries = rotate(query.expand(1, 1, CONTEXT, 8), table)[0, 0]
    keys = rotate(key.expand(1, 1, CONTEXT, 8), table)[0, 0]
    scores = queries @ keys.T
    for distance in range(-CONTEXT + 1, CONTEXT):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-4)
    assert scores[0].std() > 0.01, "different distances should score differently"


@torch.no_grad()
def test_the_order_of_bytes_matters() -> None:
    # Without positions, swapping two earlier bytes would leave the last logits as they are.
    torch.manual_seed(3)
    model = small(layers=1)
    first = tokens(1)
    second = first.clone()
    second[0, [2, 9]] = first[0, [9, 2]]
    assert (model(first)[0, -1] - model(second)[0, -1]).abs().max() > 1e-6


@pytest.mark.parametrize("head", ["untied", "tied"])
def test_a_new_model_predicts_nearly_uniformly(head: str) -> None:
    torch.manual_seed(0)
    model = small(dim=64, heads=4, head=head)
    batch = tokens(16)
    loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    assert abs(loss.item() - math.log(256)) < 0.1


def test_the_scale_of_the_residual_stream_does_not_grow_with_depth() -> None:
    def last_scale(layers: int) -> float:
        torch.manual_seed(0)
        model = small(layers=layers, dim=64, heads=4)
        scales: list[float] = []
        model.norm.register_forward_pre_hook(
            lambda _, inputs: scales.append(inputs[0].square().mean().sqrt().item())
        )
        model(tokens())
        return scales[0]

    assert last_scale(16) < 1.5 * last_scale(2)


def test_a_tied_head_is_one_parameter_and_gets_both_gradients() -> None:
    untied, tied = small(), small(head="tied")
    assert tied.lm_head.weight is tied.embed_tokens.weight
    count = sum(parameter.numel() for parameter in untied.parameters())
    assert sum(parameter.numel() for parameter in tied.parameters()) == count - 256 * 16
    tied(torch.zeros(1, 4, dtype=torch.int64)).square().sum().backward()
    gradient = tied.embed_tokens.weight.grad
    assert gradient is not None
    # The embedding row of byte 0 was looked up; all other rows get their gradient as the head.
    assert (gradient.abs().sum(1) > 0).all()


def test_names_follow_the_convention() -> None:
    names = {name for name, _ in small(layers=1).named_parameters()}
    block = {f"attention.{part}_proj" for part in "qkvo"}
    block |= {"mlp.up_proj", "mlp.down_proj", "attention_norm", "mlp_norm"}
    assert names == {"embed_tokens.weight", "lm_head.weight", "norm.weight"} | {
        f"layers.0.{part}.weight" for part in block
    }


@pytest.mark.parametrize("head", ["untied", "tied"])
def test_muon_gets_the_block_matrices_and_nothing_else(head: str) -> None:
    groups = build_param_groups(small(head=head))
    muon = {name for group in groups if group["algorithm"] == "muon" for name, _ in group["params"]}
    assert muon == {
        f"layers.{layer}.{part}_proj.weight"
        for layer in (0, 1)
        for part in (
            "attention.q",
            "attention.k",
            "attention.v",
            "attention.o",
            "mlp.up",
            "mlp.down",
        )
    }


def test_a_sample_depends_on_the_seed_only() -> None:
    model = small()
    config = SampleConfig(prompt="To be", length=40)
    torch.manual_seed(1)
    first = generate(model, config, seed=5)
    torch.manual_seed(2)
    assert generate(model, config, seed=5) == first
    assert generate(model, config, seed=6) != first


def test_a_cold_sample_takes_the_likeliest_byte() -> None:
    model = small()
    with torch.no_grad():
        model.norm.weight.zero_()
        model.norm.weight[0] = 1.0
        model.lm_head.weight.zero_()
        model.lm_head.weight[ord("x"), 0] = 9.0
        model.lm_head.weight[ord("y"), 0] = -9.0
    text = generate(model, SampleConfig(length=2 * CONTEXT, temperature=0.0), seed=0)
    assert len(text) == 2 * CONTEXT
    assert set(text) <= {"x", "y"}


def test_what_a_terminal_would_obey_is_replaced() -> None:
    assert printable(b"a\nb\tc") == "a\nb\tc"
    assert printable(b"\x1b[2Jx\x07\x00\r") == "\ufffd[2Jx\ufffd\ufffd\ufffd"
    assert printable("é".encode() + b"\xff") == "é\ufffd"

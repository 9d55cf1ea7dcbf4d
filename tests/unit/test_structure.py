"""Fused matrices: what their blocks are, and that each is orthogonalized as if it stood alone."""

from __future__ import annotations

import math
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor, nn

from distmuon import Blocks, Muon, qkv_blocks
from distmuon.layout import TensorSpec, flat_layout, read_spec, units_of
from distmuon.ownership import assign
from distmuon.splits import Sharing
from distmuon.structure import cut, join, read_blocks


@hypothesis.given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    repeats=st.integers(1, 3),
    other=st.integers(1, 5),
    by_rows=st.booleans(),
)
def test_blocks_cover_a_matrix_once(
    sizes: list[int], repeats: int, other: int, by_rows: bool
) -> None:
    length = sum(sizes) * repeats
    shape = (length, other) if by_rows else (other, length)
    blocks = Blocks(tuple(sizes), "rows" if by_rows else "columns", repeats)
    matrix = torch.arange(float(math.prod(shape))).view(shape)
    pieces = cut(matrix, blocks)
    assert [tuple(piece.shape) for piece in pieces] == list(blocks.shapes(*shape))
    assert torch.equal(join(pieces, shape, blocks), matrix)
    assert all(piece.is_contiguous() for piece in pieces)


def test_repeats_join_what_belongs_together() -> None:
    # Two heads of (2 rows of q, 1 of k): q is rows 0, 1, 3, 4.
    matrix = torch.arange(6.0)[:, None].expand(6, 2).contiguous()
    q, k = cut(matrix, Blocks((2, 1), repeats=2))
    assert q[:, 0].tolist() == [0, 1, 3, 4]
    assert k[:, 0].tolist() == [2, 5]
    even, odd = cut(matrix.mT.contiguous(), Blocks((1, 1), "columns", 3))
    assert even[0].tolist() == [0, 2, 4]
    assert odd[1].tolist() == [1, 3, 5]


def test_fused_attention_in_both_orders() -> None:
    assert qkv_blocks(8, 4) == Blocks((32, 32, 32))
    assert qkv_blocks(8, 4, kv_heads=2) == Blocks((32, 8, 8))
    assert qkv_blocks(8, 4, kv_heads=2, order="by_head") == Blocks((16, 4, 4), "rows", 2)
    assert qkv_blocks(8, 4, dim="columns").shapes(16, 96) == ((16, 32),) * 3
    with pytest.raises(ValueError, match="kv_heads must divide heads"):
        qkv_blocks(8, 4, kv_heads=3)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (3, Blocks(3)),
        ([4, 2, 2], Blocks((4, 2, 2))),
        ((4, 2, 2), Blocks((4, 2, 2))),
        (Blocks((1, 1), "columns", 4), Blocks((1, 1), "columns", 4)),
        ([[1, 1], "columns", 4], Blocks((1, 1), "columns", 4)),
    ],
)
def test_blocks_are_read_in_every_spelling(value: Any, expected: Blocks | None) -> None:
    assert read_blocks(value) == expected


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("3", TypeError, "number of equal row blocks"),
        (True, TypeError, "number of equal row blocks"),
        ((4.0, 2), TypeError, "number of equal row blocks"),
        (0, ValueError, ">= 1"),
        ((), ValueError, ">= 1"),
        ((3, -1), ValueError, ">= 1"),
        (Blocks(2, "heads"), ValueError, "'rows', 'columns'"),  # type: ignore[arg-type]
    ],
)
def test_what_are_no_blocks_is_refused(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_blocks(value)
    with pytest.raises(error, match=f"Group 0: Invalid blocks.*{message}"):
        Muon([{"params": [("w", nn.Parameter(torch.ones(6, 4)))], "blocks": value}])


@pytest.mark.parametrize(
    ("shape", "group", "message"),
    [
        ((6, 4), {"blocks": (4, 1)}, r"w has shape \[6, 4\]: its 6 rows cannot .* 5 in all"),
        ((6, 4), {"blocks": 4}, "its 6 rows cannot be cut into 4 equal blocks"),
        ((6, 4), {"blocks": Blocks(3, "columns")}, "its 4 columns cannot"),
        ((6, 4), {"blocks": Blocks((1, 1), "rows", 2)}, "2 in all, 2 times"),
        ((6, 4), {"axes": "conv"}, "Must be the kernel of a convolution"),
        ((6, 4), {"axes": "out"}, "Invalid axes='out' in group 0"),
        ((6, 4, 3, 3), {}, 'kernels in groups with axes="conv"'),
        ((6, 4), {"blocks": 2, "algorithm": "adamw"}, "Only Muon cuts matrices"),
        ((6, 4), {"block": 2}, "Did you mean 'blocks'"),
    ],
)
def test_a_structure_that_does_not_fit_is_refused_by_name(
    shape: tuple[int, ...], group: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Muon([{"params": [("w", nn.Parameter(torch.ones(shape)))], **group}])


# Against separate parameters ----------------------------------------------------------------------


def step(values: dict[str, Tensor], grads: list[dict[str, Tensor]], **group: Any) -> Any:
    model = {name: nn.Parameter(value.clone()) for name, value in values.items()}
    optimizer = Muon([{"params": list(model.items()), **group}], lr=1e-2)
    for each in grads:
        for name, parameter in model.items():
            parameter.grad = each[name].clone()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.items()}, optimizer


STRUCTURES = [
    ((24, 10), {"blocks": (16, 4, 4)}),
    ((24, 10), {"blocks": 6}),
    ((24, 10), {"blocks": qkv_blocks(4, 3, kv_heads=2, order="by_head")}),
    ((10, 24), {"blocks": Blocks((20, 4), "columns")}),
    ((10, 24), {"blocks": Blocks((1, 1), "columns", 12), "axes": "in_out"}),
    ((3, 24, 10), {"blocks": 2}),
    ((12, 3, 2, 2), {"axes": "conv"}),
    ((12, 3, 5), {"axes": "conv", "blocks": 4}),
]


@pytest.mark.parametrize(("shape", "group"), STRUCTURES, ids=str)
@pytest.mark.parametrize("adjust_lr_fn", ["match_rms_adamw", "original"])
def test_blocks_are_bitwise_parameters_of_their_own(
    shape: tuple[int, ...], group: dict[str, Any], adjust_lr_fn: str
) -> None:
    generator = torch.Generator().manual_seed(1)
    whole, *grads = [{"w": torch.randn(shape, generator=generator)} for _ in range(4)]
    fused, optimizer = step(whole, grads, adjust_lr_fn=adjust_lr_fn, **group)

    spec = read_spec("w", shape, group)

    def apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        matrices = tensors["w"].reshape(spec.count, *spec.matrix)
        lists = [[m] if spec.blocks is None else cut(m, spec.blocks) for m in matrices]
        return {
            f"{i}.{j}": piece.contiguous()
            for i, pieces in enumerate(lists)
            for j, piece in enumerate(pieces)
        }

    axes = "in_out" if spec.axes == "in_out" else "out_in"
    alone, _ = step(apart(whole), list(map(apart, grads)), adjust_lr_fn=adjust_lr_fn, axes=axes)
    for name, value in apart(fused).items():
        assert torch.equal(value, alone[name]), name
    assert optimizer.report().newton_schulz_calls == 3 * len(alone)
    assert optimizer.report().matrices == len(alone)


def test_blocks_of_unequal_gradients_get_equal_rows() -> None:
    # Research: fused, gradients of scale 1, 0.3 and 3 get row norms of 0.48, 0.17 and 0.86.
    generator = torch.Generator().manual_seed(2)
    scales = torch.tensor([1.0, 0.3, 3.0]).repeat_interleave(64)[:, None]
    grad = {"w": torch.randn(192, 64, generator=generator) * scales}
    zero = {"w": torch.zeros(192, 64)}
    norms = {}
    for blocks in (None, 3):
        moved, _ = step(zero, [grad], blocks=blocks, weight_decay=0.0)
        norms[blocks] = [block.norm(dim=1).mean().item() for block in moved["w"].chunk(3)]
    apart, fused = norms[3], norms[None]
    assert max(apart) / min(apart) == pytest.approx(1.0, abs=0.02)
    assert max(fused) / min(fused) > 4


@pytest.mark.parametrize(
    ("shape", "axes", "factor"),
    [
        ((256, 3, 3, 3), "conv", math.sqrt(256 / 27)),  # kernel dims alone would give 1.0
        ((64, 256), "out_in", 1.0),
        ((64, 256), "in_out", 2.0),
    ],
)
def test_the_factor_is_that_of_the_flattened_or_turned_matrix(
    shape: tuple[int, ...], axes: str, factor: float
) -> None:
    generator = torch.Generator().manual_seed(3)
    grad = {"w": torch.randn(shape, generator=generator)}
    zero = {"w": torch.zeros(shape)}
    moved, _ = step(
        zero, [grad], axes=axes, adjust_lr_fn="original", weight_decay=0.0, ns_coefficients="p5"
    )
    matrix = moved["w"].reshape(shape[0], -1)
    largest = torch.linalg.matrix_norm(matrix, ord=2).item()
    assert largest / 1e-2 == pytest.approx(factor, rel=0.03)


def test_an_expert_without_tokens_only_decays() -> None:
    generator = torch.Generator().manual_seed(4)
    start = {"w": torch.randn(3, 8, 6, generator=generator)}
    grad = {"w": torch.randn(3, 8, 6, generator=generator)}
    grad["w"][1] = 0
    moved, optimizer = step(start, [grad], weight_decay=0.1)
    assert torch.equal(moved["w"][1], start["w"][1] * (1 - 1e-2 * 0.1))
    assert not torch.equal(moved["w"][0], start["w"][0] * (1 - 1e-2 * 0.1))
    assert optimizer.report().newton_schulz_calls == 3


# Planning -----------------------------------------------------------------------------------------


def test_a_kernel_is_one_matrix_and_a_stack_several() -> None:
    layout = flat_layout(
        [
            TensorSpec("conv", (8, 4, 3, 3), "conv"),
            TensorSpec("e", (2, 8, 4), blocks=Blocks((4, 4))),
        ],
        1,
    )
    units, members = units_of(layout)
    assert [(u.name, u.shape, u.axes, u.blocks) for u in units.specs] == [
        ("conv", (8, 36), "out_in", None),
        ("e[0]", (8, 4), "out_in", Blocks((4, 4))),
        ("e[1]", (8, 4), "out_in", Blocks((4, 4))),
    ]
    assert members == (0, 1, 1)


def test_a_matrix_with_blocks_is_not_shared_between_ranks() -> None:
    from distmuon.cost import default_cost_model

    model = default_cost_model("cuda")
    for blocks, shared in ((None, True), (Blocks((256, 256)), False)):
        ownership = assign([TensorSpec("w", (512, 4096), blocks=blocks)], 4, model=model)
        assert bool(ownership.with_splits(model, Sharing(4)).splits) == shared


def test_changed_blocks_need_a_refresh_which_keeps_the_momentum() -> None:
    generator = torch.Generator().manual_seed(5)
    values = [{"w": torch.randn(12, 6, generator=generator)} for _ in range(3)]
    _, optimizer = step(values[0], values[1:2], blocks=2)
    (group,) = optimizer.param_groups
    group["blocks"] = 3
    group["params"][0].grad = values[2]["w"]
    with pytest.raises(RuntimeError, match=r"in blocks \(3, 'rows', 1\)\] parameters now.*refresh"):
        optimizer.step()
    before = optimizer.state_dict()["state"][0]["momentum_buffer"].clone()
    optimizer.refresh()
    assert torch.equal(optimizer.state_dict()["state"][0]["momentum_buffer"], before)
    optimizer.step()


def test_a_state_dictionary_of_other_blocks_is_refused() -> None:
    values = [{"w": torch.randn(12, 6)} for _ in range(2)]
    _, saved = step(values[0], values[1:], blocks=2)
    _, same = step(values[0], values[1:], blocks=(6, 6))
    with pytest.raises(ValueError, match=r"Group 0 was saved with blocks=\(2, 'rows', 1\), here"):
        same.load_state_dict(saved.state_dict())
    _, whole = step(values[0], values[1:])
    with pytest.raises(ValueError, match="here it has blocks=None"):
        whole.load_state_dict(saved.state_dict())
    _, again = step(values[0], values[1:], blocks=2)
    again.load_state_dict(saved.state_dict())
    assert again.param_groups[0]["blocks"] == (2, "rows", 1)

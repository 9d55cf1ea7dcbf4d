"""The fused update rules against torch's operations, and the check that guards them."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from distmuon import rounding, update_rules
from distmuon.kernels import elementwise, elementwise_triton
from distmuon.rounding import Piece, make_key

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _interpreted() -> None:
    assert os.environ["TRITON_INTERPRET"] == "1"


def poisoned(count: int) -> tuple[Tensor, Tensor]:
    """Random numbers between NaNs: the whole memory, and the piece in the middle."""
    memory = torch.full((count + 20,), torch.nan)
    piece = memory[7 : 7 + count]
    piece.copy_(torch.randn(count))
    return memory, piece


def assert_only(memory: Tensor, count: int) -> None:
    assert memory[:7].isnan().all()
    assert memory[7 + count :].isnan().all()
    assert not memory[7 : 7 + count].isnan().any()


@pytest.mark.parametrize("count", [1, 17, 2048, 5001])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.4, 0.95])
def test_momentum(count: int, nesterov: bool, momentum: float) -> None:
    memory, grad = poisoned(count)
    buffer_memory, buffer = poisoned(count)
    expected_grad, expected = grad.clone(), buffer.clone()
    update_rules.momentum_(expected_grad, expected, momentum=momentum, nesterov=nesterov)
    elementwise.momentum_(grad, buffer, momentum=momentum, nesterov=nesterov)
    torch.testing.assert_close(buffer, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-6, atol=1e-6)
    assert_only(memory, count)
    assert_only(buffer_memory, count)


@pytest.mark.parametrize("count", [1, 17, 2048, 5001])
@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum_finds_the_largest_entry_on_its_way(count: int, nesterov: bool) -> None:
    for spoiled in (None, torch.inf, -torch.inf, torch.nan):
        _, grad = poisoned(count)
        grad[count // 2] = -37.0 if spoiled is None else spoiled
        largest = torch.zeros(3)
        options = {"momentum": 0.95, "nesterov": nesterov}
        elementwise.momentum_(grad, torch.zeros(count), **options, largest=largest[1:2])
        assert torch.equal(largest[1].nan_to_num(-1), grad.abs().max().nan_to_num(-1))
        assert largest[0] == largest[2] == 0
        assert bool(largest[1].isfinite()) == (spoiled is None)
    zeros = torch.zeros(2)
    elementwise.momentum_(*torch.zeros(2, count), **options, largest=zeros[:1])
    assert not zeros.any()


@pytest.mark.parametrize("count", [1, 2047, 5001])
def test_apply(count: int) -> None:
    memory, param = poisoned(count)
    update, expected = torch.randn(count), param.clone()
    update_rules.apply_(expected, update, lr=0.1, weight_decay=0.3)
    elementwise.apply_(param, update, lr=0.1, weight_decay=0.3)
    torch.testing.assert_close(param, expected, rtol=1e-6, atol=1e-6)
    assert_only(memory, count)


@pytest.mark.parametrize("count", [1, 2049])
def test_adamw(count: int) -> None:
    memories, (p, g, m, v) = zip(*(poisoned(count) for _ in range(4)), strict=True)
    v.abs_()
    expected = [x.clone() for x in (p, g, m, v)]
    rates = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    for step in (1, 2):
        update_rules.adamw_(*expected, step=step, **rates)
        elementwise.adamw_((p, g, m, v), step=step, **rates)
    for actual, wanted in zip((p, g, m, v), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=2e-6, atol=2e-6)
    for memory in memories:
        assert_only(memory, count)


@pytest.mark.parametrize("count", [1, 17, 5001])
def test_masters_take_what_was_written_into_their_copies(count: int) -> None:
    memory, master = poisoned(count)
    master[0] = 1 + 2**-8  # as near to 1 as to the next: to the even one
    narrow = master.bfloat16()
    expected = master.clone()
    for place, value in ((1, 3.0), (2, torch.inf), (3, -0.5)):
        if place < count:
            narrow[place] = expected[place] = value
    if count > 5:
        master[4], expected[4] = torch.nan, narrow[4].float()
        master[5] = expected[5] = narrow[5] = torch.inf
    elementwise.adopt_(master, narrow)
    assert torch.equal(master, expected)
    assert_only(memory, count)


@pytest.mark.parametrize("count", [1, 17, 2048, 5001])
def test_scaling_into_another_dtype_rounds_once(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elementwise, "_LEAST_PIECE", 1)
    monkeypatch.setattr(elementwise, "_are_trusted", lambda device: True)
    _, x = poisoned(count)
    x[count // 2] = torch.inf
    memory = torch.full((count + 20,), torch.nan, dtype=torch.float16)
    half, factor = memory[7 : 7 + count], torch.tensor([0.3])
    elementwise.scale_into(x, factor, half)
    assert torch.equal(half, (x * factor).half())
    assert_only(memory, count)
    memory, back = poisoned(count)
    elementwise.scale_into(half, factor, back)
    assert torch.equal(back, half.float() * factor)
    assert_only(memory, count)


def test_each_matrix_is_scaled_by_its_own_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "_LEAST_PIECE", 1)
    monkeypatch.setattr(elementwise, "_are_trusted", lambda device: True)
    launched: list[tuple[int, ...]] = []
    launch = elementwise_triton.launch_scale

    def count(x: Tensor, factor: Tensor, out: Tensor) -> None:
        launched.append(tuple(x.shape))
        launch(x, factor, out)

    monkeypatch.setattr(elementwise_triton, "launch_scale", count)
    factor = torch.tensor([0.5, -3.0, 0.0]).view(3, 1, 1)
    for shape in ((3, 16, 131), (3, 5, 7)):
        x = torch.randn(shape)
        out = torch.full(shape, torch.nan, dtype=torch.float16)
        assert torch.equal(elementwise.scale_into(x, factor, out), (x * factor).half())
    assert launched == [(3, 16 * 131)], "a matrix of 35 elements has no whole groups"
    turned = torch.randn(3, 16, 32).mT
    elementwise.scale_into(turned, factor, torch.empty(3, 32, 16))
    assert len(launched) == 1


@pytest.mark.parametrize("count", [1, 17, 2048, 5001])
def test_rounding_draws_the_bits_of_torch(count: int) -> None:
    value = torch.randn(count + 20) * 1e3
    value[8 : 8 + count : 7] = torch.nan
    value[9 : 9 + count : 11] = -torch.inf
    found, expected = (torch.full((count + 20,), 7.0, dtype=torch.bfloat16) for _ in range(2))
    pieces = [
        Piece(7, 8, 2**32 - 3, make_key(0, "a", 1)),
        Piece(8, 8 + count, 2**31 - 20, make_key(1, "b", 2)),
    ]
    rounding._round_by_kernel(found, value, pieces)
    rounding._round_by_torch(expected, value, pieces)
    number = ~expected.isnan()
    assert torch.equal(found[number], expected[number])
    assert bool(found[~number].isnan().all())
    assert bool((found[8 + count :] == 7.0).all())


def test_rounding_that_draws_other_bits_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rounding._check(CPU)
    right = elementwise_triton.launch_round

    def another_seed(out: Tensor, value: Tensor, *, second: int, **options: Any) -> None:
        right(out, value, second=second ^ 1, **options)

    monkeypatch.setattr(elementwise_triton, "launch_round", another_seed)
    with pytest.warns(RuntimeWarning, match="draws other bits"):
        assert not rounding._check(CPU)
    monkeypatch.delattr(elementwise_triton, "launch_round")
    with pytest.warns(RuntimeWarning, match="raised ImportError"):
        assert not rounding._check(CPU)


def test_the_check_knows_right_from_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert elementwise.self_check(CPU) < 1e-5
    assert elementwise._check(CPU)

    def forgets_decay(param: Tensor, update: Tensor, *, lr: float, weight_decay: float) -> None:
        param.sub_(update, alpha=lr)

    monkeypatch.setattr(elementwise_triton, "launch_apply", forgets_decay)
    with pytest.warns(RuntimeWarning, match="are off by"):
        assert not elementwise._check(CPU)
    monkeypatch.delattr(elementwise_triton, "launch_apply")
    with pytest.warns(RuntimeWarning, match="raised ImportError"):
        assert not elementwise._check(CPU)

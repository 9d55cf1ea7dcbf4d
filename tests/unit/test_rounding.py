"""Stochastic rounding: no bias, the same bits wherever an element lies, nothing kept beside it."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distmuon import Muon, rounding
from distmuon.adapters.deepspeed import ZeroOrtho
from distmuon.rounding import Key, Piece, make_key, round_

KEY = make_key(0, "weight", 1)


def rounded(value: Tensor, key: Key = KEY, first: int = 0) -> Tensor:
    out = torch.full_like(value, torch.nan, dtype=torch.bfloat16)
    round_(out, value, [Piece(0, value.numel(), first, key)])
    return out


def drawn(count: int, key: Key = KEY, first: int = 0) -> Tensor:
    piece = Piece(0, count, first, key)
    return rounding._random_bits([piece], torch.arange(count, dtype=torch.int32))


def drawn_by_hand(place: int, key: Key) -> int:
    """The hash in Python's integers, which do not wrap around."""
    bits = (place + key.first) % 2**32
    bits = (bits ^ bits >> 16) * 0x21F0AAAD % 2**32
    bits ^= key.second % 2**32
    return (bits ^ bits >> 15) * 0x735A2D97 % 2**32 >> 16


@pytest.mark.parametrize("count", [1, 7, 31, 1000])  # tails of vector instructions, too
def test_the_bits_are_those_of_the_hash(count: int) -> None:
    for step in range(20):
        key = make_key(3, "layers.0.weight", step)
        first = 2**32 - 500 if step % 2 else 12345  # stacks of experts may be as long
        expected = [drawn_by_hand(first + i, key) for i in range(count)]
        assert drawn(count, key, first).tolist() == expected


def test_the_bits_are_uniform_and_know_nothing_of_their_neighbours() -> None:
    count = 2**16
    one = drawn(count).double()
    # 4.5 standard deviations of each; of the many pairs the largest is within.
    histogram = torch.bincount((one / 256).long(), minlength=256).double()
    square = float(((histogram - count / 256) ** 2 / (count / 256)).sum())
    assert abs(square - 255) < 4.5 * math.sqrt(2 * 255)
    others = [
        drawn(count, make_key(0, "weight", 2)),
        drawn(count, make_key(0, "other", 1)),
        drawn(count, make_key(1, "weight", 1)),
        *(drawn(count, first=distance) for distance in (1, 2, 3, 64, 1024, 4096)),
    ]
    for other in others:
        pair = torch.stack([one, other.double()])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 4.5 / math.sqrt(count)
    for bit in range(16):
        share = float(((drawn(count) >> bit) & 1).double().mean())
        assert abs(share - 0.5) < 4.5 * 0.5 / math.sqrt(count)


@pytest.mark.parametrize("value", [1.001, -1.001, 3e-39, -7.1e37, 1.0 + 2**-23, 255.999])
def test_the_mean_of_many_draws_is_the_value(value: float) -> None:
    wide = torch.full((4096,), value)
    draws = torch.stack([rounded(wide, make_key(0, "w", step)) for step in range(16)]).double()
    neighbours = draws.unique()
    assert len(neighbours) <= 2, "the two numbers around it"
    exact = float(wide[0])
    down = int(torch.tensor([exact]).view(torch.int32).item()) & ~0xFFFF
    low = torch.tensor([down], dtype=torch.int32).view(torch.float32).double().item()
    up = torch.tensor([down + 0x10000], dtype=torch.int32).view(torch.float32).double().item()
    assert {low, up} >= set(neighbours.tolist())
    share = (exact - low) / (up - low)
    spread = math.sqrt(share * (1 - share) / draws.numel()) * abs(up - low)
    assert abs(float(draws.mean()) - exact) <= 4.5 * spread


def test_random_values_are_rounded_without_bias_and_by_less_than_a_step() -> None:
    torch.manual_seed(0)
    value = torch.randn(200_000) * 10.0 ** torch.randint(-30, 30, (200_000,))
    error = (rounded(value).double() - value.double()) / value.double()
    assert float(error.abs().max()) < 2**-7
    assert abs(float(error.mean())) < 4.5 * float(error.std()) / math.sqrt(len(error))
    assert int((rounded(value) != value.bfloat16()).sum()) > 40_000, "a quarter goes the other way"
    assert torch.equal(rounded(-value), -rounded(value))


def test_what_bfloat16_has_keeps_its_bits() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    for step in range(3):
        result = rounded(every.float(), make_key(0, "w", step))
        number = ~every.isnan()
        assert torch.equal(result[number].view(torch.int16), every[number].view(torch.int16))
        assert bool(result[~number].isnan().all())


def test_not_a_number_stays_none_however_its_bits_are() -> None:
    # Payloads in the bits that are cut off, and one that a carry would make -0.
    bits = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF, 0x7F80FFFF], dtype=torch.int32)
    assert bool(rounded(bits.view(torch.float32)).isnan().all())
    edges = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0])
    assert torch.equal(rounded(edges).float(), edges)
    assert rounded(edges).signbit().tolist() == [False, True, False, True]
    largest = torch.tensor([torch.finfo(torch.float32).max])
    assert rounded(largest).item() in (torch.inf, torch.finfo(torch.bfloat16).max)


@pytest.mark.parametrize("chunk", [5, 64, 2**17])
def test_any_cut_gives_the_same_bits_and_touches_nothing_else(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    value = torch.randn(700)
    whole = rounded(value)
    other = make_key(0, "other", 1)
    monkeypatch.setitem(rounding._CHUNK_NUMEL, "cpu", chunk)
    assert torch.equal(rounded(value), whole)
    cuts = [0, 1, 20, 333, 690, 700]
    for start, stop in pairwise(cuts):
        assert torch.equal(rounded(value[start:stop], first=start), whole[start:stop])
    # Two parameters, a gap of zeros between them, memory after them.
    flat = torch.zeros(60)
    flat[3:20], flat[24:50] = value[100:117], value[:26]
    out = torch.zeros(60, dtype=torch.bfloat16)
    out[50:] = torch.nan
    round_(out, flat, [Piece(3, 20, 100, KEY), Piece(24, 50, 0, other)])
    assert torch.equal(out[3:20], whole[100:117])
    assert torch.equal(out[24:50], rounded(value[:26], other))
    assert not out[:3].any()
    assert not out[20:24].any()
    assert bool(out[50:].isnan().all())


def train(weight: nn.Parameter, steps: int, **options: Any) -> Muon:
    optimizer = Muon([("w", weight)], **options)
    for _ in range(steps):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    return optimizer


def test_steps_that_bfloat16_would_swallow_are_made_on_average() -> None:
    steps, decay = 200, 1e-5
    expected = (1 - decay) ** steps  # 0.998, where bfloat16 has 1 and 0.996
    found: dict[int | None, Tensor] = {}
    for seed in (None, 0, 1):
        weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        optimizer = train(weight, steps, lr=decay, weight_decay=1.0, stochastic_rounding=seed)
        found[seed] = weight.detach().double()
        # The state without a master, the count of the steps in its place.
        state = {"momentum_buffer", "master" if seed is None else "step"}
        assert set(optimizer.state_dict()["state"][0]) == state
        copies = 2 if seed is None else 1
        assert optimizer.report().state_bytes == 4 * weight.numel() * copies
    assert bool((found[None] == 0.99609375).all()), "the master, rounded to nearest"
    spread = math.sqrt((1 - expected) * 2**-8 / 64**2)
    for seed in (0, 1):
        assert abs(float(found[seed].mean()) - expected) < 4.5 * spread
    assert not torch.equal(found[0], found[1])


def test_parameters_that_are_not_narrow_are_not_rounded() -> None:
    torch.manual_seed(2)
    start, grad = torch.randn(8, 8), torch.randn(8, 8)
    found = []
    for seed in (None, 7):
        weight = nn.Parameter(start.clone())
        optimizer = Muon([weight], lr=0.1, stochastic_rounding=seed)
        weight.grad = grad.clone()
        optimizer.step()
        assert set(optimizer.state_dict()["state"][0]) == {"momentum_buffer"}
        found.append(weight.detach())
    assert torch.equal(found[0], found[1])


def test_values_written_from_outside_are_what_the_next_step_starts_from() -> None:
    weight = nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    optimizer = train(weight, 1, lr=0.5, weight_decay=0.0, stochastic_rounding=0)
    with torch.no_grad():
        weight.fill_(3.0)
    weight.grad = None
    other = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer.add_param_group({"params": [("other", other)]})
    optimizer.refresh()
    other.grad = torch.ones_like(other)
    optimizer.step()
    assert bool((weight == 3.0).all())


@pytest.mark.parametrize("form", ["whole", "handles"])
@pytest.mark.parametrize(("before", "after"), [(None, 3), (3, None), (3, 4)])
def test_state_is_loaded_from_runs_that_rounded_otherwise(
    before: int | None, after: int | None, form: str
) -> None:
    torch.manual_seed(3)
    weights = [nn.Parameter(torch.randn(9, 7).bfloat16()) for _ in range(2)]
    saving, loading = (
        Muon([("w", weight)], lr=0.01, stochastic_rounding=seed)
        for weight, seed in zip(weights, (before, after), strict=True)
    )
    weights[0].grad = torch.randn(9, 7).bfloat16()
    saving.step()
    with torch.no_grad():
        weights[1].copy_(weights[0])
    loading.load_state_dict(saving.state_dict() if form == "whole" else saving.sharded_state_dict())
    assert loading.param_groups[0]["stochastic_rounding"] == after, "the run's own"
    weights[1].grad = weights[0].grad.clone()
    loading.step()
    state = loading.state_dict()["state"][0]
    assert ("master" in state) == (after is None)
    assert after is None or state["step"] == (1 if before is None else 2)
    assert torch.equal(state["momentum_buffer"], _second_momentum(weights[0].grad))


def _second_momentum(grad: Tensor) -> Tensor:
    buffer = torch.zeros(grad.shape)
    for _ in range(2):
        buffer.lerp_(grad.float(), 1 - 0.95)
    return buffer


def test_a_change_needs_a_refresh_which_keeps_momentum_and_count() -> None:
    weight = nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    optimizer = train(weight, 2, lr=0.01, stochastic_rounding=0)
    optimizer.param_groups[0]["stochastic_rounding"] = None
    with pytest.raises(RuntimeError, match=r"rounded with seed 0.*refresh"):
        optimizer.step()
    optimizer.refresh()
    optimizer.step()
    assert "master" in optimizer.state_dict()["state"][0]
    optimizer.param_groups[0]["stochastic_rounding"] = 1
    optimizer.refresh()
    optimizer.step()
    assert optimizer.state_dict()["state"][0]["step"] == 4


@pytest.mark.parametrize("bad", ["0", 0.5, True])
def test_a_wrong_seed_is_refused(bad: object) -> None:
    with pytest.raises(TypeError, match=r"stochastic_rounding=.* in group 0. Must be an int"):
        Muon([nn.Parameter(torch.zeros(4, 4))], stochastic_rounding=bad)  # type: ignore[arg-type]


def test_float16_and_deepspeed_are_refused() -> None:
    weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.float16))
    optimizer = Muon([("w", weight)], stochastic_rounding=0)
    weight.grad = torch.ones_like(weight)
    with pytest.raises(ValueError, match=r"w is torch.float16.*is for torch.bfloat16"):
        optimizer.step()
    with pytest.raises(ValueError, match="DeepSpeed keeps fp32 masters"):
        ZeroOrtho([{"params": [("w", weight)], "algorithm": "muon"}], stochastic_rounding=0)

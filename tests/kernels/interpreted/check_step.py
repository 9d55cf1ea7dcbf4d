"""Whole steps by the kernels, as a GPU makes them: fused rules, stacks, symmetric products."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distmuon import Muon, exchange, matrix_updates, rounding
from distmuon.kernels import elementwise, elementwise_triton
from distmuon.kernels.symmetric import symmetric_backend
from distmuon.orthogonalize import pipeline

SHAPES = {"a": (20, 40), "b": (20, 40), "c": (20, 20), "experts": (2, 20, 40), "bias": (30,)}


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Take the kernels and the stacks of a GPU here; notes who looks for largest entries."""

    def takes(*tensors: Tensor) -> bool:
        return all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors)

    looked: list[str] = []
    look = pipeline.largest_entry

    def largest_entry(x: Tensor) -> Tensor:
        looked.append(str(list(x.shape)))
        return look(x)

    monkeypatch.setattr(elementwise, "takes", takes)
    monkeypatch.setattr(elementwise, "_are_trusted", lambda device: True)
    monkeypatch.setattr(elementwise, "_LEAST_PIECE", 1)
    monkeypatch.setattr(pipeline, "largest_entry", largest_entry)
    for module in (pipeline, exchange, matrix_updates):
        monkeypatch.setattr(module, "stack_numel", lambda device: 2**20)
    return looked


def train(blocks: int | None = None, **options: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    named = {n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in SHAPES.items()}
    bias = named.pop("bias")
    groups = [
        {"params": list(named.items()), "ns_dtype": "float16", "blocks": blocks},
        {"params": [("bias", bias)], "algorithm": "adamw"},
    ]
    optimizer = Muon(groups, lr=0.1, ns_coefficients="p5", **options)
    for step in range(2):
        for name, parameter in {**named, "bias": bias}.items():
            # Scales that float16 does not have.
            grad = torch.randn(parameter.shape, generator=generator) * 1e-9
            parameter.grad = None if (step, name) == (1, "b") else grad
        optimizer.step()
    return {name: parameter.detach() for name, parameter in {**named, "bias": bias}.items()}


@pytest.mark.parametrize(
    "options", [{}, {"nesterov": False, "publish_bytes": 512, "adjust_lr_fn": "update_rms"}]
)
def test_a_step_by_kernels_is_the_step_by_torch(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert os.environ["TRITON_INTERPRET"] == "1"
    expected = train(**options)
    looked = as_on_a_gpu(monkeypatch)
    with symmetric_backend("triton"):
        found = train(**options)
    assert looked == [], "the momentum's pass has found them"
    for name, value in expected.items():
        # Updates of RMS 0.2 times lr: float16 products are within 1e-2 of others.
        torch.testing.assert_close(found[name], value, rtol=0, atol=3e-3, msg=name)


def decayed(seed: int | None) -> list[Tensor]:
    """bfloat16 parameters after steps that only decay them; one is written to in between."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(20, 40), (30,), (17, 3)]
    named = [
        (str(i), nn.Parameter(torch.randn(shape, generator=generator).bfloat16()))
        for i, shape in enumerate(shapes)
    ]
    groups = [{"params": named[:1]}, {"params": named[1:], "algorithm": "adamw"}]
    optimizer = Muon(groups, lr=0.1, weight_decay=0.3, stochastic_rounding=seed)
    for _ in range(3):
        for _, parameter in named:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        with torch.no_grad():
            named[0][1][3] = 0.7
    return [parameter.detach() for _, parameter in named]


@pytest.mark.parametrize("seed", [None, 0])
def test_narrow_parameters_have_the_same_bits_by_kernels(
    seed: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = decayed(seed)
    adopted: list[int] = []
    adopt = elementwise_triton.launch_adopt

    def count(master: Tensor, narrow: Tensor) -> None:
        adopted.append(master.numel())
        adopt(master, narrow)

    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(elementwise_triton, "launch_adopt", count)
    with symmetric_backend("torch"):
        found = decayed(seed)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert len(adopted) == (6 if seed is None else 0), "two buffers in three steps"
    assert seed is None or rounding._trusted == {torch.device("cpu"): True}, "by the kernel"


def test_small_matrices_are_updated_together(monkeypatch: pytest.MonkeyPatch) -> None:
    looked, launched = as_on_a_gpu(monkeypatch), []
    launch = elementwise_triton.launch_momentum

    def count(grad: Tensor, buffer: Tensor, **options: Any) -> None:
        launched.append(grad.numel())
        launch(grad, buffer, **options)

    monkeypatch.setattr(elementwise, "_LEAST_PIECE", 2**18)
    monkeypatch.setattr(elementwise_triton, "launch_momentum", count)
    with symmetric_backend("torch"):
        train()
    assert len(launched) == 1 + 2, "a run for each step; one step has a gap in the middle"
    assert looked


def test_blocks_of_one_shape_go_as_one_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = train(blocks=2)
    looked = as_on_a_gpu(monkeypatch)
    with symmetric_backend("triton"):
        found = train(blocks=2)
    # Two of each matrix; "b" has no gradient in the second step. Nobody has seen them apart.
    assert set(looked) == {"[8, 10, 40]", "[6, 10, 40]", "[2, 10, 20]"}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=3e-3, msg=name)

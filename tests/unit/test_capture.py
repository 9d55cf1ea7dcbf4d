"""A step is made anew each time: torch.compile leaves it alone, and a CUDA graph is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from distmuon import Muon

STEPS = 3


def setup() -> tuple[nn.Linear, Muon]:
    torch.manual_seed(0)
    model = nn.Linear(16, 24)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "algorithm": "adamw"}]
    return model, Muon(groups, lr=0.1)


def train(
    model: nn.Linear, optimizer: Muon, update: Callable[[Tensor], None], steps: int = STEPS
) -> list[Tensor]:
    torch.manual_seed(1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (step + 1)
        update(torch.randn(8, 16))
        optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("compiled", ["step", "all"])
def test_compiled_steps_are_the_same_steps(compiled: str) -> None:
    def run(compile_: Callable[..., Callable[..., None]], name: str) -> list[Tensor]:
        model, optimizer = setup()
        step = compile_(optimizer.step) if name == "step" else optimizer.step

        def update(x: Tensor) -> None:
            model(x).square().mean().backward()
            step()

        return train(model, optimizer, compile_(update) if name == "all" else update)

    torch.compiler.reset()
    got = run(lambda function: torch.compile(function, backend="eager"), compiled)
    for found, wanted in zip(got, run(lambda function: function, compiled), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("steps", [0, 1])
def test_a_captured_step_is_refused_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    model, optimizer = setup()

    def update(x: Tensor) -> None:
        model(x).square().mean().backward()
        optimizer.step()

    before = train(model, optimizer, update, steps)
    state = {key: value.clone() for key, value in flatten(optimizer).items()}
    model(torch.ones(8, 16)).sum().backward()
    grad = model.weight.grad
    assert grad is not None
    kept = grad.clone()
    with monkeypatch.context() as patch:
        # What a GPU would say during a capture.
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match=r"Muon\.step\(\).*graph is captured.*graph-capture"):
            optimizer.step()
        with pytest.raises(RuntimeError, match=r"Muon\.clip_grad_norm_\(\).*graph-capture"):
            optimizer.clip_grad_norm_(0.1)
    assert torch.equal(kept, grad)
    assert all(map(torch.equal, before, model.parameters()))
    after = flatten(optimizer)
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], state[key]) for key in state)
    assert optimizer.report().steps == steps
    optimizer.step()
    assert optimizer.report().steps == steps + 1


def flatten(optimizer: Muon) -> dict[tuple[int, str], Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        (index, name): torch.as_tensor(value)
        for index, entry in state.items()
        for name, value in entry.items()
    }

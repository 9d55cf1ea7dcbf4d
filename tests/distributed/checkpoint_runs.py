"""A small model and its training, for the tests of checkpoints: same gradients in every order."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from distmuon import Muon

# Sizes that no cut into 2, 3, 4 or 8 shards leaves whole.
MATRICES = {"wide": (61, 150), "row": (1, 37), "experts": (3, 11, 6), "tall": (40, 9)}
OTHERS = {"bias": (23,), "table": (19, 5), "scale": (1,)}
Order = Literal["as is", "reversed"]


class Bag(nn.Module):
    """Parameters of all kinds, one frozen, and buffers."""

    def __init__(self, dtype: torch.dtype, seed: int, order: Order = "as is") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shapes = {**MATRICES, **OTHERS, "frozen": (5, 3)}
        values = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
        for name in reversed(values) if order == "reversed" else values:
            parameter = nn.Parameter(values[name].to(dtype), requires_grad=name != "frozen")
            self.register_parameter(name, parameter)
        self.register_buffer("count", torch.tensor(seed))
        self.register_buffer("columns", torch.randn(4, 6, generator=generator).T)
        self.register_buffer("cache", torch.full((2,), float(seed)), persistent=False)


def build(
    dtype: torch.dtype, process_group: Any, *, seed: int, order: Order = "as is", **options: Any
) -> tuple[Bag, Muon]:
    """A model and its optimizer; in reverse order the groups are reversed, too."""
    model = Bag(dtype, seed, order)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [(name, p) for name, p in named if name in MATRICES]
    first = [pair for pair in matrices if pair[0] in ("wide", "tall")]
    groups = [
        {"params": first},
        {"params": [pair for pair in matrices if pair not in first], "lr": 5e-3, "nesterov": False},
        {"params": [pair for pair in named if pair[0] in OTHERS], "algorithm": "adamw"},
    ]
    if order == "reversed":
        groups.reverse()
    return model, Muon(groups, lr=2e-2, process_group=process_group, **options)


def train(model: Bag, optimizer: Muon, steps: range) -> None:
    """Steps with gradients that depend on the step and the parameter's name alone."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for name, shape in {**MATRICES, **OTHERS}.items():
            parameter = model.get_parameter(name)
            parameter.grad = torch.randn(shape, generator=generator).to(parameter.dtype)
        optimizer.step()


def snapshot(model: Bag, optimizer: Muon) -> dict[str, Tensor]:
    """Model and state by name: whole on rank 0, the model alone on the others. A collective."""
    found = {f"model/{name}": value.clone() for name, value in model.state_dict().items()}
    optimizer.consolidate_state_dict(to=0)
    if optimizer.communicator.rank == 0:
        state = optimizer.state_dict()["state"]
        for name, entry in zip(optimizer.parameter_names.values(), state.values(), strict=True):
            found |= {
                f"{name}/{key}": torch.as_tensor(value).clone() for key, value in entry.items()
            }
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bitwise; `found` may be without state, as it is on all ranks but 0."""
    state = any(not name.startswith("model/") for name in found)
    wanted = {n: v for n, v in expected.items() if state or n.startswith("model/")}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name

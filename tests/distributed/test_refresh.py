"""Groups that change after the first step: laid out anew, with every bit of state kept."""

from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distmuon import Muon
from tests.harness import run_ranks

MATRICES = {"wide": (31, 50), "tall": (40, 9), "square": (17, 17)}
LATE = {"late": (23, 29), "later": (8, 40)}
VECTORS = {"bias": (23,), "scale": (5,)}
LATE_VECTORS = {"late_bias": (37,)}


def build(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    shapes = {**MATRICES, **VECTORS, **LATE, **LATE_VECTORS}
    return {
        n: nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for n, s in shapes.items()
    }


def groups_of(
    model: dict[str, nn.Parameter], matrices: Any, vectors: Any, **options: Any
) -> list[dict[str, Any]]:
    return [
        {"params": [(n, model[n]) for n in matrices], **options},
        {"params": [(n, model[n]) for n in vectors], "algorithm": "adamw", **options},
    ]


def give_gradients(model: dict[str, nn.Parameter], step: int, names: Any) -> None:
    for index, name in enumerate(names):
        generator = torch.Generator().manual_seed(100 * step + index)
        gradient = torch.randn(model[name].shape, generator=generator)
        model[name].grad = gradient.to(model[name].dtype)


def train(process_group: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Two steps, two new groups, two more steps."""
    model = build(dtype)
    early = [*MATRICES, *VECTORS]
    groups = groups_of(model, MATRICES, VECTORS)
    optimizer = Muon(groups, lr=1e-2, process_group=process_group, check_desync_every=1)
    for step in range(2):
        give_gradients(model, step, early)
        optimizer.step()
    for group in groups_of(model, LATE, LATE_VECTORS, lr=5e-3):
        optimizer.add_param_group(group)
    optimizer.refresh()
    for step in range(2, 4):
        give_gradients(model, step, [*early, *LATE, *LATE_VECTORS])
        optimizer.step()
    assert optimizer.report().steps == 4
    return {name: p.detach().clone() for name, p in model.items()}


def train_apart(dtype: torch.dtype) -> dict[str, Tensor]:
    """What each half does in an optimizer of its own that never changes."""
    model = build(dtype)
    early, late = [*MATRICES, *VECTORS], [*LATE, *LATE_VECTORS]
    first = Muon(groups_of(model, MATRICES, VECTORS), lr=1e-2)
    second = Muon(groups_of(model, LATE, LATE_VECTORS), lr=5e-3)
    for step in range(4):
        give_gradients(model, step, early + late if step >= 2 else early)
        first.step()
        if step >= 2:
            second.step()
    return {name: p.detach().clone() for name, p in model.items()}


def train_on_rank(dtype: torch.dtype) -> dict[str, Tensor]:
    return train(dist.group.WORLD, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world_size", [1, 4])
def test_i1_refresh_keeps_every_bit_of_state_in_another_layout(
    world_size: int, dtype: torch.dtype
) -> None:
    expected = train_apart(dtype)
    results = (
        [train(None, dtype)] if world_size == 1 else run_ranks(world_size, train_on_rank, dtype)
    )
    for rank, result in enumerate(results):
        for name, value in expected.items():
            assert torch.equal(result[name], value), f"{name} on rank {rank}"


Change = Literal[
    "forgotten",
    "by hand",
    "one rank",
    "frozen",
    "frozen on one",
    "removed",
    "plan differs",
    "algorithm",
    "algorithm on one",
    "exchanged",
    "exchanged and refreshed",
]


def change(kind: Change) -> tuple[str, bool]:
    """Change the groups after a step in some way; what the next step or refresh says."""
    model = build(torch.float32)
    optimizer = Muon(groups_of(model, MATRICES, VECTORS), process_group=dist.group.WORLD)
    give_gradients(model, 0, [*MATRICES, *VECTORS])
    optimizer.step()
    before = {name: p.detach().clone() for name, p in model.items()}
    message = "no error"
    try:
        if kind == "forgotten" or (kind == "one rank" and dist.get_rank() == 1):
            optimizer.add_param_group(groups_of(model, LATE, ())[0])
        if kind in ("by hand", "removed"):
            listed = optimizer.param_groups[0]["params"]
            listed.pop() if kind == "removed" else listed.append(model["late"])
            optimizer.refresh()
        if kind == "plan differs":
            names = list(LATE)[dist.get_rank() :]
            optimizer.add_param_group(groups_of(model, names, ())[0])
            optimizer.refresh()
        if kind == "frozen" or (kind == "frozen on one" and dist.get_rank() == 1):
            model["tall"].requires_grad_(False)
        if kind.startswith("frozen"):
            optimizer.refresh()
        if kind == "algorithm" or (kind == "algorithm on one" and dist.get_rank() == 1):
            optimizer.param_groups[0]["algorithm"] = "normuon"
        if kind.startswith("exchanged"):
            optimizer.param_groups[0]["params"][0] = model["late"]
        if kind == "exchanged and refreshed":
            optimizer.refresh()
        give_gradients(model, 1, model)
        optimizer.step()
    except (RuntimeError, ValueError) as error:
        message = f"{type(error).__name__}: {error}"
    return message, all(torch.equal(model[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (
            "forgotten",
            "RuntimeError: The groups have [3 muon, 2 adamw, 2 muon] parameters now, and",
        ),
        ("one rank", "The groups have [3 muon, 2 adamw, 2 muon] parameters now, and [3 muon, 2"),
        (
            "algorithm",
            "RuntimeError: The groups have [3 normuon, 2 adamw] parameters now, and [3 mu",
        ),
        (
            "algorithm on one",
            "The groups have [3 normuon, 2 adamw] parameters now, and [3 muon, 2 ",
        ),
        ("exchanged", "RuntimeError: Group 0 has other parameters than when they were laid out"),
        ("exchanged and refreshed", "no error"),
        ("frozen", "ValueError: tall is frozen"),
        ("frozen on one", "tall is frozen"),
        ("plan differs", "do not have the same optimizer as rank 0. First difference"),
        ("by hand", "no error"),
        ("removed", "no error"),
    ],
)
def test_changed_groups_are_never_silent(kind: Change, said: str) -> None:
    for message, unchanged in run_ranks(2, change, kind):
        assert said in message
        assert unchanged == (said != "no error"), "nothing was changed before the error"


def test_refresh_keeps_the_seconds_of_the_steps_so_far() -> None:
    model = build(torch.float32)
    optimizer = Muon(groups_of(model, MATRICES, VECTORS), profile="phases")
    give_gradients(model, 0, [*MATRICES, *VECTORS])
    optimizer.step()
    before = optimizer.report().seconds
    optimizer.refresh()
    assert optimizer.report().seconds == before
    give_gradients(model, 1, [*MATRICES, *VECTORS])
    optimizer.step()
    assert optimizer.report().seconds["newton-schulz"] > before["newton-schulz"]


@pytest.mark.parametrize("shape", [(9, 30), (30, 9), (16, 16)])
def test_a_second_moment_of_rows_is_none_of_columns(shape: tuple[int, int]) -> None:
    weight = nn.Parameter(torch.randn(shape))
    optimizer = Muon([{"params": [("w", weight)], "algorithm": "normuon"}])
    weight.grad = torch.randn(shape)
    optimizer.step()
    momentum = optimizer.state_dict()["state"][0]["momentum_buffer"].clone()
    optimizer.param_groups[0]["axes"] = "in_out"
    optimizer.refresh()
    state = optimizer.state_dict()["state"][0]
    assert torch.equal(state["momentum_buffer"], momentum)
    assert torch.equal(state["second_momentum_buffer"], torch.zeros(1, shape[1]))
    optimizer.step()


def test_names_by_place_follow_the_place() -> None:
    matrices = [nn.Parameter(torch.randn(4, 5)) for _ in range(4)]
    optimizer = Muon(matrices[:3])
    listed = optimizer.param_groups[0]["params"]
    del listed[0]
    listed.append(matrices[3])  # would be called as the last one was
    optimizer.refresh()
    names = list(optimizer.parameter_names.values())
    assert names == [f"group 0 parameter {place}" for place in range(3)]


def unfreeze(reduce: Literal["owned", "hook"], then: Literal["step", "refresh"]) -> tuple[str, Any]:
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 5, bias=False))
    model[0].weight.requires_grad_(False)
    named = list(model.named_parameters())
    optimizer = Muon(named[1:], lr=0.1, process_group=dist.group.WORLD, reduce=reduce)

    def wrap() -> nn.Module:
        return nn.parallel.DistributedDataParallel(model) if reduce == "hook" else model

    wrapped = wrap()
    optimizer.attach(wrapped)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(dist.get_rank()))
    wrapped(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    before = model[0].weight.detach().clone()
    model[0].weight.requires_grad_(True)
    try:
        if then == "refresh":
            optimizer.add_param_group({"params": named[:1]})
            optimizer.refresh()
            wrapped = wrap()
            optimizer.attach(wrapped)
        wrapped(x).square().mean().backward()
        optimizer.step()
    except RuntimeError as error:
        return str(error), None
    return "", (torch.equal(before, model[0].weight), model[0].weight.detach().clone())


@pytest.mark.parametrize("reduce", ["owned", "hook"])
def test_a_parameter_unfrozen_later_is_named_and_trains_after_refresh(
    reduce: Literal["owned", "hook"],
) -> None:
    for message, _ in run_ranks(2, unfreeze, reduce, "step"):
        assert "0.weight was frozen at attach() and is trainable now" in message
    outcome = run_ranks(2, unfreeze, reduce, "refresh")
    for message, (unchanged, weight) in outcome:
        assert message == ""
        assert not unchanged
        assert torch.equal(weight, outcome[0][1][1]), "ranks agree"


def change_dtype(target: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor], list[bool]]:
    """State before and after the parameters of a running optimizer change their dtype."""
    model = build(torch.float32)
    group = dist.group.WORLD
    optimizer = Muon(groups_of(model, MATRICES, VECTORS), lr=1e-2, process_group=group)
    give_gradients(model, 0, [*MATRICES, *VECTORS])
    optimizer.step()

    def state() -> dict[str, Tensor]:
        optimizer.consolidate_state_dict(to=0)
        if dist.get_rank():
            return {}
        entries = optimizer.state_dict()["state"].values()
        return {
            f"{name}/{key}": torch.as_tensor(value).clone()
            for name, entry in zip(optimizer.parameter_names.values(), entries, strict=True)
            for key, value in entry.items()
        }

    before = state()
    values = [model[name].detach().clone() for name in (*MATRICES, *VECTORS)]
    for parameter in model.values():
        parameter.data = parameter.data.to(target)
    optimizer.refresh()
    after = state()
    kept = [
        torch.equal(model[name], value.to(target))
        for name, value in zip((*MATRICES, *VECTORS), values, strict=True)
    ]
    give_gradients(model, 1, [*MATRICES, *VECTORS])
    optimizer.step()
    return before, after, kept


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float64])
def test_parameters_of_another_dtype_keep_their_state(target: torch.dtype) -> None:
    """To bf16 it raised KeyError: 'master', and the state was zero from then on."""
    (before, after, kept), *others = run_ranks(3, change_dtype, target)
    assert all(kept)
    assert all(all(other[2]) for other in others)
    assert {name for name in after if not name.endswith("/master")} == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name].to(value.dtype), value), name
    assert any(name.endswith("/master") for name in after) == (target == torch.bfloat16)

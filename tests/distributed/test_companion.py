"""Optimizer classes in AdamW's place, on real gloo ranks: bitwise as in one process."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distmuon import Muon, build_param_groups, checkpoint
from distmuon.checkpoint import CheckpointError
from distmuon.companion import find_companion
from tests.harness import run_ranks

CLASSES = [
    "torch.optim.SGD",
    "torch.optim.SGD(momentum=0.9, nesterov=True)",
    "torch.optim.SGD(momentum=0.9, dampening=0.5)",
    "torch.optim.RMSprop(momentum=0.9, centered=True)",
    "torch.optim.Adagrad",
    "torch.optim.Adam(amsgrad=True)",
    "torch.optim.Adamax",
]
if find_spec("pytorch_optimizer") is not None:
    CLASSES.append("pytorch_optimizer.Lion")
OTHERS = {"table": (61, 13), "bias": (23,), "scale": (1,), "kernel": (5, 3, 2)}


def build(algorithm: str, process_group: Any) -> tuple[dict[str, nn.Parameter], Muon]:
    generator = torch.Generator().manual_seed(3)
    shapes: dict[str, tuple[int, ...]] = {"matrix": (12, 20), **OTHERS}
    model = {name: nn.Parameter(torch.randn(s, generator=generator)) for name, s in shapes.items()}
    groups = [
        {"params": [("matrix", model["matrix"])]},
        {"params": [(n, model[n]) for n in ("table", "kernel")], "algorithm": algorithm},
        {
            "params": [(n, model[n]) for n in ("bias", "scale")],
            "algorithm": algorithm,
            "weight_decay": 0.0,
            "lr": 5e-3,
        },
    ]
    return model, Muon(groups, lr=2e-2, process_group=process_group)


def gradients(step: int) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(step)
    found: dict[str, Tensor | None] = {
        name: torch.randn(shape, generator=generator)
        for name, shape in {"matrix": (12, 20), **OTHERS}.items()
    }
    if step == 1:
        found["bias"] = found["kernel"] = None
    return found


def train(model: dict[str, nn.Parameter], optimizer: Any, steps: range) -> dict[str, Tensor]:
    for step in steps:
        for name, grad in gradients(step).items():
            if name in model:
                model[name].grad = grad
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in model.items()}


def on_ranks(classes: list[str], folder: Path) -> dict[str, dict[str, Tensor]]:
    found = {}
    for number, algorithm in enumerate(classes):
        model, optimizer = build(algorithm, dist.group.WORLD)
        found[algorithm] = train(model, optimizer, range(4))
        checkpoint.save(folder / f"{dist.get_world_size()}-{number}", optimizer)
        share = optimizer.report().state_bytes
        assert share > 0
    return found


def resume(classes: list[str], folder: Path, saved_by: int) -> dict[str, dict[str, Tensor]]:
    found = {}
    for number, algorithm in enumerate(classes):
        model, optimizer = build(algorithm, dist.group.WORLD)
        train(model, optimizer, range(9, 10))
        reached = train(*build(algorithm, None), range(4))
        with torch.no_grad():
            for name, parameter in model.items():
                parameter.copy_(reached[name])
        checkpoint.load(folder / f"{saved_by}-{number}", optimizer)
        found[algorithm] = train(model, optimizer, range(4, 6))
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_i1_classes_are_bitwise_those_of_one_process(world_size: int, tmp_path: Path) -> None:
    outcome = run_ranks(world_size, on_ranks, CLASSES, tmp_path)
    for algorithm in CLASSES:
        expected = train(*build(algorithm, None), range(4))
        for rank, found in enumerate(outcome):
            for name, value in expected.items():
                assert torch.equal(found[algorithm][name], value), (algorithm, name, rank)


def test_i6_classes_go_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    run_ranks(2, on_ranks, CLASSES, tmp_path)
    for number in range(len(CLASSES)):
        checkpoint.reshard(tmp_path / f"2-{number}", tmp_path / f"5-{number}", 5)
    resumed = run_ranks(3, resume, CLASSES, tmp_path, 5)
    for algorithm in CLASSES:
        expected = train(*build(algorithm, None), range(6))
        for name, value in expected.items():
            assert torch.equal(resumed[2][algorithm][name], value), (algorithm, name)


@pytest.mark.parametrize("algorithm", CLASSES)
def test_a_class_steps_as_it_does_alone(algorithm: str) -> None:
    ours = train(*build(algorithm, None), range(4))
    model, _ = build(algorithm, None)
    companion = find_companion(algorithm)
    groups = [
        {"params": [model["table"], model["kernel"]], "lr": 2e-2, "weight_decay": 0.1},
        {"params": [model["bias"], model["scale"]], "lr": 5e-3, "weight_decay": 0.0},
    ]
    alone = train(
        {name: model[name] for name in OTHERS}, companion.cls(groups, **companion.options), range(4)
    )
    for name, value in alone.items():
        torch.testing.assert_close(ours[name], value, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("algorithm", CLASSES[1:])
def test_a_state_dictionary_carries_the_state_of_a_class(algorithm: str) -> None:
    model, optimizer = build(algorithm, None)
    train(model, optimizer, range(3))
    saved = optimizer.state_dict()
    fresh, other = build(algorithm, None)
    with torch.no_grad():
        for name, parameter in fresh.items():
            parameter.copy_(model[name])
    other.load_state_dict(saved)
    assert_equal(train(fresh, other, range(3, 5)), train(model, optimizer, range(3, 5)))


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    for name, value in second.items():
        assert torch.equal(first[name], value), name


def test_another_class_is_refused_at_loading(tmp_path: Path) -> None:
    model, optimizer = build("torch.optim.SGD(momentum=0.9)", None)
    train(model, optimizer, range(1))
    checkpoint.save(tmp_path / "x", optimizer)
    _, other = build("torch.optim.SGD(momentum=0.8)", None)
    with pytest.raises(CheckpointError, match=r"table is torch\.optim\.SGD\(momentum=0\.9\) F32"):
        checkpoint.load(tmp_path / "x", other)
    with pytest.raises(ValueError, match=r"saved with algorithm='torch\.optim\.SGD\(momentum=0\.9"):
        other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        ("torch.optim.Adafactor", "looks at whole tensors"),
        ("torch.optim.NAdam", "keeps 'mu_product' for each tensor"),
        ("torch.optim.Fancy", "There is no Fancy in torch.optim"),
        ("nowhere.at.All", "There is no All in nowhere.at"),
        ("torch.nn.Linear", "Must be a torch.optim.Optimizer"),
        ("torch.optim.SGD(lr=0.1)", r"Set \['lr'\] in the group"),
        ("torch.optim.SGD(0.1)", "its options as keywords"),
        ("torch.optim.SGD(momentum=x)", "its options as keywords"),
        ("torch.optim.SGD(momentun=0.9)", "failed on a small tensor: TypeError"),
        ("sgd", "Must be one of .*elementwise optimizer class"),
    ],
)
def test_what_cannot_be_sharded_is_refused_at_construction(algorithm: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(algorithm, None)


def test_groups_with_a_companion() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 6), nn.Linear(6, 9))
    groups = build_param_groups(model, companion="torch.optim.Adagrad")
    assert {group["algorithm"] for group in groups} == {"muon", "torch.optim.Adagrad"}
    optimizer = Muon(groups)
    model(torch.arange(9)).square().sum().backward()
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    report = optimizer.report()
    assert report.muon_parameters + report.adamw_parameters == sum(
        p.numel() for p in model.parameters()
    )
    assert report.gradient_norms is not None
    assert report.gradient_norms.adamw > 0

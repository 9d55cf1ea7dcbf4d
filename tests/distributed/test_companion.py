"""Optimizer classes in AdamW's place, on real gloo ranks: bitwise as in one process."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distmuon import Muon, build_param_groups, checkpoint
from distmuon.checkpoint import CheckpointError
from distmuon.companion import find_companion, state_shapes
from distmuon.layout import align
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
# Those that look at whole tensors, or keep something for each.
WHOLE = [
    "torch.optim.Adafactor",
    "torch.optim.NAdam",
    "torch.optim.ASGD",
]
if find_spec("pytorch_optimizer") is not None:
    CLASSES.append("pytorch_optimizer.Lion")
    WHOLE += [f"pytorch_optimizer.{name}" for name in ("Lamb", "LARS", "Shampoo")]
CLASSES += WHOLE
FEW = [name for name in WHOLE if not name.endswith(("ASGD", "Lamb", "LARS"))]
OTHERS = {"table": (61, 13), "bias": (23,), "scale": (1,), "kernel": (5, 3, 2)}


def build(
    algorithm: str, process_group: Any, **options: Any
) -> tuple[dict[str, nn.Parameter], Muon]:
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
    return model, Muon(groups, lr=2e-2, process_group=process_group, **options)


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
        if companion.counter == "group" and name in ("bias", "kernel"):
            continue  # it counts the steps of the group, here each parameter has its own count
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
        (f"{__name__}.OneForAll", r"OneForAll keeps \['scale'\] for all tensors together"),
        (f"{__name__}.NormOfAll", "NormOfAll cannot be sharded"),
        (f"{__name__}.Diary", "Diary cannot be sharded"),
        ("torch.optim.Fancy", "There is no Fancy in torch.optim"),
        ("nowhere.at.All", "There is no All in nowhere.at"),
        ("torch.nn.Linear", "Must be a torch.optim.Optimizer"),
        ("torch.optim.SGD(lr=0.1)", r"Set \['lr'\] in the group"),
        ("torch.optim.SGD(0.1)", "its options as keywords"),
        ("torch.optim.SGD(momentum=x)", "its options as keywords"),
        ("torch.optim.SGD(momentun=0.9)", "failed on a small tensor: TypeError"),
        ("sgd", "Must be one of .*an optimizer class"),
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


class Plain(torch.optim.Optimizer):
    """Gradient descent by hand, to be varied."""

    def __init__(self, params: Any, lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "step": 0})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] += 1
            self.before(group)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = self.update(parameter, group)
                    parameter.data.add_(update, alpha=-group["lr"])

    def before(self, group: dict[str, Any]) -> None:
        """What is done once for all tensors."""

    def update(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        assert parameter.grad is not None
        return parameter.grad


class OneForAll(Plain):
    """Keeps a number in the group, as those do that find their own learning rate."""

    def before(self, group: dict[str, Any]) -> None:
        group["scale"] = group.get("scale", 1.0) * 1.5


class NormOfAll(Plain):
    """Divides by the norm of all gradients together."""

    def before(self, group: dict[str, Any]) -> None:
        grads = [p.grad for p in group["params"] if p.grad is not None]
        self.norm = torch.nn.utils.get_total_norm(grads)

    def update(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        assert parameter.grad is not None
        return parameter.grad / self.norm


class Diary(Plain):
    """Remembers past gradients in a list, which no buffer holds."""

    def update(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        assert parameter.grad is not None
        past = self.state[parameter].setdefault("past", [])
        past.append(parameter.grad.clone())
        return torch.stack(past).mean(0)


class InBlocks(Plain):
    """Keeps one scale for each block of 512 elements, from 4,096 on, as 8-bit optimizers do."""

    def update(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        assert parameter.grad is not None
        state, grad = self.state[parameter], parameter.grad
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(grad, 0.1)
        if parameter.numel() >= 4096:
            rows = nn.functional.pad(state["momentum"].reshape(-1), (0, -parameter.numel() % 512))
            state["scales"] = rows.view(-1, 512).abs().amax(1)
            return state["momentum"] / state["scales"].max()
        return state["momentum"]


class Late(Plain):
    """Keeps something that could not be foreseen, from its fourth step on."""

    def update(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        assert parameter.grad is not None
        if group["step"] > 3:
            self.state[parameter]["late"] = parameter.grad.clone()
        return parameter.grad


def test_a_class_is_known_by_what_it_does_also_to_large_tensors() -> None:
    reach = {name: find_companion(name).reach for name in CLASSES}
    assert [name for name in CLASSES if reach[name] == "tensor"] == WHOLE
    assert find_companion(f"{__name__}.InBlocks").reach == "tensor"
    assert state_shapes(f"{__name__}.InBlocks", (64, 70)) == {"momentum": (64, 70), "scales": (9,)}
    assert state_shapes(f"{__name__}.InBlocks", (4,)) == {"momentum": (4,)}
    assert state_shapes("torch.optim.Adafactor", (7,)) == {"variance": (7,)}
    # Nothing of that size is allocated.
    assert state_shapes("torch.optim.Adafactor", (2**20, 2**20)) == {
        "row_var": (2**20, 1),
        "col_var": (1, 2**20),
    }


def test_state_that_nobody_foresaw_stops_training_rather_than_be_lost() -> None:
    model, optimizer = build(f"{__name__}.Late", None)
    train(model, optimizer, range(3))
    with pytest.raises(ValueError, match=r"Late keeps late \[793\].*where nothing was foreseen"):
        train(model, optimizer, range(3, 5))


def placed() -> list[tuple[float, int, list[int]]]:
    found = []
    for algorithm in WHOLE:
        model, optimizer = build(algorithm, dist.group.WORLD)
        train(model, optimizer, range(1))
        report = optimizer.report()
        (spec,) = (b.spec for b in optimizer.open() if b.spec.algorithm == algorithm)
        owners = [spec.layout.span(index) for index in range(len(spec.names))]
        assert all(len(span) == 1 for span in owners), "no tensor is cut"
        kept = sum(places.specs[i].numel for places in spec.kept.values() for i in range(4))
        held = sum(
            segment.numel
            for places in spec.kept.values()
            for segment in places.segments(dist.get_rank())
        )
        found.append((report.whole[algorithm], held, [span[0] for span in owners]))
        assert 0 <= held <= kept
        assert f"{algorithm} keeps tensors whole, " in str(report)
    return found


def test_i3_state_of_whole_tensors_is_there_once_and_the_report_says_how_evenly() -> None:
    ranks = run_ranks(2, placed)
    for index, algorithm in enumerate(WHOLE):
        table = math.prod(OTHERS["table"])
        elements = sum(map(math.prod, OTHERS.values()))
        # Every rank's shard is as long as the one that has the table.
        uneven = ranks[0][index][0]
        assert uneven == pytest.approx(2 * align(table) / elements)
        assert sorted(ranks[0][index][2]) == [0, 1, 1, 1], "by size"
        shapes = [state_shapes(algorithm, shape) for shape in OTHERS.values()]
        kept = sum(math.prod(shape) for each in shapes for shape in each.values())
        assert sum(rank[index][1] for rank in ranks) == kept


def through_torchs_checkpoints(folder: Path, task: str) -> dict[str, dict[str, Tensor]]:
    found = {}
    for number, algorithm in enumerate(FEW):
        model, optimizer = build(algorithm, dist.group.WORLD)
        if task == "save":
            train(model, optimizer, range(3))
            state = optimizer.sharded_state_dict()
            dcp.save({"optimizer": state}, checkpoint_id=folder / str(number))
        else:
            reached = train(*build(algorithm, None), range(3))
            for name, parameter in model.items():
                parameter.data.copy_(reached[name])
            state = optimizer.sharded_state_dict()
            dcp.load({"optimizer": state}, checkpoint_id=folder / str(number))
            optimizer.load_state_dict(state)
            found[algorithm] = train(model, optimizer, range(3, 5))
    return found


def test_i6_torchs_checkpoints_hold_state_of_any_shape(tmp_path: Path) -> None:
    run_ranks(2, through_torchs_checkpoints, tmp_path, "save")
    for found in run_ranks(3, through_torchs_checkpoints, tmp_path, "load"):
        for algorithm, weights in found.items():
            assert_equal(weights, train(*build(algorithm, None), range(5)))


def refreshed() -> dict[str, dict[str, Tensor]]:
    found = {}
    for algorithm in FEW:
        model, optimizer = build(algorithm, dist.group.WORLD)
        train(model, optimizer, range(2))
        extra = nn.Parameter(torch.ones(40, 40))  # other owners from here on
        optimizer.add_param_group({"params": [("extra", extra)], "algorithm": algorithm})
        optimizer.refresh()
        found[algorithm] = train(model, optimizer, range(2, 4))
    return found


def test_state_of_whole_tensors_moves_with_them() -> None:
    for found in run_ranks(3, refreshed):
        for algorithm, weights in found.items():
            assert_equal(weights, train(*build(algorithm, None), range(4)))


class Given(nn.Module):
    """Its gradients are the coefficients it is given."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)

    def forward(self, factors: dict[str, Tensor]) -> Tensor:
        return torch.stack([(p * factors[n]).sum() for n, p in self.named_parameters()]).sum()


def averaged_here(reduce: Any) -> dict[str, dict[str, Tensor]]:
    found = {}
    for algorithm in FEW:
        model, optimizer = build(algorithm, dist.group.WORLD, reduce=reduce)
        module: nn.Module = Given(model)
        wrapped = DistributedDataParallel(module) if reduce == "hook" else module
        optimizer.attach(wrapped)
        for step in (0, 2):
            optimizer.zero_grad()
            wrapped({n: g for n, g in gradients(step).items() if g is not None}).backward()
            optimizer.step()
        found[algorithm] = {name: p.detach().clone() for name, p in model.items()}
    return found


@pytest.mark.parametrize("reduce", ["hook", "owned"])
def test_owners_of_whole_tensors_get_their_averaged_gradients(reduce: str) -> None:
    expected = {}
    for algorithm in FEW:
        model, optimizer = build(algorithm, None)
        for step in (0, 2):
            for name, grad in gradients(step).items():
                model[name].grad = grad
            optimizer.step()
        expected[algorithm] = {name: p.detach() for name, p in model.items()}
    for found in run_ranks(2, averaged_here, reduce):
        for algorithm, weights in found.items():
            assert_equal(weights, expected[algorithm])

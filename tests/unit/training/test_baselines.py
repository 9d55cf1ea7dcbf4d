"""The optimizers to compare with: built from the configuration, sharded, saved and gone on with."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distmuon.training.baselines import BASELINES, OptimizerName
from distmuon.training.config import Config, ConfigError, OptimizerConfig
from distmuon.training.config_file import load_config
from distmuon.training.optimizers import build_optimizer, load_whole_state, whole_state
from distmuon.training.world import World
from tests.harness import run_ranks

HERE = torch.device("cpu")
FOREIGN = [name for name, each in BASELINES.items() if each.package == "pytorch_optimizer"]
INSTALLED = [
    name
    for name, each in BASELINES.items()
    if each.package == "torch.optim" or find_spec("pytorch_optimizer") is not None
]


def configure(name: str) -> OptimizerConfig:
    overrides = [f"optimizer.name={name}", "optimizer.lr=0.02", "optimizer.weight_decay=0.1"]
    config: Config = load_config(None, overrides)
    return config.optimizer


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.LayerNorm(12), nn.Linear(12, 5))


def train(name: str, group: Any, steps: range, saved: dict[str, Tensor] | None = None) -> Any:
    """Steps on fixed data; from what was saved, if anything was."""
    torch.manual_seed(7)  # Sophia draws
    model, config = make_model(), configure(name)
    world = World(
        dist.get_rank() if group else 0, dist.get_world_size() if group else 1, HERE, group
    )
    optimizer = build_optimizer(model, config, world)
    if saved is not None:
        weights = {k.removeprefix("model."): v for k, v in saved.items() if k.startswith("model.")}
        model.load_state_dict(weights)
        load_whole_state(optimizer, model, name, saved)
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step % 2)
        x = torch.randn(8, 6, generator=generator)
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = (model(x) - x[:, :5].sin()).square().mean()
        loss.backward(create_graph=BASELINES[name].gradient == "differentiable")
        optimizer.step()
        losses.append(loss.item())
    state = whole_state(optimizer, model, name)
    weights = {f"model.{key}": value.clone() for key, value in model.state_dict().items()}
    return losses, {**{k: v.clone() for k, v in state.items()}, **weights}


def test_every_name_has_a_class_and_every_class_a_name() -> None:
    assert {"muon", "normuon", *BASELINES} == set(get_args(OptimizerName))


@pytest.mark.parametrize("name", INSTALLED)
@pytest.mark.filterwarnings("ignore:Using backward")
def test_each_learns_and_goes_on_bitwise_from_what_it_saved(name: str) -> None:
    losses, whole = train(name, None, range(12))
    assert losses[-1] < losses[1], losses
    _, half = train(name, None, range(6))
    _, resumed = train(name, None, range(6, 12), half)
    assert resumed.keys() == whole.keys()
    for key, value in whole.items():
        assert torch.equal(resumed[key], value), key


def on_ranks(names: list[str]) -> dict[str, Any]:
    found = {}
    for name in names:
        _, half = train(name, dist.group.WORLD, range(4))
        box = [half]
        dist.broadcast_object_list(box, src=0)
        found[name] = train(name, dist.group.WORLD, range(4, 8), box[0])[1]
    return found


def test_sharded_over_two_ranks_each_is_what_it_is_alone() -> None:
    names = [name for name in INSTALLED if BASELINES[name].gradient == "plain"]
    for rank, found in enumerate(run_ranks(2, on_ranks, names, timeout=120)):
        for name in names:
            _, alone = train(name, None, range(8))
            for key, value in alone.items():
                if rank == 0 or key.startswith("model."):
                    assert torch.equal(found[name][key], value), f"{key} on rank {rank}"


def refuse_sophia() -> str:
    try:
        train("sophia", dist.group.WORLD, range(1))
    except ConfigError as error:
        return str(error)
    return ""


def test_second_derivatives_need_one_process() -> None:
    for message in run_ranks(2, refuse_sophia):
        assert "optimizer.name=sophia takes second derivatives" in message


@pytest.mark.parametrize("name", FOREIGN)
def test_without_the_package_it_says_what_to_install(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(
        ConfigError, match=rf"optimizer.name={name}: .*pip install 'distmuon\[compare\]'"
    ):
        train(name, None, range(1))


def test_the_configuration_reaches_the_class() -> None:
    config = load_config(
        None, ["optimizer.name=nag", "optimizer.momentum=0.7", "optimizer.lr=0.5"]
    ).optimizer
    optimizer = build_optimizer(make_model(), config, World(0, 1, HERE, None))
    assert type(optimizer) is torch.optim.SGD
    weights, others = optimizer.param_groups
    assert (weights["lr"], weights["momentum"], weights["nesterov"]) == (0.5, 0.7, True)
    assert (weights["weight_decay"], others["weight_decay"]) == (0.1, 0.0)


def test_a_value_that_a_class_refuses_is_a_configuration_error() -> None:
    config = load_config(None, ["optimizer.name=nag", "optimizer.momentum=0"]).optimizer
    with pytest.raises(ConfigError, match="optimizer: Nesterov"):
        build_optimizer(make_model(), config, World(0, 1, HERE, None))


def test_missing_state_of_one_parameter_is_named() -> None:
    _, saved = train("adam", None, range(1))
    part = {key: value for key, value in saved.items() if not key.startswith("adam.3.weight")}
    with pytest.raises(ConfigError, match=r"no adam state of 3\.weight"):
        train("adam", None, range(1), part)


@pytest.mark.parametrize("name", ["muon", "normuon"])
@pytest.mark.parametrize("mode", ["match_rms_adamw", "max_dim", "none"])
def test_an_update_scale_scales_the_steps_of_the_matrices_and_no_others(
    name: str, mode: str
) -> None:
    steps = []
    for scale in (1.0, 0.25):
        model = make_model()
        keys = (f"name={name}", f"adjust_lr_fn={mode}", f"update_scale={scale}", "weight_decay=0")
        config = load_config(None, [f"optimizer.{key}" for key in keys]).optimizer
        optimizer = build_optimizer(model, config, World(0, 1, HERE, None))
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.data.zero_()
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        steps.append({key: value.clone() for key, value in model.state_dict().items()})
    whole, quarter = steps
    for key, step in whole.items():
        scale = 0.25 if key in ("0.weight", "3.weight") else 1.0
        assert step.abs().sum() > 0
        torch.testing.assert_close(quarter[key], step * scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.update_scale=0"], "update_scale=0.0. Must be > 0"),
        (
            ["optimizer.adjust_lr_fn=update_rms", "optimizer.update_scale=2"],
            "update_scale=2.0. Must be 1 with name=muon and adjust_lr_fn=update_rms",
        ),
        (["optimizer.name=adamw", "optimizer.update_scale=2"], "Must be 1 with name=adamw"),
    ],
)
def test_an_update_scale_that_would_do_nothing_is_refused(
    overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    assert message in str(caught.value)

"""Steps of one process on CUDA, without a GPU: no devices are mixed, and the host waits nowhere.

The tensors are fake, so no value is looked at; `make gpu` does where there is a GPU. The kernels
are left out: these are the steps of a GPU without Triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distmuon import Muon, recipes
from distmuon.desync import check_desync
from distmuon.gradients import _by_size
from distmuon.qk_clip import AttentionLayer, HeadRows, QKClip
from tests.gpu.fake_cuda import Host, fake_cuda

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: test_gpu.py")

CUDA = torch.device("cuda:0")
STEPS = 3
# An elongated matrix, a square, a tall one, a stack, a kernel, and what AdamW takes.
SHAPES: dict[str, tuple[int, ...]] = {
    "wide": (16, 48),
    "square": (24, 24),
    "tall": (40, 16),
    "stack": (3, 16, 8),
    "kernel": (8, 4, 3, 3),
    "bias": (33,),
    "gain": (16,),
}
FEW = "wide", "bias"
SOME = "wide", "tall", "bias"


@dataclass(frozen=True)
class Case:
    """How an optimizer is built.

    Attributes:
        options: Of the optimizer.
        dtype: Of the parameters.
        matrices: Options of the group with matrices.
        rest: Algorithms of the other parameters, each as often as there are.
        names: Which parameters there are.
    """

    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    matrices: dict[str, Any] = field(default_factory=dict)
    rest: str = "adamw"
    names: tuple[str, ...] = SOME


def with_class(algorithm: str) -> Case:
    return Case(rest=algorithm, names=FEW)


def of_recipe(recipe: recipes.Recipe, dtype: torch.dtype = torch.float32) -> Case:
    return Case(recipe.optimizer, dtype, {"algorithm": recipe.groups.get("algorithm", "muon")})


CASES = {
    "plain": Case(names=tuple(SHAPES)),
    "bfloat16": Case(dtype=torch.bfloat16, names=tuple(SHAPES)),
    "stochastic rounding": Case({"stochastic_rounding": 3}, torch.bfloat16),
    "normuon": Case(matrices={"algorithm": "normuon"}, names=tuple(SHAPES)),
    "normuon in float16": Case(dtype=torch.float16, matrices={"algorithm": "normuon"}, names=FEW),
    "float64": Case(dtype=torch.float64, names=FEW),
    "update rms": Case({"adjust_lr_fn": "update_rms", "max_update_rms": 0.1}),
    "cautious": Case({"decay_rule": "cautious"}, names=FEW),
    "in_out": Case(matrices={"axes": "in_out"}),
    "blocks": Case({"max_update_rms": 0.1}, matrices={"blocks": 2}),
    "normuon blocks": Case(matrices={"algorithm": "normuon", "blocks": 2}, names=FEW),
    "float32 products": Case({"ns_dtype": "float32"}),
    "halley": Case({"ns_dtype": "float32", "ns_coefficients": "halley"}),
    "published in parts": Case({"publish_bytes": 1024, "wave_bytes": 512, "wire": "bfloat16"}),
    "sgd": with_class("torch.optim.SGD(momentum=0.9)"),
    "adam": with_class("torch.optim.Adam(amsgrad=True)"),
    "fused adamw": with_class("torch.optim.AdamW(fused=True)"),
    "moonlight": of_recipe(recipes.moonlight()),
    "kimi_k2": of_recipe(recipes.kimi_k2(), torch.bfloat16),
    "keller": of_recipe(recipes.keller()),
    "normuon's": of_recipe(recipes.normuon()),
}


@pytest.fixture(name="host")
def _host() -> Iterator[Host]:
    with fake_cuda() as host:
        yield host


def build(case: Case, **options: Any) -> tuple[dict[str, nn.Parameter], Muon]:
    parameters = {
        name: nn.Parameter(torch.zeros(SHAPES[name], dtype=case.dtype, device=CUDA))
        for name in case.names
    }
    matrices, kernels, rest = [], [], []
    for name, parameter in parameters.items():
        place = {1: rest, 4: kernels}.get(parameter.dim(), matrices)
        place.append((name, parameter))
    groups = [
        {"params": matrices, **case.matrices},
        {"params": kernels, **case.matrices, "axes": "conv"},
        {"params": rest, "algorithm": case.rest},
    ]
    chosen = {"lr": 1e-3, "nonfinite": "propagate", **case.options, **options}
    return parameters, Muon([group for group in groups if group["params"]], **chosen)


def step(parameters: dict[str, nn.Parameter], optimizer: Muon) -> None:
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


def waits_of_a_step(host: Host, parameters: dict[str, nn.Parameter], optimizer: Muon) -> int:
    """Of the third; the first two allocate, and fill in state."""
    for _ in range(STEPS):
        host.waits.clear()
        step(parameters, optimizer)
    return host.waits.total()


def check_devices(optimizer: Muon, dtype: torch.dtype) -> None:
    """Parameters in their dtype, and state in a wide one, all on the device."""
    state = optimizer.state_dict()["state"]
    kept = [v for each in state.values() for v in each.values() if isinstance(v, Tensor)]
    assert len(kept) >= len(optimizer.parameter_names)
    wide = torch.promote_types(dtype, torch.float32)
    assert {(each.device, each.dtype) for each in kept} == {(CUDA, wide)}
    found = {(each.device, each.dtype) for each in optimizer.parameter_names}
    assert found == {(CUDA, dtype)}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_step_stays_on_the_device_and_waits_nowhere(host: Host, case: Case) -> None:
    parameters, optimizer = build(case)
    assert waits_of_a_step(host, parameters, optimizer) == 0
    check_devices(optimizer, case.dtype)
    for name, parameter in parameters.items():
        assert parameter.shape == SHAPES[name]


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_looking_for_what_is_not_finite_waits_once_for_each_buffer(
    host: Host, nonfinite: str
) -> None:
    parameters, optimizer = build(Case(), nonfinite=nonfinite)
    assert waits_of_a_step(host, parameters, optimizer) == len(optimizer.open()) == 2


def test_a_class_may_wait_by_itself(host: Host) -> None:
    # torch's Adafactor reads a norm; two for each tensor.
    parameters, optimizer = build(with_class("torch.optim.Adafactor"))
    assert waits_of_a_step(host, parameters, optimizer) == 2
    check_devices(optimizer, torch.float32)


def test_qk_clip_waits_once(host: Host) -> None:
    heads = (HeadRows("wide", (0, 4), 4),), (HeadRows("wide", (8, 12), 4),)
    clip = QKClip([AttentionLayer("attention", *heads)], threshold=0.5)
    parameters, optimizer = build(Case(names=FEW), qk_clip=clip)
    for _ in range(STEPS):
        clip.observe("attention", torch.zeros(2, device=CUDA))
        host.waits.clear()
        step(parameters, optimizer)
    assert host.waits.total() == 1
    assert clip.stats()["clipped_heads"] == 2, "fake values read as 1"
    check_devices(optimizer, torch.float32)


def test_measuring_waits_and_stays_on_the_device(host: Host) -> None:
    parameters, optimizer = build(Case(names=FEW), diagnostics_every=1, profile="phases")
    step(parameters, optimizer)
    assert optimizer.clip_grad_norm_(1.0).device == CUDA
    step(parameters, optimizer)
    assert optimizer.report().diagnostics is not None
    check_devices(optimizer, torch.float32)


def test_state_is_saved_and_loaded_on_the_device(host: Host) -> None:
    parameters, optimizer = build(Case(dtype=torch.bfloat16))
    step(parameters, optimizer)
    saved = optimizer.state_dict()
    for early in (True, False):
        others, restored = build(Case(dtype=torch.bfloat16))
        if not early:
            step(others, restored)
        restored.load_state_dict(saved)
        assert waits_of_a_step(host, others, restored) == 0
        check_devices(restored, torch.bfloat16)


def test_parameters_on_two_devices_share_an_optimizer(host: Host) -> None:
    # With a program that never said which of its GPUs is the current one.
    parameters, optimizer = build(Case(names=SOME), diagnostics_every=1)
    on_host = nn.Parameter(torch.zeros(8, 24))
    optimizer.add_param_group({"params": [("embedding", on_host)], "algorithm": "adamw"})
    other = nn.Parameter(torch.zeros(8, 24, device="cuda:1"))
    optimizer.add_param_group({"params": [("other", other)]})
    parameters |= {"embedding": on_host, "other": other}
    for _ in range(STEPS):
        step(parameters, optimizer)
        optimizer.clip_grad_norm_(1.0)
    assert [str(p.device) for p in (on_host, other)] == ["cpu", "cuda:1"]
    check_desync(optimizer.communicator, optimizer.open(), STEPS)
    for members in _by_size(list(parameters.values())):
        assert len({each.device for each in members}) == 1, "what is sent at once is of one device"

"""Loss scaling over ranks: one verdict, one scale, and the gradients that are used are unscaled."""

from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.nn.parallel import DistributedDataParallel

from distmuon import GradScaler, Muon
from tests.harness import run_ranks

Reduce = Literal["ddp", "hook", "owned"]
Kind = Literal["ours", "torch", "sharded", "none"]
SHAPES = {"wide": (23, 50), "tall": (30, 7), "bias": (19,)}
INFINITE = 3  # the step in which rank 1 overflows
SCALE = 2.0**10


class Weighted(nn.Module):
    """A loss whose gradient of each parameter is the tensor it is called with, through float16."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        shapes = SHAPES.items()
        self.weights = nn.ParameterDict(
            {n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in shapes}
        )

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        halves = [(self.weights[n].half() * g.half()).float().sum() for n, g in gradients.items()]
        return torch.stack(halves).sum()


def gradients(step: int, rank: int) -> dict[str, Tensor]:
    """Multiples of 3 and small: exact in float16 when scaled, and in DDP's division by 3."""
    generator = torch.Generator().manual_seed(step)
    draw = {n: torch.randint(-4, 5, s, generator=generator) for n, s in SHAPES.items()}
    return {name: 3.0 * (g + rank) for name, g in draw.items()}


def make(reduce: Reduce) -> tuple[Weighted, nn.Module, Muon]:
    model = Weighted()
    named = [(name, model.weights[name]) for name in SHAPES]
    groups: list[dict[str, Any]] = [
        {"params": named[:2]},
        {"params": named[2:], "algorithm": "adamw"},
    ]
    optimizer = Muon(groups, lr=1e-2, process_group=dist.group.WORLD, reduce=reduce)
    wrapped = model if reduce == "owned" else DistributedDataParallel(model)
    if reduce != "ddp":
        optimizer.attach(wrapped)
    return model, wrapped, optimizer


def weights(model: Weighted) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.weights.items()}


def make_scaler(kind: Kind) -> Any:
    options: dict[str, Any] = {"init_scale": SCALE, "growth_interval": 2}
    if kind == "sharded":
        return ShardedGradScaler("cpu", process_group=dist.group.WORLD, **options)
    # Without a scaler the infinite step is left out: what a skipped step has to come to.
    options["enabled"] = kind != "none"
    return (torch.amp.GradScaler if kind == "torch" else GradScaler)("cpu", **options)


def train(
    reduce: Reduce, kind: Kind, clip: bool
) -> tuple[dict[str, Tensor], list[float], list[float], int]:
    model, wrapped, optimizer = make(reduce)
    scaler = make_scaler(kind)
    scales, norms = [], []
    for step in range(6):
        given = gradients(step, dist.get_rank())
        if step == INFINITE and kind == "none":
            continue
        if step == INFINITE and dist.get_rank() == 1:
            given["wide"][22, 49] = float("inf")
        optimizer.zero_grad()
        scaler.scale(wrapped(given)).backward()
        if clip:
            scaler.unscale_(optimizer)
            norms.append(float(optimizer.clip_grad_norm_(50.0)))
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    if kind != "none" and clip:
        del norms[INFINITE]
    return weights(model), scales, norms, optimizer.report().steps


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(
    ("reduce", "kind"),
    [
        ("hook", "ours"),
        ("owned", "ours"),
        ("ddp", "ours"),
        ("ddp", "torch"),
        ("ddp", "sharded"),
    ],
)
def test_scaled_training_is_that_without_a_scaler_and_scales_stay_equal(
    reduce: Reduce, kind: Kind, clip: bool
) -> None:
    expected, _, norms, _ = run_ranks(3, train, reduce, "none", clip)[0]
    # Twice as large after two good steps, half as large after the overflow, in which nobody steps.
    scales = [SCALE, 2 * SCALE, 2 * SCALE, SCALE, SCALE, 2 * SCALE]
    for rank, outcome in enumerate(run_ranks(3, train, reduce, kind, clip)):
        assert outcome[1] == scales, f"rank {rank}"
        assert outcome[2] == norms
        assert outcome[3] == 5
        for name, value in expected.items():
            assert torch.equal(outcome[0][name], value), f"{name} on rank {rank}"


def use_torchs(reduce: Reduce, kind: Kind, unscale: bool) -> str:
    _, wrapped, optimizer = make(reduce)
    scaler = make_scaler(kind)
    scaler.scale(wrapped(gradients(0, dist.get_rank()))).backward()
    try:
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
    except RuntimeError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("kind", ["torch", "sharded"])
@pytest.mark.parametrize("reduce", ["hook", "owned"])
def test_a_scaler_that_sees_other_gradients_is_refused(
    reduce: Reduce, kind: Kind, unscale: bool
) -> None:
    for said in run_ranks(2, use_torchs, reduce, kind, unscale):
        assert "Use distmuon.GradScaler" in said

"""Several process groups: replicas of shards, and experts that live on some ranks only."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distmuon import Muon
from tests.harness import run_ranks

STEPS, RANKS, HOSTS = 3, 4, 2
DENSE = {"q": (24, 16), "up": (48, 16), "norm": (16,)}
EXPERT = {"w1": (20, 16), "w2": (16, 20)}


def parameters(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in shapes.items()}


def gradient(name: str, shape: tuple[int, ...], step: int, member: int) -> Tensor:
    """What one rank's data gives, a few bits long: averages are exact in any order."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * member + len(name))
    return torch.randint(-8, 9, shape, generator=generator).float()


def optimizer_of(model: dict[str, nn.Parameter], group: dist.ProcessGroup | None) -> Muon:
    named = list(model.items())
    groups = [{"params": [(n, p) for n, p in named if p.dim() == 2]}]
    rest = [(n, p) for n, p in named if p.dim() < 2]
    if rest:
        groups.append({"params": rest, "algorithm": "adamw"})
    return Muon(groups, lr=0.1, weight_decay=0.1, process_group=group)


def average(model: dict[str, nn.Parameter], group: dist.ProcessGroup, step: int) -> None:
    """As DistributedDataParallel or a framework's own expert groups do it."""
    for name, parameter in model.items():
        grad = gradient(name, tuple(parameter.shape), step, dist.get_rank())
        dist.all_reduce(grad, group=group)
        parameter.grad = grad / group.size()


def alone(shapes: dict[str, tuple[int, ...]], seed: int, members: list[int]) -> dict[str, Tensor]:
    """One process with the same averages."""
    model = parameters(shapes, seed)
    optimizer = optimizer_of(model, None)
    for step in range(STEPS):
        for name, parameter in model.items():
            shape = tuple(parameter.shape)
            total = sum((gradient(name, shape, step, m) for m in members), torch.zeros(shape))
            parameter.grad = total / len(members)
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in model.items()}


def with_experts() -> tuple[dict[str, Tensor], dict[str, Tensor], list[int]]:
    """Ranks 0 and 2 hold one expert, 1 and 3 another; everything else is on all four."""
    groups = [dist.new_group([half, half + HOSTS]) for half in range(HOSTS)]
    half = dist.get_rank() % HOSTS
    everyone, mine = dist.group.WORLD, groups[half]
    assert everyone is not None
    dense, expert = parameters(DENSE, 0), parameters(EXPERT, 1 + half)
    optimizers = [optimizer_of(dense, everyone), optimizer_of(expert, mine)]
    for step in range(STEPS):
        average(dense, everyone, step)
        average(expert, mine, step)
        for optimizer in optimizers:
            optimizer.step()
    state = [optimizer.report().state_bytes for optimizer in optimizers]
    return (
        {name: parameter.detach() for name, parameter in dense.items()},
        {name: parameter.detach() for name, parameter in expert.items()},
        state,
    )


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_experts_have_an_optimizer_over_the_ranks_that_hold_them() -> None:
    outcome = run_ranks(RANKS, with_experts)
    dense = alone(DENSE, 0, list(range(RANKS)))
    for rank, (shared, expert, state) in enumerate(outcome):
        half = rank % HOSTS
        assert_same(shared, dense)
        assert_same(expert, alone(EXPERT, 1 + half, [half, half + HOSTS]))
        # fp32 momentum over two ranks.
        assert state[1] == 4 * sum(map(math.prod, EXPERT.values())) // HOSTS


def clipped_together(limit: float) -> tuple[float, list[float]]:
    """The recipe of docs/sharding.md: one norm over dense parameters and all experts."""
    groups = [dist.new_group([half, half + HOSTS]) for half in range(HOSTS)]
    across = [dist.new_group([0, 1]), dist.new_group([2, 3])][dist.get_rank() // HOSTS]
    half = dist.get_rank() % HOSTS
    everyone, mine = dist.group.WORLD, groups[half]
    assert everyone is not None
    dense, expert = parameters(DENSE, 0), parameters(EXPERT, 1 + half)
    optimizers = [optimizer_of(dense, everyone), optimizer_of(expert, mine)]
    average(dense, everyone, 0)
    average(expert, mine, 0)
    norms = [optimizer.clip_grad_norm_(math.inf) for optimizer in optimizers]
    of_experts = norms[1] ** 2
    dist.all_reduce(of_experts, group=across)
    total = (norms[0] ** 2 + of_experts).sqrt()
    if total > limit:
        for optimizer, norm in zip(optimizers, norms, strict=True):
            optimizer.clip_grad_norm_(float(norm * limit / total))
    after = [p.grad.norm() for p in [*dense.values(), *expert.values()] if p.grad is not None]
    return float(total), [float(norm) for norm in after]


def test_gradients_of_dense_parameters_and_experts_are_clipped_together() -> None:
    outcome = run_ranks(RANKS, clipped_together, 1.0)
    squares = 0.0
    for half in range(HOSTS):
        experts = outcome[half][1][len(DENSE) :]
        squares += sum(norm**2 for norm in experts)
    squares += sum(norm**2 for norm in outcome[0][1][: len(DENSE)])
    assert math.sqrt(squares) == pytest.approx(1.0, rel=1e-4)
    assert len({total for total, _ in outcome}) == 1

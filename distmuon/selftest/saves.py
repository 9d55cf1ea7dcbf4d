"""Checks that training goes on from a checkpoint as if it had never stopped."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from distmuon import checkpoint
from distmuon.selftest.lab import Lab, NotHere, require_same
from distmuon.selftest.problem import Problem


def check_resume(lab: Lab) -> str:
    """Save, load into a new model on the same ranks, go on.

    Args:
        lab: The ranks.

    Returns:
        What was compared.

    Raises:
        Mismatch: if a parameter differs from the run that never stopped.
        NotHere: without safetensors or a common folder.
    """
    path = _place(lab) / "resume"
    whole = Problem(lab.device, lab.group, dtype=torch.bfloat16)
    _save(whole, path)
    expected = whole.train(range(2, 4))
    found = _go_on(lab, lab.group, path, torch.bfloat16)
    require_same(lab, found, expected, "the run that never stopped")
    return "2 steps, save, load into other weights, 2 steps: bitwise as without a stop (bf16)"


def check_reshard(lab: Lab) -> str:
    """Save on all ranks, go on with one less, save there, go on with all.

    Args:
        lab: The ranks.

    Returns:
        What was compared.

    Raises:
        Mismatch: if a parameter differs from one process.
        NotHere: on a single rank, without safetensors or a common folder.
    """
    lab.require_several("there is no smaller world")
    folder = _place(lab)
    expected = Problem(lab.device, None).train(range(5))
    _save(Problem(lab.device, lab.group), folder / "all")
    # Both are waited for by all: the last rank has nothing to do with fewer ranks.
    if lab.smaller is not None:
        problem = Problem(lab.device, lab.smaller, seed=7)
        checkpoint.load(folder / "all", problem.optimizer, model=problem.model)
        problem.train([2])
        checkpoint.save(folder / "fewer", problem.optimizer, model=problem.model)
    dist.barrier(lab.group)
    found = _go_on(lab, lab.group, folder / "fewer", torch.float32, steps=range(3, 5))
    require_same(lab, found, expected, "one process")
    size = lab.world_size
    return f"saved on {size} ranks, on with {size - 1}, on with {size}: as one process"


def _place(lab: Lab) -> Path:
    if find_spec("safetensors") is None:
        raise NotHere("needs safetensors: pip install 'distmuon[checkpoint]'")
    return lab.require_folder()


def _save(problem: Problem, path: Path) -> None:
    problem.train(range(2))
    checkpoint.save(path, problem.optimizer, model=problem.model)


def _go_on(
    lab: Lab,
    group: dist.ProcessGroup,
    path: Path,
    dtype: torch.dtype,
    steps: range = range(2, 4),
) -> dict[str, Tensor]:
    """Load into a model of other weights, and make steps."""
    problem = Problem(lab.device, group, dtype=dtype, seed=8)
    checkpoint.load(path, problem.optimizer, model=problem.model)
    if lab.sabotage and lab.is_last:
        momentum = problem.optimizer.open()[-1].shard.state["momentum_buffer"]
        momentum[: momentum.numel() // 2] *= -1
    return problem.train(steps)

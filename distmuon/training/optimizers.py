"""The optimizer and the learning-rate schedule that a configuration asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from distmuon import Muon, build_param_groups
from distmuon.training.config import ConfigError, OptimizerConfig, TrainConfig
from distmuon.training.world import World


def build_optimizer(model: nn.Module, config: OptimizerConfig, world: World) -> Optimizer:
    """Build Muon, or AdamW; either keeps 1/N of its state on each of N ranks (ZeRO-1).

    Both decay the same parameters: those that `build_param_groups` says.

    Args:
        model: the bare model, not its DDP wrapper, so that names are the model's own.
        config: the section `optimizer`.
        world: with its process group, or without for one process.

    Raises:
        ConfigError: for a value that the optimizer refuses.
    """
    groups = build_param_groups(model, weight_decay=config.weight_decay)
    if config.name == "adamw":
        return _build_adamw(groups, config, world)
    try:
        return Muon(
            groups,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            nesterov=config.nesterov,
            ns_coefficients=config.ns_coefficients,
            eps=config.eps,
            ns_steps=config.ns_steps,
            adjust_lr_fn=config.adjust_lr_fn,
            betas=config.betas,
            process_group=world.group,
        )
    except ValueError as error:
        raise ConfigError(f"optimizer: {error}") from error


def _build_adamw(
    groups: Sequence[Mapping[str, Any]], config: OptimizerConfig, world: World
) -> Optimizer:
    """Give every parameter to torch's AdamW, with the weight decay it has under Muon."""
    plain = [
        {
            "params": [parameter for _, parameter in group["params"]],
            "weight_decay": group["weight_decay"],
        }
        for group in groups
    ]
    if world.group is None:
        return AdamW(plain, lr=config.lr, betas=config.betas, eps=config.eps)
    return ZeroRedundancyOptimizer(
        plain,
        AdamW,
        process_group=world.group,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
    )


def build_schedule(optimizer: Optimizer, config: TrainConfig) -> LambdaLR:
    """Scale every group's lr: linear warm-up, then a cosine down to `final_lr`."""
    return LambdaLR(optimizer, partial(lr_scale, config=config))


def lr_scale(step: int, config: TrainConfig) -> float:
    """Compute the learning rate of a step as a share of the peak.

    Args:
        step: from 0.
        config: the section `train`.

    Returns:
        Rises from 1/w to 1 over the w warm-up steps, then falls along half a cosine to
        `final_lr`, which the last step has.
    """
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = min((step + 1 - warmup) / max(config.steps - warmup, 1), 1.0)
    return config.final_lr + (1.0 - config.final_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def state_bytes(optimizer: Optimizer) -> int:
    """Count the bytes of the tensors in a torch optimizer's state on this rank."""
    local = optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer
    return sum(
        value.numel() * value.element_size()
        for state in local.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )

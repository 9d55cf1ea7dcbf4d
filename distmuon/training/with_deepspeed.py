"""The run inside DeepSpeed: its ZeRO-1 averages, clips and shards, distmuon's adapter updates."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from distmuon.deepspeed import from_model
from distmuon.training.config import Config, ConfigError
from distmuon.training.optimizers import muon_options
from distmuon.training.world import World


@dataclass(frozen=True, slots=True)
class DeepSpeedEngine:
    """DeepSpeed's engine, which counts micro-batches and clips on its own.

    Attributes:
        wrapped: the engine, a module.
        schedule: of the learning rates.
    """

    wrapped: Any
    schedule: LambdaLR

    def micro_batch(self, when: Literal["more", "last"]) -> AbstractContextManager[None]:
        """DeepSpeed counts the passes itself."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """DeepSpeed divides by the number of passes; every pass but the last ends with its step."""
        self.wrapped.backward(loss)
        if not self.wrapped.is_gradient_accumulation_boundary():
            self.wrapped.step()

    def clip(self, max_norm: float) -> Tensor:
        """Measure only: DeepSpeed clips in its step, as its configuration says."""
        norm = float(self.wrapped.optimizer.scaled_global_norm())
        # It reports what is not finite as -1.
        return torch.tensor(norm if norm >= 0.0 else math.inf)

    def update(self) -> None:
        """Clip and step."""
        self.wrapped.step()

    def advance(self) -> None:
        """Step the schedule."""
        self.schedule.step()

    def zero_grad(self) -> None:
        """DeepSpeed has freed the gradients."""


def build_zero_optimizer(model: nn.Module, config: Config, world: World) -> Optimizer:
    """Build the optimizer that DeepSpeed is to call.

    Args:
        model: on its device.
        config: of the run.
        world: this rank.

    Raises:
        ConfigError: for settings that only the other engines have, or without DeepSpeed.
    """
    _refuse(config, world)
    try:
        return from_model(model, config=_entries(config, world), **muon_options(config.optimizer))
    except ImportError as error:
        raise ConfigError(f"run.engine=deepspeed: {error}", key="run.engine") from error
    except ValueError as error:
        raise ConfigError(f"optimizer: {error}") from error


def start_deepspeed(
    config: Config,
    world: World,
    model: nn.Module,
    optimizer: Optimizer,
    schedule: Callable[[Optimizer], LambdaLR],
) -> tuple[DeepSpeedEngine, LambdaLR]:
    """Let DeepSpeed partition the model's parameters.

    Args:
        config: of the run.
        world: this rank.
        model: on its device.
        optimizer: from `build_zero_optimizer`.
        schedule: builds the schedule.

    Returns:
        The engine, and the schedule itself.
    """
    import deepspeed

    if world.device.type == "cpu":
        # An all-reduce for inference, which it would compile for two minutes at its first start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=_entries(config, world)
    )
    scheduled = schedule(optimizer)
    return DeepSpeedEngine(engine, scheduled), scheduled


def _entries(config: Config, world: World) -> dict[str, Any]:
    train = config.train
    return {
        "train_micro_batch_size_per_gpu": train.batch // (world.size * train.accumulation),
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": train.clip,
        "zero_allow_untested_optimizer": True,
        # Gradients go to their owners, not to all: two thirds of the bytes.
        "zero_optimization": {"stage": 1, "use_multi_rank_bucket_allreduce": False},
    }


def _refuse(config: Config, world: World) -> None:
    needs = {
        "two ranks or more: start with torchrun or the deepspeed launcher": world.group is not None,
        "optimizer.name=muon": config.optimizer.name == "muon",
        "train.precision=float32": config.train.precision == "float32",
        "train.diagnostics_every=0": config.train.diagnostics_every == 0,
    }
    for need, met in needs.items():
        if not met:
            raise ConfigError(f"run.engine=deepspeed needs {need}.", key="run.engine")

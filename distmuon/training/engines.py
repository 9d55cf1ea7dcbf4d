"""Who runs forward, backward, clipping and the update: plain PyTorch, Accelerate or DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, Protocol

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from distmuon.training.baselines import BASELINES, OURS
from distmuon.training.config import Config, ConfigError
from distmuon.training.with_deepspeed import start_deepspeed
from distmuon.training.world import World


class Engine(Protocol):
    """What differs between frameworks in a step; the loop, data and files are the same."""

    @property
    def wrapped(self) -> nn.Module:
        """The model that averages gradients over the ranks in backward."""

    def micro_batch(self, when: Literal["more", "last"]) -> AbstractContextManager[None]:
        """The context of one forward and backward pass; gradients are averaged in the last."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of one micro-batch's mean loss, as its part of the step's."""

    def clip(self, max_norm: float) -> Tensor:
        """Scale the averaged gradients to at most this norm; return the norm before."""

    def update(self) -> None:
        """Update the weights."""

    def advance(self) -> None:
        """Let the learning rates go on by one step."""

    def zero_grad(self) -> None:
        """Forget the gradients."""


@dataclass(frozen=True, slots=True)
class NativeEngine:
    """DistributedDataParallel, or the bare model in one process.

    Attributes:
        wrapped: the model in its wrapper.
        optimizer: Muon or another.
        schedule: of its learning rates.
        passes: micro-batches of a step.
        gradient: whether the optimizer differentiates the gradient.
    """

    wrapped: nn.Module
    optimizer: Optimizer
    schedule: LambdaLR
    passes: int
    gradient: Literal["plain", "differentiable"] = "plain"

    def micro_batch(self, when: Literal["more", "last"]) -> AbstractContextManager[None]:
        """Let DDP average gradients only in the last backward pass of a step."""
        if when == "more" and isinstance(self.wrapped, DistributedDataParallel):
            waiting: AbstractContextManager[None] = self.wrapped.no_sync()
            return waiting
        if self.gradient == "differentiable":
            # The fused kernels of attention have no second derivative.
            plain: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
            return plain
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient."""
        twice = self.gradient == "differentiable"
        (loss / self.passes).backward(create_graph=twice)  # type: ignore[no-untyped-call]

    def clip(self, max_norm: float) -> Tensor:
        """Clip what DDP has averaged."""
        return nn.utils.clip_grad_norm_(self.wrapped.parameters(), max_norm)

    def update(self) -> None:
        """Step."""
        self.optimizer.step()

    def advance(self) -> None:
        """Step the schedule."""
        self.schedule.step()

    def zero_grad(self) -> None:
        """Free the gradients."""
        self.optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True, slots=True)
class AccelerateEngine:
    """Accelerate, used as its documentation shows.

    Attributes:
        accelerator: it.
        wrapped: what it made of the model.
        optimizer: what it made of Muon.
        schedule: what it made of the schedule.
    """

    accelerator: Any
    wrapped: nn.Module
    optimizer: Any
    schedule: Any

    def micro_batch(self, when: Literal["more", "last"]) -> AbstractContextManager[None]:
        """Accelerate counts the passes itself."""
        context: AbstractContextManager[None] = self.accelerator.accumulate(self.wrapped)
        return context

    def backward(self, loss: Tensor) -> None:
        """Accelerate divides by the number of passes."""
        self.accelerator.backward(loss)

    def clip(self, max_norm: float) -> Tensor:
        """Clip as `attach` has arranged it."""
        norm: Tensor = self.accelerator.clip_grad_norm_(self.wrapped.parameters(), max_norm)
        return norm

    def update(self) -> None:
        """Step."""
        self.optimizer.step()

    def advance(self) -> None:
        """Step the schedule, once per update: see `step_scheduler_with_optimizer` below."""
        self.schedule.step()

    def zero_grad(self) -> None:
        """Free the gradients."""
        self.optimizer.zero_grad()


def build_engine(
    config: Config,
    world: World,
    model: nn.Module,
    optimizer: Optimizer,
    schedule: Callable[[Optimizer], LambdaLR],
) -> tuple[Engine, LambdaLR]:
    """Wrap the model, and prepare whatever the engine wants prepared.

    Args:
        config: of the run; `run.engine` chooses.
        world: this rank.
        model: on its device.
        optimizer: over the model's parameters.
        schedule: builds the schedule.

    Returns:
        The engine, and the schedule itself.

    Raises:
        ConfigError: if Accelerate is not installed, or the optimizer cannot be prepared.
    """
    if config.run.engine == "native":
        scheduled = schedule(optimizer)
        wrapped = _wrap(model, world)
        baseline, passes = BASELINES.get(config.optimizer.name), config.train.accumulation
        gradient = baseline.gradient if baseline is not None else "plain"
        return NativeEngine(wrapped, optimizer, scheduled, passes, gradient), scheduled
    if config.run.engine == "deepspeed":
        return start_deepspeed(config, world, model, optimizer, schedule)
    if find_spec("accelerate") is None:
        raise ConfigError(
            "run.engine=accelerate needs Accelerate: pip install 'distmuon[accelerate]'.",
            key="run.engine",
            entry="missing-package",
        )
    if config.optimizer.name not in OURS:
        raise ConfigError(
            "run.engine=accelerate is for optimizer.name=muon or normuon: the "
            "ZeroRedundancyOptimizer of the others cannot be prepared by Accelerate.",
            key="run.engine",
        )
    return _prepare(config, world, model, optimizer, schedule)


def _wrap(model: nn.Module, world: World) -> nn.Module:
    if world.group is None:
        return model
    devices = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, process_group=world.group)


def _prepare(
    config: Config,
    world: World,
    model: nn.Module,
    optimizer: Optimizer,
    schedule: Callable[[Optimizer], LambdaLR],
) -> tuple[Engine, LambdaLR]:
    from accelerate import Accelerator

    from distmuon.adapters.accelerate import attach

    # Not num_processes steps of the schedule for each of the optimizer, which is Accelerate's
    # default: the configuration counts steps.
    accelerator = Accelerator(
        cpu=world.device.type == "cpu",
        gradient_accumulation_steps=config.train.accumulation,
        step_scheduler_with_optimizer=False,
    )
    if accelerator.num_processes != world.size:
        raise ConfigError(
            f"Accelerate sees {accelerator.num_processes} processes, torch.distributed "
            f"{world.size}. Start with torchrun, or with accelerate launch --multi-gpu or --cpu "
            "(configs/accelerate).",
            key="run.engine",
            entry="launch",
        )
    scheduled = schedule(optimizer)
    prepared = accelerator.prepare(model, optimizer, scheduled)
    attach(accelerator, prepared[1], prepared[0])
    return AccelerateEngine(accelerator, *prepared), scheduled

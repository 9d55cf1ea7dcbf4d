"""One training step, and one validation, on this rank's part of the work."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from distmuon import Muon
from distmuon.diagnostics import Diagnostics
from distmuon.errors import see
from distmuon.training.attention_logits import record_max_logits
from distmuon.training.config import Config, ConfigError
from distmuon.training.data import Corpus, check_batch, read_windows, train_starts, val_starts
from distmuon.training.engines import Engine, build_engine
from distmuon.training.model import Transformer
from distmuon.training.optimizers import (
    build_clip,
    build_optimizer,
    build_schedule,
    clip_stats,
)
from distmuon.training.with_deepspeed import build_zero_optimizer
from distmuon.training.world import World

VAL_BATCH = 64


class NonFiniteError(RuntimeError):
    """The loss or the gradient became infinite or NaN. Every rank raises it at the same step."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step measured.

    Attributes:
        loss: mean over the windows of all ranks, nats per byte.
        grad_norm: before clipping.
        lr: that the step used.
        optimizer_s: seconds in `optimizer.step`.
        diagnostics: of this step, if it was its turn.
        max_logits: largest attention logit of each layer over all ranks, likewise.
        qk_clip: from `QKClip.stats`; None without it.
    """

    loss: float
    grad_norm: float
    lr: float
    optimizer_s: float
    diagnostics: Diagnostics | None = None
    max_logits: Mapping[str, float] | None = None
    qk_clip: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True)
class Trainer:
    """Everything that a step touches.

    Attributes:
        config: of the run.
        world: this rank.
        corpus: the text.
        model: the bare model.
        engine: runs the passes, clipping and updates.
        optimizer: Muon or AdamW.
        schedule: of its learning rates.
    """

    config: Config
    world: World
    corpus: Corpus
    model: Transformer
    engine: Engine
    optimizer: Optimizer
    schedule: LambdaLR

    def step(self, step: int) -> StepResult:
        """Forward, backward, clip, update.

        Args:
            step: from 0; decides which windows are drawn.

        Raises:
            NonFiniteError: on all ranks, before the weights are touched.
        """
        self.engine.zero_grad()
        config = self.config.train
        every = config.diagnostics_every
        due = bool(every) and (step == 0 or (step + 1) % every == 0)
        with record_max_logits(self.model) if due else nullcontext() as logits:
            loss = self.forward_backward(step)
        grad_norm = float(self.engine.clip(config.clip or math.inf))
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise NonFiniteError(
                f"Step {step + 1}: loss {loss}, gradient norm {grad_norm} on rank "
                f"{self.world.rank}. The weights are those of step {step}. "
                "Try a smaller optimizer.lr or a longer train.warmup." + see("non-finite")
            )
        lr = self.schedule.get_last_lr()[0]
        began = time.perf_counter()
        self.engine.update()
        self.world.synchronize()
        optimizer_s = time.perf_counter() - began
        self.engine.advance()
        clipped = clip_stats(self.optimizer)
        result = StepResult(loss, grad_norm, float(lr), optimizer_s, qk_clip=clipped)
        return result if logits is None else self._diagnose(result, logits)

    def _diagnose(self, result: StepResult, logits: Mapping[str, Tensor]) -> StepResult:
        assert isinstance(self.optimizer, Muon), "build_optimizer refuses the others"
        largest = self.world.largest_reals([float(logit) for logit in logits.values()])
        return replace(
            result,
            diagnostics=self.optimizer.report().diagnostics,
            max_logits=dict(zip(logits, largest, strict=True)),
        )

    def forward_backward(self, step: int) -> float:
        """Leave the averaged gradient in the model; return the mean loss of all ranks."""
        passes = self.config.train.accumulation
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for number, starts in enumerate(self._rank_starts(step)):
            inputs, targets = self._windows(self.corpus.train, starts)
            with self.engine.micro_batch("last" if number == passes - 1 else "more"):
                loss = self._loss(self.engine.wrapped, inputs, targets)
                self.engine.backward(loss)
            total += loss.detach() / passes
        return self.world.sum([float(total)])[0] / self.world.size

    def _rank_starts(self, step: int) -> list[list[int]]:
        """Return this rank's windows of a step, one list per forward pass."""
        train = self.config.train
        size = check_batch(train, self.world.size)
        starts = train_starts(
            self.corpus.train.numel(),
            context=self.config.data.context,
            batch=train.batch,
            seed=self.config.run.seed,
            step=step,
        )
        mine = starts[self.world.rank * size * train.accumulation :]
        return [mine[size * index : size * (index + 1)] for index in range(train.accumulation)]

    def _windows(self, text: Tensor, starts: list[int]) -> tuple[Tensor, Tensor]:
        inputs, targets = read_windows(text, starts, self.config.data.context)
        return inputs.to(self.world.device), targets.to(self.world.device)

    def _loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats per byte."""
        low = self.config.train.precision == "bfloat16"
        with torch.autocast(self.world.device.type, dtype=torch.bfloat16, enabled=low):
            logits = model(inputs)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def validate(self) -> float:
        """Compute the mean loss over the fixed validation windows, each on one rank.

        The windows do not depend on the world size, so neither does the loss, beyond rounding.
        """
        data = self.config.data
        starts = val_starts(self.corpus.val.numel(), context=data.context, windows=data.val_windows)
        mine = starts[self.world.rank :: self.world.size]
        total = 0.0
        for begin in range(0, len(mine), VAL_BATCH):
            batch = mine[begin : begin + VAL_BATCH]
            inputs, targets = self._windows(self.corpus.val, batch)
            total += float(self._loss(self.model, inputs, targets)) * len(batch)
        return self.world.sum([total])[0] / len(starts)


def build_trainer(config: Config, corpus: Corpus, world: World) -> Trainer:
    """Build model, optimizer and schedule; equal on all ranks because the seed is.

    Raises:
        ConfigError: for a batch that does not divide, a value that the optimizer refuses, or a
            model that does not fit into memory.
    """
    check_batch(config.train, world.size)
    torch.manual_seed(config.run.seed)
    model = _build_model(config, world)
    clip = build_clip(model, config)
    if config.run.engine == "deepspeed":
        optimizer = build_zero_optimizer(model, config, world)
    else:
        every = config.train.diagnostics_every
        optimizer = build_optimizer(
            model, config.optimizer, world, clip=clip, diagnostics_every=every
        )
    scheduled = partial(build_schedule, config=config.train)
    engine, schedule = build_engine(config, world, model, optimizer, scheduled)
    return Trainer(config, world, corpus, model, engine, optimizer, schedule)


def _build_model(config: Config, world: World) -> Transformer:
    try:
        return Transformer(config.model, context=config.data.context).to(world.device)
    except (MemoryError, OverflowError, RuntimeError, TypeError) as error:
        # TypeError: a size that 64 bits do not hold.
        size = config.model
        raise ConfigError(
            f"A model with model.layers={size.layers}, model.dim={size.dim}, model.mlp_ratio="
            f"{size.mlp_ratio} and data.context={config.data.context} cannot be made: "
            f"{str(error).partition(chr(10))[0]}. Make it smaller.",
            key="model.dim",
        ) from error

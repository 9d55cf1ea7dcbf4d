"""A whole run: from a configuration to a folder with metrics, a picture and weights."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

from distmuon.training.config import Config, ConfigError, Launch, check_batch
from distmuon.training.data import Corpus, load_corpus
from distmuon.training.metrics import Interval, MetricsLog, StepMetrics, Stopwatch
from distmuon.training.plot import plot_losses
from distmuon.training.progress import ProgressView, make_progress
from distmuon.training.run_folder import RunFolder, create_run_folder
from distmuon.training.summary import (
    OPTIMIZER_NAMES,
    describe_files,
    describe_loss,
    describe_optimizer,
    describe_sample,
    describe_start,
)
from distmuon.training.trainer import StepResult, Trainer, build_trainer
from distmuon.training.world import World, join_world


@dataclass(frozen=True, slots=True)
class Recorder:
    """Where rank 0 writes what it measures; the other ranks have none.

    Attributes:
        log: the file.
        view: the terminal.
    """

    log: MetricsLog
    view: ProgressView

    def record(self, metrics: StepMetrics) -> None:
        """Write a line to the file and show it."""
        self.log.write(metrics)
        self.view.show(metrics)


def run_training(config: Config, launch: Launch) -> None:
    """Train as configured. Called by every rank.

    Args:
        config: equal on all ranks.
        launch: this process's place.

    Raises:
        ConfigError: for a mistake in the configuration or the text, on every rank.
        NonFiniteError: on every rank, if the loss explodes.
    """
    check_batch(config.train, launch.world_size)
    corpus = load_corpus(config.data)
    with join_world(config.run, launch) as world:
        # In a function of its own, so that the DDP wrapper is gone before the process group is:
        # see the note in world.py.
        _run_in_world(config, corpus, world, launch)


def _run_in_world(config: Config, corpus: Corpus, world: World, launch: Launch) -> None:
    trainer = build_trainer(config, corpus, world)
    folder = _make_folder(config, world)
    if folder is not None:
        print(describe_start(trainer, folder), flush=True)
    elapsed = Stopwatch()
    lines = _train_recorded(trainer, folder, launch)
    seconds = elapsed.lap()
    optimizer_lines = describe_optimizer(trainer.optimizer, config, world)
    if folder is not None:
        _write_files(trainer, folder, lines)
        print(describe_loss(lines[-1], seconds=seconds))
        print(describe_sample(trainer))
        print(optimizer_lines)
        print(describe_files(folder), flush=True)


def _make_folder(config: Config, world: World) -> RunFolder | None:
    """Let rank 0 make the run folder; all ranks fail together if it cannot."""
    folder: RunFolder | None = None
    failure: ConfigError | None = None
    if world.rank == 0:
        try:
            folder = create_run_folder(config)
        except ConfigError as error:
            failure = error
    if world.sum([float(failure is not None)])[0]:
        raise failure or ConfigError("Rank 0 cannot make the run folder.", key="run.dir")
    return folder


def _train_recorded(
    trainer: Trainer, folder: RunFolder | None, launch: Launch
) -> list[StepMetrics]:
    """Train with a log and a progress view on rank 0; return what was logged there."""
    with ExitStack() as stack:
        recorder = None
        if folder is not None:
            log = stack.enter_context(MetricsLog(folder.metrics))
            view = make_progress(steps=trainer.config.train.steps, output=launch.output)
            recorder = Recorder(log, stack.enter_context(view))
        _train(trainer, recorder)
        return recorder.log.lines if recorder is not None else []


def _train(trainer: Trainer, recorder: Recorder | None) -> None:
    train = trainer.config.train
    total, lap = Stopwatch(), Stopwatch()
    interval, elapsed_s = Interval(), 0.0
    for step in range(1, train.steps + 1):
        result = trainer.step(step - 1)
        interval.add(loss=result.loss, optimizer_s=result.optimizer_s, train_s=lap.lap())
        last = step == train.steps
        val_loss = trainer.validate() if last or step % train.eval_every == 0 else None
        elapsed_s += total.lap()
        if recorder is not None:
            recorder.view.advance()
            # The first step is logged too: it shows where the loss starts.
            if last or val_loss is not None or step == 1 or step % train.log_every == 0:
                recorder.record(_measure(trainer, step, result, interval, val_loss, elapsed_s))
                interval = Interval()
        lap.lap()


def _measure(
    trainer: Trainer,
    step: int,
    result: StepResult,
    interval: Interval,
    val_loss: float | None,
    elapsed_s: float,
) -> StepMetrics:
    tokens = interval.steps * trainer.config.train.batch * trainer.config.data.context
    return StepMetrics(
        step=step,
        loss=interval.loss / interval.steps,
        val_loss=val_loss,
        lr=result.lr,
        grad_norm=result.grad_norm,
        tokens_per_s=tokens / interval.train_s,
        optimizer_ms=1e3 * interval.optimizer_s / interval.steps,
        elapsed_s=elapsed_s,
    )


def _write_files(trainer: Trainer, folder: RunFolder, lines: list[StepMetrics]) -> None:
    """Write picture and weights. Only rank 0."""
    config = trainer.config
    title = (
        f"{config.run.name}: {OPTIMIZER_NAMES[config.optimizer.name]}, lr {config.optimizer.lr:g}"
    )
    plot_losses(lines, folder.plot, title=title)
    folder.save_weights(trainer.model)

"""A whole run: from a configuration to a folder with metrics, checkpoints and weights."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Literal, TextIO

from distmuon.pictures.figure import to_png
from distmuon.training.config import Config, Launch
from distmuon.training.curves import LOSS
from distmuon.training.curves import Run as NamedRun
from distmuon.training.data import Corpus, check_batch, load_corpus
from distmuon.training.loggers import CarefulLogger, open_loggers, require_loggers
from distmuon.training.metrics import Interval, MetricsLog, Progress, StepMetrics, Stopwatch
from distmuon.training.plot import draw_runs
from distmuon.training.progress import ProgressView, make_progress
from distmuon.training.resume import choose_start, earlier_metrics, open_folder
from distmuon.training.run_folder import RunFolder
from distmuon.training.signals import StopSignals
from distmuon.training.snapshot import load_snapshot, save_snapshot
from distmuon.training.streams import objects_alone
from distmuon.training.summary import (
    OPTIMIZER_NAMES,
    account_for_end,
    account_for_optimizer,
    account_for_stop,
    describe_files,
    describe_loss,
    describe_sample,
    describe_saving,
    describe_start,
    describe_stop,
)
from distmuon.training.terminal import Terminal, open_terminal
from distmuon.training.trainer import StepResult, Trainer, build_trainer
from distmuon.training.world import World, join_world


@dataclass(frozen=True, slots=True)
class Recorder:
    """Where rank 0 writes what it measures; the other ranks have none.

    Attributes:
        log: the file.
        view: the terminal.
        loggers: of `run.loggers`.
        terminal: for programs that read along.
    """

    log: MetricsLog
    view: ProgressView
    loggers: Sequence[CarefulLogger]
    terminal: Terminal

    def record(self, metrics: StepMetrics) -> None:
        """Write a line to the file, show it, and pass it on."""
        self.log.write(metrics)
        self.view.show(metrics)
        self.terminal.hand_out(metrics)
        for logger in self.loggers:
            logger.log(metrics)


@dataclass(frozen=True, slots=True)
class Run:
    """A run on its way, on every rank.

    Attributes:
        trainer: model, optimizer and schedule.
        folder: that it writes to.
        progress: where it stands; changed by every step.
        text: fingerprint of the text.
    """

    trainer: Trainer
    folder: RunFolder
    progress: Progress
    text: str

    def save_if_due(self, *, stop: Literal["now", "no"]) -> None:
        """Write a checkpoint every so many steps, at the last, and before a stop. A collective."""
        config, step = self.trainer.config, self.progress.step
        every = config.run.save_every
        due = every and (stop == "now" or step % every == 0 or step == config.train.steps)
        if due:
            path = self.folder.checkpoint(step)
            save_snapshot(self.trainer, self.progress, path, text=self.text)


def run_training(config: Config, launch: Launch) -> None:
    """Train as configured. Called by every rank.

    SIGTERM or SIGINT at any rank ends the run on all of them after the same step, saved: then this
    returns as at the end of a run, and the signals stay deaf.

    Args:
        config: equal on all ranks.
        launch: this process's place.

    Raises:
        ConfigError: for a mistake in the configuration, the text or what to resume, on every rank.
        NonFiniteError: on every rank, if the loss explodes.
    """
    check_batch(config.train, launch.world_size)
    require_loggers(config.run.loggers)
    corpus = load_corpus(config.data)
    notice: Literal["print", "silent"] = "print" if launch.rank == 0 else "silent"
    alone = objects_alone() if launch.output == "json" else nullcontext(sys.stdout)
    with (
        alone as stdout,
        StopSignals(notice=notice) as signals,
        join_world(config.run, launch) as world,
    ):
        # In a function of its own, so that the DDP wrapper is gone before the process group is:
        # see the note in world.py.
        run_in_world(config, corpus, world, launch, signals, stdout=stdout)


def run_in_world(
    config: Config,
    corpus: Corpus,
    world: World,
    launch: Launch,
    signals: StopSignals,
    *,
    stdout: TextIO | None = None,
) -> None:
    """Train as configured among ranks that have met already. Called by every rank.

    Args:
        config: equal on all ranks.
        corpus: the text.
        world: this process's place.
        launch: what else the launcher told.
        signals: on every rank; already listening.
        stdout: where standard output leads; None for where it does now.

    Raises:
        ConfigError: as `run_training`.
        NonFiniteError: as `run_training`.
    """
    trainer = build_trainer(config, corpus, world)
    text = corpus.fingerprint()
    with ExitStack() as held:
        start = world.from_first(lambda: choose_start(config, text=text, job=launch.job, held=held))
        progress = load_snapshot(trainer, start.checkpoint) if start.checkpoint else Progress()
        folder = world.from_first(lambda: open_folder(config, start, job=launch.job, held=held))
        lines = world.from_first(lambda: earlier_metrics(start))
        terminal = open_terminal(launch.output, stdout or sys.stdout) if world.rank == 0 else None
        if terminal is not None:
            terminal.say(describe_start(trainer, folder))
            terminal.say(describe_saving(config, folder, start, lines))
        run = Run(trainer, folder, progress, text)
        _train_recorded(run, lines, launch, signals, terminal)
        if progress.step < config.train.steps:
            if terminal is not None:
                stopped = config, folder, progress.step, signals.received
                terminal.say(describe_stop(*stopped))
                terminal.conclude(account_for_stop(*stopped))
            return
        # All is saved. What follows may take its time, and a signal may end it.
        signals.release()
        _finish(run, lines, terminal)


def _finish(run: Run, lines: list[StepMetrics], terminal: Terminal | None) -> None:
    trainer, folder = run.trainer, run.folder
    account = account_for_optimizer(trainer.optimizer, trainer.config, trainer.world)
    if terminal is not None:
        _write_files(trainer, folder, lines)
        terminal.say(describe_loss(lines))
        terminal.say(describe_sample(trainer))
        terminal.say(account.words)
        terminal.say(describe_files(folder))
        terminal.conclude(account_for_end(folder, lines, account))


def _train_recorded(
    run: Run,
    lines: list[StepMetrics],
    launch: Launch,
    signals: StopSignals,
    terminal: Terminal | None,
) -> None:
    """Train with a log and a progress view on rank 0; append what is logged there to `lines`."""
    with ExitStack() as stack:
        recorder = None
        if terminal is not None:
            log = stack.enter_context(MetricsLog(run.folder.metrics, lines))
            config, step = run.trainer.config, run.progress.step
            view = make_progress(
                steps=config.train.steps, output=launch.output, done=step, file=terminal.words
            )
            loggers = stack.enter_context(open_loggers(config, run.folder, step=step))
            recorder = Recorder(log, stack.enter_context(view), loggers, terminal)
        _train(run, recorder, signals)


def _train(run: Run, recorder: Recorder | None, signals: StopSignals) -> None:
    trainer, progress = run.trainer, run.progress
    train = trainer.config.train
    total, lap = Stopwatch(), Stopwatch()
    for step in range(progress.step + 1, train.steps + 1):
        result = trainer.step(step - 1)
        progress.interval.add(loss=result.loss, optimizer_s=result.optimizer_s, train_s=lap.lap())
        last = step == train.steps
        val_loss = trainer.validate() if last or step % train.eval_every == 0 else None
        progress.step = step
        progress.elapsed_s += total.lap()
        if recorder is not None:
            recorder.view.advance()
        # The first step is logged too: it shows where the loss starts.
        due = last or step == 1 or step % train.log_every == 0
        if due or val_loss is not None or result.diagnostics is not None:
            if recorder is not None:
                recorder.record(_measure(trainer, result, progress, val_loss))
            progress.logged, progress.interval = step, Interval()
        stop = trainer.world.largest(signals.received)
        run.save_if_due(stop="now" if stop else "no")
        if stop:
            # A rank that was not signalled itself tells the user the same as the others.
            signals.received = stop
            return
        lap.lap()


def _measure(
    trainer: Trainer, result: StepResult, progress: Progress, val_loss: float | None
) -> StepMetrics:
    interval = progress.interval
    tokens = interval.steps * trainer.config.train.batch * trainer.config.data.context
    return StepMetrics(
        step=progress.step,
        loss=interval.loss / interval.steps,
        val_loss=val_loss,
        lr=result.lr,
        grad_norm=result.grad_norm,
        tokens_per_s=tokens / interval.train_s,
        optimizer_ms=1e3 * interval.optimizer_s / interval.steps,
        elapsed_s=progress.elapsed_s,
        step_ms=1e3 * interval.train_s / interval.steps,
        diagnostics=result.diagnostics,
        max_logits=result.max_logits,
        qk_clip=result.qk_clip,
    )


def _write_files(trainer: Trainer, folder: RunFolder, lines: list[StepMetrics]) -> None:
    """Write picture and weights. Only rank 0."""
    config = trainer.config
    title = (
        f"{config.run.name}: {OPTIMIZER_NAMES[config.optimizer.name]}, lr {config.optimizer.lr:g}"
    )
    if lines:
        picture = draw_runs([NamedRun(title, tuple(lines))], (LOSS,))
        folder.plot.write_bytes(to_png(picture))
    # Last: with the weights the run is finished.
    folder.save_weights(trainer.model)

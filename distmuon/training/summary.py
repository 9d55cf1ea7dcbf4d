"""What a run says about itself at its start and at its end."""

from __future__ import annotations

import math
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch.optim import Optimizer

from distmuon import Muon, summarize
from distmuon.deepspeed import ZeroOrtho
from distmuon.errors import see
from distmuon.training.baselines import BASELINES
from distmuon.training.config import Config
from distmuon.training.metrics import StepMetrics
from distmuon.training.optimizers import state_bytes
from distmuon.training.progress import format_seconds
from distmuon.training.resume import Start
from distmuon.training.run_folder import RunFolder
from distmuon.training.sample import generate
from distmuon.training.trainer import Trainer
from distmuon.training.world import World
from distmuon.units import format_bytes

# Above this many ranks only the smallest and the largest are shown.
RANKS_SHOWN = 4
# How a run is resumed is not worth telling where it is resumed.
UNTOLD = ("run.resume", "run.if_exists")
OPTIMIZER_NAMES = {
    "muon": "Muon (matrices) and AdamW (the rest)",
    "normuon": "NorMuon (matrices) and AdamW (the rest)",
    **{name: baseline.label for name, baseline in BASELINES.items()},
}


def describe_start(trainer: Trainer, folder: RunFolder) -> str:
    """Name the text, the model, the ranks and the folder."""
    config, corpus, world = trainer.config, trainer.corpus, trainer.world
    model = config.model
    count = sum(parameter.numel() for parameter in trainer.model.parameters())
    return "\n".join(
        (
            f"text       {corpus.origin}: {corpus.train.numel():,} bytes to train on, "
            f"{corpus.val.numel():,} held out",
            f"model      {count:,} parameters: {model.layers} layer{'s' * (model.layers > 1)}, "
            f"dim {model.dim}, {model.heads} heads, context {config.data.context}",
            f"ranks      {world.size} on {world.device.type}, "
            f"{config.train.batch} windows per step in all",
            f"optimizer  {_optimizer_name(config, world)}, lr {config.optimizer.lr:g}",
            f"folder     {folder.path}",
        )
    )


def describe_saving(
    config: Config, folder: RunFolder, start: Start, lines: Sequence[StepMetrics]
) -> str:
    """Say what the run begins with and where its checkpoints go."""
    run, told = config.run, []
    if start.checkpoint is not None:
        ranks = f"{start.saved_by} rank{'s' if start.saved_by > 1 else ''}"
        told.append(f"resumes    after step {start.step} of {start.checkpoint} (saved by {ranks})")
        shown = [each for each in start.changes if each.key not in UNTOLD]
        if shown:
            pairs = ", ".join(f"{each.key} {each.saved} -> {each.now}" for each in shown)
            told.append(f"changed    {pairs}")
        if (lines[-1].step if lines else 0) != start.logged:
            told.append(f"metrics    those up to step {start.logged} are lost or incomplete")
    if run.save_every == 0:
        told.append("saves      nothing before the end (run.save_every=0)")
    else:
        kept = f"newest {run.keep_latest} kept" if run.keep_latest else "all kept"
        told.append(
            f"saves      {folder.checkpoints} every {run.save_every} steps and on Ctrl-C, {kept}; "
            "the same command goes on"
        )
    return "\n".join(told)


def describe_stop(config: Config, folder: RunFolder, step: int, number: int) -> str:
    """Say where the run was stopped, and how it goes on."""
    run = config.run
    stopped = f"\nstopped by {signal.Signals(number).name} after step {step}/{config.train.steps}"
    if run.save_every == 0:
        return f"{stopped}; nothing is saved (run.save_every=0)"
    again = "the same command" if run.resume == "auto" else "the same command with run.resume=auto"
    return f"{stopped}, saved to {folder.checkpoint(step)}\nto go on: {again}"


def describe_loss(lines: Sequence[StepMetrics]) -> str:
    """State the validation loss of the last step."""
    last = lines[-1] if lines else None
    if last is None or last.val_loss is None:
        return "\nthe metrics of the last step are lost"
    bits = last.val_loss / math.log(2.0)
    return (
        f"\nvalidation loss {last.val_loss:.4f} nats per byte ({bits:.3f} bits per byte) after "
        f"{last.step} steps in {format_seconds(last.elapsed_s)}"
    )


def describe_sample(trainer: Trainer) -> str:
    """Let the model write."""
    config = trainer.config.sample
    if config.length == 0:
        return ""
    text = generate(trainer.model, config, seed=trainer.config.run.seed)
    return (
        f"\nsample of {config.length} bytes after the prompt {config.prompt!r}, "
        f"temperature {config.temperature:g}:\n{text.strip()}\n"
    )


def describe_files(folder: RunFolder) -> str:
    """Say where the files are."""
    return f"\nwritten to {folder.path}: {', '.join(file.name for file in _files(folder))}"


def _files(folder: RunFolder) -> tuple[Path, ...]:
    return folder.config, folder.metrics, folder.plot, folder.weights


class Account(NamedTuple):
    """What the optimizer did, over all ranks.

    Attributes:
        words: for people.
        figures: for programs.
    """

    words: str
    figures: Mapping[str, Any]


def account_for_optimizer(optimizer: Optimizer, config: Config, world: World) -> Account:
    """Tell what the optimizer did, over all ranks. A collective.

    Raises:
        RuntimeError: if a matrix was not orthogonalized exactly once per step.
    """
    if not isinstance(optimizer, Muon | ZeroOrtho):
        held = [row[0] for row in world.collect([state_bytes(optimizer)])]
        words = f"{_optimizer_name(config, world)}\nstate per rank {_per_rank(held)}"
        return Account(words, {"name": config.optimizer.name, "state_bytes": held})
    summary = summarize(optimizer)
    if summary.problem or summary.calls != summary.matrices * summary.steps:
        raise RuntimeError(str(summary) + see("not-orthogonalized"))
    figures = {
        "name": config.optimizer.name,
        "steps": summary.steps,
        "skipped": summary.skipped,
        "matrices": summary.matrices,
        "orthogonalized": summary.calls,
        "expected": summary.expected,
        "newton_schulz_flops": summary.flops,
        "bytes_sent": dict(summary.bytes_sent),
        "matrices_owned": [rank.owned for rank in summary.ranks],
        "state_bytes": [rank.state_bytes for rank in summary.ranks],
    }
    return Account(str(summary), figures)


def account_for_end(
    folder: RunFolder, lines: Sequence[StepMetrics], account: Account
) -> dict[str, Any]:
    """The last object of a run that came to its end."""
    last = lines[-1] if lines else None
    return {
        "finished": True,
        "step": last.step if last else None,
        "val_loss": last.val_loss if last else None,
        "elapsed_s": last.elapsed_s if last else None,
        "folder": str(folder.path),
        "files": [str(file) for file in _files(folder)],
        "optimizer": account.figures,
    }


def account_for_stop(config: Config, folder: RunFolder, step: int, number: int) -> dict[str, Any]:
    """The last object of a run that a signal stopped."""
    return {
        "finished": False,
        "step": step,
        "stopped_by": signal.Signals(number).name,
        "folder": str(folder.path),
        "checkpoint": str(folder.checkpoint(step)) if config.run.save_every else None,
    }


def _optimizer_name(config: Config, world: World) -> str:
    name = OPTIMIZER_NAMES[config.optimizer.name]
    return f"{name} under ZeRO-1 on {world.size} ranks" if world.size > 1 else name


def _per_rank(counts: Sequence[int]) -> str:
    shown = [format_bytes(count) for count in counts]
    if len(counts) > RANKS_SHOWN:
        low, high = min(counts), max(counts)
        if low == high:
            return f"{shown[0]} on each of {len(counts)} ranks"
        lowest, highest = shown[counts.index(low)], shown[counts.index(high)]
        return f"{lowest} to {highest} on {len(counts)} ranks"
    return ", ".join(f"rank {rank}: {text}" for rank, text in enumerate(shown))

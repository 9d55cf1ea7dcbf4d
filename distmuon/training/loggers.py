"""Metrics to TensorBoard and Weights & Biases, which may fail as they like: the run goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any, Protocol

from distmuon.errors import see
from distmuon.training.config import Config, ConfigError
from distmuon.training.metrics import StepMetrics
from distmuon.training.run_folder import RunFolder

_logger = logging.getLogger(__name__)


class Sink(Protocol):
    """A place that takes named numbers."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Take the numbers of a step."""

    def close(self) -> None:
        """Write what is still to be written."""


class _TensorBoard:
    def __init__(self, folder: RunFolder, config: Config, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What an interrupted run wrote after its last checkpoint will be written again.
        self._writer = SummaryWriter(str(folder.tensorboard), purge_step=step + 1)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, folder: RunFolder, config: Config, step: int) -> None:
        import wandb

        self._run: Any = wandb.init(
            project="distmuon",
            name=folder.path.name,
            dir=str(folder.path),
            config=asdict(config),
            resume="auto",
        )

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


_OPENERS: Mapping[str, Callable[[RunFolder, Config, int], Sink]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WeightsAndBiases,
}


class CarefulLogger:
    """Passes metrics on until something fails, says so once, and is silent from then on."""

    def __init__(self, name: str, open_sink: Callable[[], Sink]) -> None:
        """Open it.

        Args:
            name: for the warning.
            open_sink: makes the place to log to.
        """
        self._name = name
        self._sink: Sink | None = None
        self._attempt(lambda: self._open(open_sink))

    def _open(self, open_sink: Callable[[], Sink]) -> None:
        self._sink = open_sink()

    def log(self, metrics: StepMetrics) -> None:
        """Pass a line of metrics on."""
        sink = self._sink
        if sink is not None:
            self._attempt(lambda: sink.log(metrics.step, flatten(metrics)))

    def close(self) -> None:
        """Close it."""
        if self._sink is not None:
            self._attempt(self._sink.close)
            self._sink = None

    def _attempt(self, action: Callable[[], None]) -> None:
        # Anything: a full disk, no network, a wrong key, a version that it does not like.
        try:
            action()
        except Exception as error:
            self._sink = None
            _logger.warning(
                "%s failed and gets no more metrics; training goes on, and metrics.jsonl has "
                "everything. %s: %s%s",
                self._name,
                type(error).__name__,
                error,
                see("logging"),
            )


def require_loggers(names: Sequence[str]) -> None:
    """Say what to install before anything is started.

    Args:
        names: `run.loggers`.

    Raises:
        ConfigError: if a package is missing.
    """
    for name in names:
        spec = find_spec(name)
        # A folder "wandb" that some run has left in the working directory is no package.
        if spec is None or spec.origin is None:
            raise ConfigError(
                f"run.loggers has {name}, which is not installed. Run: pip install "
                "'distmuon[loggers]', or take it out of run.loggers.",
                key="run.loggers",
            )


@contextmanager
def open_loggers(config: Config, folder: RunFolder, *, step: int) -> Iterator[list[CarefulLogger]]:
    """Open everything in `run.loggers`, and close it at the end. Only rank 0 calls this.

    Args:
        config: of the run.
        folder: of the run.
        step: that it goes on from.

    Yields:
        The loggers.
    """
    loggers = [
        CarefulLogger(name, lambda name=name: _OPENERS[name](folder, config, step))  # type: ignore[misc]
        for name in config.run.loggers
    ]
    try:
        yield loggers
    finally:
        for logger in loggers:
            logger.close()


def flatten(metrics: StepMetrics) -> dict[str, float]:
    """Name every number of a line, those of its diagnostics by group, matrix or layer.

    Args:
        metrics: the line.

    Returns:
        Such as "loss", "update_rms/0 muon", "orthogonality_error/layers.0.mlp.up_proj.weight".
    """
    flat = {
        name: float(value)
        for name, value in asdict(metrics).items()
        if isinstance(value, int | float) and name != "step"
    }
    flat |= {f"max_logit/{layer}": value for layer, value in (metrics.max_logits or {}).items()}
    seen = metrics.diagnostics
    if seen is None:
        return flat
    flat |= {f"gradient_norm/{name}": norm for name, norm in seen.gradient_norms.items()}
    for group in seen.groups:
        label = f"{group.group} {group.algorithm}"
        for key in ("update_rms", "weight_rms", "ratio", "effective_lr"):
            flat[f"{key}/{label}"] = getattr(group, key)
    for matrix in seen.matrices:
        for key in ("orthogonality_error", "least", "median", "most"):
            kind = key if key == "orthogonality_error" else f"singular_value_{key}"
            flat[f"{kind}/{matrix.name}"] = getattr(matrix, key)
    mean = sum(seen.owner_flops) / len(seen.owner_flops)
    if mean:
        flat["owner_load/largest_over_mean"] = max(seen.owner_flops) / mean
    return flat

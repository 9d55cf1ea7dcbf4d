"""What rank 0 shows while it trains: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import importlib.util
import sys
from types import TracebackType
from typing import Protocol, TextIO

from distmuon.training.metrics import StepMetrics
from distmuon.training.terminal import Output


class ProgressView(Protocol):
    """A way to show progress; used as a context manager around the loop."""

    def __enter__(self) -> ProgressView:
        """Begin to show."""
        ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave the terminal as it was."""
        ...

    def advance(self) -> None:
        """Count one step."""
        ...

    def show(self, metrics: StepMetrics) -> None:
        """Show new measurements."""
        ...


def make_progress(
    *, steps: int, output: Output, done: int = 0, file: TextIO | None = None
) -> ProgressView:
    """Choose the bar where a terminal shows it, rich is installed, and `output` is not "plain".

    Args:
        steps: of the whole run.
        output: of `Launch`.
        done: how many of them an earlier sitting did.
        file: where to; None for standard output.
    """
    out = file or sys.stdout
    if output != "plain" and importlib.util.find_spec("rich") is not None:
        from rich.console import Console

        from distmuon.training.bar import BarProgress

        console = Console(file=out)
        if console.is_terminal:
            return BarProgress(steps, console, done=done)
    return PlainProgress(steps, out)


class PlainProgress:
    """One line for each line of metrics."""

    def __init__(self, steps: int, file: TextIO) -> None:
        self.steps = steps
        self._file = file

    def __enter__(self) -> PlainProgress:
        """Nothing to set up."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Nothing to tear down."""

    def advance(self) -> None:
        """A line per step would be too many."""

    def show(self, metrics: StepMetrics) -> None:
        """Print a line with a rough time to the end."""
        remaining = metrics.elapsed_s / metrics.step * (self.steps - metrics.step)
        width = len(str(self.steps))
        print(
            f"step {metrics.step:>{width}}/{self.steps}  {describe(metrics)}  "
            f"eta {format_seconds(remaining)}",
            file=self._file,
            flush=True,
        )


def describe(metrics: StepMetrics) -> str:
    """Put the measurements of a step into one line."""
    val = "" if metrics.val_loss is None else f"val {metrics.val_loss:.4f}  "
    logit = f"max logit {metrics.qk_clip['max_logit']:.1f}  " if metrics.qk_clip else ""
    return (
        f"loss {metrics.loss:.4f}  {val}lr {metrics.lr:.2e}  {metrics.tokens_per_s:,.0f} tokens/s  "
        f"{logit}optimizer {metrics.optimizer_ms:.1f} ms"
    )


def format_seconds(seconds: float) -> str:
    """Format a duration as 1:05 or 1:01:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

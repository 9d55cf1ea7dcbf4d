"""What rank 0 shows while it trains: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from distmuon.training.metrics import StepMetrics


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


def make_progress(*, steps: int, output: str, done: int = 0) -> ProgressView:
    """Choose the bar where standard output is a terminal and `output` is not "plain".

    Args:
        steps: of the whole run.
        output: of `Launch`.
        done: how many of them an earlier sitting did.
    """
    console = Console()
    if output != "plain" and console.is_terminal:
        return BarProgress(steps, console, done=done)
    return PlainProgress(steps)


class PlainProgress:
    """One line for each line of metrics."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

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
            flush=True,
        )


class BarProgress:
    """A bar that is redrawn in place."""

    def __init__(self, steps: int, console: Console, *, done: int = 0) -> None:
        self._progress = Progress(
            MofNCompleteColumn(),
            # The bar takes what the figures leave, so that all of them fit into 80 columns.
            BarColumn(bar_width=None),
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            TextColumn("eta"),
            TimeRemainingColumn(compact=True),
            console=console,
            expand=True,
        )
        self._task = self._progress.add_task("", total=steps, completed=done)

    def __enter__(self) -> BarProgress:
        """Start to redraw."""
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave the last state on the screen and give the cursor back."""
        self._progress.stop()

    def advance(self) -> None:
        """Move the bar by one step."""
        self._progress.advance(self._task)

    def show(self, metrics: StepMetrics) -> None:
        """Replace the figures; validations stay on the screen as lines above the bar."""
        figures = (
            f"loss {metrics.loss:.4f} lr {metrics.lr:.1e} {metrics.tokens_per_s:,.0f} tok/s "
            f"optimizer {metrics.optimizer_ms:.1f} ms"
        )
        self._progress.update(self._task, description=figures)
        if metrics.val_loss is not None:
            self._progress.console.print(
                f"step {metrics.step}  {describe(metrics)}", markup=False, soft_wrap=True
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

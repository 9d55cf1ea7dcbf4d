"""A progress bar that is redrawn in place, by rich."""

from __future__ import annotations

from types import TracebackType

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
from distmuon.training.progress import describe


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

"""The picture of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from distmuon.training.metrics import StepMetrics


def plot_losses(lines: Sequence[StepMetrics], path: Path, *, title: str) -> None:
    """Draw training and validation loss over the steps.

    Args:
        lines: at least one.
        path: PNG file to write.
        title: shown above the axes.
    """
    # A Figure of its own, without pyplot: no window system and no global state are touched.
    figure = Figure(figsize=(7.0, 4.3), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = [line.step for line in lines]
    axes.plot(
        steps,
        [line.loss for line in lines],
        color="tab:blue",
        label="training (mean since last point)",
    )
    validated = [(line.step, line.val_loss) for line in lines if line.val_loss is not None]
    axes.plot(
        [step for step, _ in validated],
        [loss for _, loss in validated],
        color="tab:orange",
        marker="o",
        label="validation (held-out text)",
    )
    axes.set_title(title)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("cross-entropy loss (nats per byte)")
    axes.grid(alpha=0.3)
    axes.legend()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)

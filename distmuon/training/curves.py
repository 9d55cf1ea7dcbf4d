"""What a picture of runs shows: curves over the steps, from their metrics. No drawing here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal, NamedTuple

from distmuon.diagnostics import GroupDiagnostics
from distmuon.training.metrics import StepMetrics

Figure = Callable[[StepMetrics], float | None]


@dataclass(frozen=True, slots=True)
class Run:
    """A run to draw.

    Attributes:
        name: in the legend.
        lines: its metrics; at least one line.
    """

    name: str
    lines: tuple[StepMetrics, ...]

    @property
    def measured(self) -> tuple[StepMetrics, ...]:
        """The lines with diagnostics."""
        return tuple(line for line in self.lines if line.diagnostics is not None)


class Curve(NamedTuple):
    """Points of one kind of figure over a run.

    Attributes:
        kind: in the legend.
        steps: of the points.
        values: likewise; all finite.
    """

    kind: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Panel:
    """What one pair of axes shows.

    Attributes:
        title: above it.
        unit: of the y axis.
        curves: of a run.
        scale: of the y axis.
    """

    title: str
    unit: str
    curves: Callable[[Run], Sequence[Curve]]
    scale: Literal["linear", "log"] = "linear"


def _curves(lines: Sequence[StepMetrics], figures: Mapping[str, Figure]) -> list[Curve]:
    """One curve for each figure that has been measured at least once."""
    found = []
    for kind, figure in figures.items():
        points = [(line.step, figure(line)) for line in lines]
        known = [(step, y) for step, y in points if y is not None and math.isfinite(y)]
        if known:
            steps, values = zip(*known, strict=True)
            found.append(Curve(kind, steps, values))
    return found


def _loss(run: Run) -> list[Curve]:
    figures: dict[str, Figure] = {
        "training": lambda line: line.loss,
        "validation": lambda line: line.val_loss,
    }
    return _curves(run.lines, figures)


def _lr(run: Run) -> list[Curve]:
    return _curves(run.lines, {"lr": lambda line: line.lr})


def _step_time(run: Run) -> list[Curve]:
    figures: dict[str, Figure] = {
        "whole step": lambda line: line.step_ms,
        "optimizer": lambda line: line.optimizer_ms,
    }
    # Without the first line, which has the step in which everything is allocated.
    return _curves(run.lines[1:] or run.lines, figures)


def _logits(run: Run) -> list[Curve]:
    def largest(line: StepMetrics) -> float | None:
        return max(line.max_logits.values()) if line.max_logits else None

    return _curves(run.lines, {"largest of all layers": largest})


def _spectra(run: Run) -> list[Curve]:
    def of(pick: Callable[[Iterable[float]], float], key: str) -> Figure:
        def read(line: StepMetrics) -> float | None:
            matrices = line.diagnostics.matrices if line.diagnostics else ()
            known = [value for m in matrices if math.isfinite(value := getattr(m, key))]
            return pick(known) if known else None

        return read

    figures = {
        "largest": of(max, "most"),
        "median": of(median, "median"),
        "smallest": of(min, "least"),
    }
    return _curves(run.lines, figures)


def _gradients(run: Run) -> list[Curve]:
    def of(algorithm: str) -> Figure:
        def read(line: StepMetrics) -> float | None:
            seen = line.diagnostics
            return seen.gradient_norms.get(algorithm) if seen else None

        return read

    return _curves(run.lines, {name: of(name) for name in _algorithms(run)})


def _of_groups(figure: Callable[[GroupDiagnostics], float]) -> Callable[[Run], list[Curve]]:
    """Root mean square of a figure over the elements of all groups of an algorithm."""

    def mean(groups: Sequence[GroupDiagnostics]) -> float | None:
        numel = sum(group.numel for group in groups)
        squares = sum(group.numel * figure(group) ** 2 for group in groups)
        return math.sqrt(squares / numel) if numel else None

    def of(algorithm: str) -> Figure:
        def read(line: StepMetrics) -> float | None:
            groups = line.diagnostics.groups if line.diagnostics else ()
            return mean([group for group in groups if group.algorithm == algorithm])

        return read

    return lambda run: _curves(run.lines, {name: of(name) for name in _algorithms(run)})


def _algorithms(run: Run) -> list[str]:
    """In order of appearance: Muon's groups come first."""
    seen = (line.diagnostics for line in run.measured)
    return list(dict.fromkeys(group.algorithm for d in seen if d for group in d.groups))


LOSS = Panel("loss", "nats per byte", _loss)
PANELS = (
    LOSS,
    Panel("learning rate", "lr", _lr),
    Panel("update RMS", "before lr", _of_groups(lambda group: group.update_rms)),
    Panel("weight RMS", "after the step", _of_groups(lambda group: group.weight_rms)),
    Panel(
        "effective learning rate",
        "lr x update RMS / weight RMS",
        _of_groups(lambda group: group.effective_lr),
        "log",
    ),
    Panel("singular values of Muon's updates", "before scaling", _spectra),
    Panel("gradient norm", "after clipping", _gradients),
    Panel("attention logit", "largest of the step", _logits),
    Panel("step time", "ms, mean between points", _step_time),
)


def owner_loads(run: Run) -> tuple[float, ...]:
    """Operations of Newton-Schulz of each rank in a step, on average over the measured steps.

    Args:
        run: The run.

    Returns:
        One number for each rank; none if it was not measured. Where a run went on with another
        number of ranks, its last.
    """
    loads = [line.diagnostics.owner_flops for line in run.measured if line.diagnostics]
    if not loads:
        return ()
    same = [row for row in loads if len(row) == len(loads[-1])]
    return tuple(sum(column) / len(same) for column in zip(*same, strict=True))


@dataclass(frozen=True, slots=True)
class Facts:
    """A run in a few numbers.

    Attributes:
        name: of the run.
        steps: done.
        loss: training loss of its last line.
        val_loss: its last validation loss; None without any.
        step_ms: mean time of a step without the first line; None if it was not recorded.
        optimizer_ms: likewise of the optimizer.
        owner_loads: from `owner_loads`.
    """

    name: str
    steps: int
    loss: float
    val_loss: float | None
    step_ms: float | None
    optimizer_ms: float
    owner_loads: tuple[float, ...]


def gather_facts(run: Run) -> Facts:
    """Sum a run up.

    Args:
        run: The run.

    Returns:
        Its numbers.
    """
    last = run.lines[-1]
    validated = [line.val_loss for line in run.lines if line.val_loss is not None]
    return Facts(
        name=run.name,
        steps=last.step,
        loss=last.loss,
        val_loss=validated[-1] if validated else None,
        step_ms=_mean(run, lambda line: line.step_ms),
        optimizer_ms=_mean(run, lambda line: line.optimizer_ms) or last.optimizer_ms,
        owner_loads=owner_loads(run),
    )


def _mean(run: Run, figure: Figure) -> float | None:
    """Mean over the steps: a line's figure is that of the steps since the line before."""
    total, steps = 0.0, 0
    for before, line in zip(run.lines, run.lines[1:], strict=False):
        value = figure(line)
        if value is not None:
            total += (line.step - before.step) * value
            steps += line.step - before.step
    return total / steps if steps else None


def iterate_missing(runs: Sequence[Run]) -> Iterator[str]:
    """Yield the titles of the panels for which no run has a point."""
    for panel in PANELS:
        if not any(panel.curves(run) for run in runs):
            yield panel.title
    if not any(owner_loads(run) for run in runs):
        yield "owner load"

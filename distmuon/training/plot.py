"""Pictures of one or several runs: a colour for each run, a style for each kind of figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from distmuon.pictures.figure import new_figure, to_png
from distmuon.pictures.page import Grid, Paragraph, Part, Picture, render_page
from distmuon.training.curves import (
    PANELS,
    Panel,
    Run,
    gather_facts,
    iterate_missing,
    owner_loads,
)
from distmuon.units import format_flops

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 2
_PANEL_HEIGHT = 330
_LEGEND_HEIGHT = 26
_RUNS_IN_A_ROW = 3
_LONGEST_NAME = 38
_STYLES: tuple[Literal["-", "--", ":"], ...] = ("-", "--", ":")
# Up to here each rank has a bar; above, the ranks are a line.
_BARS = 64
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))

TITLES = ("run", "steps", "loss", "validation", "ms/step", "optimizer ms", "owner load")


def draw_runs(runs: Sequence[Run], panels: Sequence[Panel] = PANELS) -> Figure:
    """Draw runs beside each other.

    Args:
        runs: At least one.
        panels: What to draw; those without any point are left out. With all of them comes the load
            of the owners.

    Returns:
        The figure, 1,200 pixels wide.
    """
    shown = [panel for panel in panels if any(panel.curves(run) for run in runs)]
    loads = panels is PANELS and any(owner_loads(run) for run in runs)
    count = len(shown) + loads
    columns = min(_COLUMNS, count)
    rows = -(-count // columns)
    legend_rows = -(-len(runs) // _RUNS_IN_A_ROW)
    height = rows * (_PANEL_HEIGHT if columns > 1 else 2 * _PANEL_HEIGHT)
    figure = new_figure(height + 20 + _LEGEND_HEIGHT * legend_rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    cells = [axes for row in grid for axes in row]
    for axes, panel in zip(cells, shown, strict=False):
        _draw_panel(axes, panel, runs)
    if loads:
        _draw_loads(cells[len(shown)], runs)
    for axes in cells[count:]:
        axes.remove()
    from matplotlib.lines import Line2D

    figure.legend(
        [Line2D([], [], color=_colour(index), linewidth=3) for index in range(len(runs))],
        [_short(run.name, _LONGEST_NAME if len(runs) > 1 else 3 * _LONGEST_NAME) for run in runs],
        loc="outside upper left",
        ncols=_RUNS_IN_A_ROW,
        frameon=False,
    )
    return figure


def _draw_panel(axes: Axes, panel: Panel, runs: Sequence[Run]) -> None:
    styles: dict[str, Literal["-", "--", ":"]] = {}
    for index, run in enumerate(runs):
        for curve in panel.curves(run):
            style = styles.setdefault(curve.kind, _STYLES[len(styles) % len(_STYLES)])
            marker = "o" if len(curve.steps) < 25 else None
            axes.plot(
                curve.steps,
                curve.values,
                color=_colour(index),
                linestyle=style,
                marker=marker,
                markersize=3.5,
                linewidth=1.5,
            )
    _finish(axes, panel.title, "optimizer step", panel.unit)
    axes.set_yscale(panel.scale)
    if panel.scale == "linear" and panel.title != "loss":
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    if len(styles) > 1:
        from matplotlib.lines import Line2D

        keys = [Line2D([], [], color="0.3", linestyle=style) for style in styles.values()]
        axes.legend(keys, list(styles), loc="best", framealpha=0.85, handlelength=2.6)


def _draw_loads(axes: Axes, runs: Sequence[Run]) -> None:
    known = [(index, owner_loads(run)) for index, run in enumerate(runs)]
    known = [(index, loads) for index, loads in known if loads]
    width = 0.8 / len(known)
    highest = max(max(loads) for _, loads in known)
    unit, prefix = next(each for each in _PREFIXES if highest >= each[0] or each[0] == 1.0)
    for place, (index, loads) in enumerate(known):
        scaled = [load / unit for load in loads]
        mean = sum(scaled) / len(scaled)
        ratio = f"{max(scaled) / mean:.3f}" if mean else "-"
        if len(loads) <= _BARS:
            left = [rank - 0.4 + (place + 0.5) * width for rank in range(len(loads))]
            axes.bar(left, scaled, width, color=_colour(index), label=ratio)
        else:
            axes.plot(range(len(loads)), scaled, color=_colour(index), linewidth=1, label=ratio)
    axes.set_ylim(bottom=0.0, top=axes.get_ylim()[1] * 1.25)
    axes.locator_params(axis="x", integer=True)
    axes.legend(title="largest / mean", loc="upper right", ncols=4, framealpha=0.85)
    _finish(axes, "owner load", "rank", f"{prefix}FLOP of Newton-Schulz a step")


def _finish(axes: Axes, title: str, across: str, up: str) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _colour(index: int) -> str:
    return f"C{index % 10}"


def _short(name: str, longest: int) -> str:
    half = longest // 2 - 1
    return name if len(name) <= longest else f"{name[:half]}...{name[-half:]}"


def to_rows(runs: Sequence[Run]) -> tuple[tuple[str, ...], ...]:
    """Say in a row of text how each run ended.

    Args:
        runs: The runs.

    Returns:
        For each a text for each of `TITLES`.
    """
    return tuple(
        (
            facts.name,
            f"{facts.steps:,}",
            f"{facts.loss:.4f}",
            _number(facts.val_loss, ".4f"),
            _number(facts.step_ms, ".1f"),
            f"{facts.optimizer_ms:.1f}",
            _load(facts.owner_loads),
        )
        for facts in map(gather_facts, runs)
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _load(loads: Sequence[float]) -> str:
    mean = sum(loads) / len(loads) if loads else 0.0
    return f"{format_flops(max(loads))}, {max(loads) / mean:.3f} x mean" if mean else "-"


def describe_missing(runs: Sequence[Run]) -> str:
    """Say what no run has recorded, and how it would be.

    Args:
        runs: The runs.

    Returns:
        A sentence; empty if nothing is missing.
    """
    missing = list(iterate_missing(runs))
    if not missing:
        return ""
    return f"Not recorded: {', '.join(missing)}. Train with train.diagnostics_every=N for these."


def to_page(runs: Sequence[Run]) -> str:
    """Write a page with everything.

    Args:
        runs: At least one.

    Returns:
        HTML that needs nothing but itself.
    """
    names = ", ".join(run.name for run in runs)
    parts: list[Part] = [
        Grid(TITLES, to_rows(runs), frozenset(range(1, len(TITLES) - 1))),
        Picture(
            to_png(draw_runs(runs)),
            "png",
            f"Curves over the optimizer steps of {names}",
            "A colour for each run. Means are over the steps since the point before; step times "
            "without the first point, in which everything is allocated.",
        ),
    ]
    missing = describe_missing(runs)
    if missing:
        parts.append(Paragraph(missing))
    return render_page("Training runs" if len(runs) > 1 else f"Training run {names}", parts)

"""The picture of a plan: who owns what, who computes how much, who sends what to whom."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from distmuon.forecast.forecast import Forecast, Row
from distmuon.pictures.figure import new_figure, to_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.ticker import Locator

# More ranks than this share a column: a page has no more pixels to tell them apart.
_COLUMNS = 1100
# Rows of the ownership panel; the costliest are shown.
_ROWS = 24
_ROW_PIXELS = 21
_LABEL_LETTERS = 46

# Width of a panel, in points of 1/72 inch.
_PANEL_POINTS = 560
_BYTES = ("B", "kB", "MB", "GB", "TB")
_OPERATIONS = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP")

_SENT = (
    ("gather", "pieces to owners", "#3b6ea5"),
    ("scatter", "updates back", "#e08e45"),
    ("gram", "Gram matrices", "#6aa84f"),
    ("transform", "transforms", "#b4a7d6"),
)


def draw_plan(forecast: Forecast) -> bytes:
    """Draw a plan.

    Args:
        forecast: What to draw.

    Returns:
        A PNG file.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    owned = [row for row in forecast.rows if row.owners]
    shown = sorted(owned, key=lambda row: -len(row.owners) * row.numel)[:_ROWS]
    shown = [row for row in owned if row in shown]
    heights = (90 + _ROW_PIXELS * len(shown), 190, 190, 250)
    figure = new_figure(sum(heights) + 60)
    panels = figure.subplots(4, 1, height_ratios=heights)
    figure.suptitle(
        f"{forecast.source} on {forecast.world_size:,} ranks: one optimizer step", fontsize=14
    )
    _draw_owners(figure, panels[0], forecast, shown, left_out=len(owned) - len(shown))
    _draw_loads(panels[1], forecast)
    _draw_sent(panels[2], forecast)
    _draw_moves(figure, panels[3], forecast)
    return to_png(figure)


def _draw_owners(
    figure: Figure, axes: Axes, forecast: Forecast, rows: Sequence[Row], *, left_out: int
) -> None:
    world_size = forecast.world_size
    counts = [_binned(_count(row.owners, world_size)) for row in rows]
    mesh = axes.pcolormesh(
        _edges(world_size), [i - 0.5 for i in range(len(rows) + 1)], counts, cmap=_from_white()
    )
    axes.invert_yaxis()
    axes.set_yticks(range(len(rows)), [_shorten(row.name) for row in rows], fontsize=9)
    title = "Owners: matrices that each rank orthogonalizes"
    axes.set_title(title + (f" ({left_out} more rows)" if left_out else ""), loc="left")
    figure.colorbar(mesh, ax=axes, label="matrices per rank", pad=0.01, ticks=_whole_numbers(5))
    _rank_axis(axes, world_size)


def _draw_loads(axes: Axes, forecast: Forecast) -> None:
    factor, unit = _scale(max(forecast.loads), _OPERATIONS)
    work = [load / factor for load in forecast.loads]
    mean = sum(work) / len(work)
    _steps(axes, _binned(work), forecast.world_size, "#3b6ea5", "Newton-Schulz")
    axes.axhline(mean, color="black", linestyle="--", linewidth=1, label=f"mean, {mean:.4g} {unit}")
    axes.set_title(
        f"Work: the busiest rank has {forecast.imbalance:.3f} times the mean", loc="left"
    )
    axes.set_ylabel(unit)
    _finish(axes, forecast.world_size)


def _draw_sent(axes: Axes, forecast: Forecast) -> None:
    kinds = [each for each in _SENT if each[0] in forecast.sent]
    totals = [sum(each) for each in zip(*(forecast.sent[k] for k, _, _ in kinds), strict=True)]
    factor, unit = _scale(max(totals, default=0), _BYTES)
    below = [0.0] * len(_edges(forecast.world_size)[1:])
    for kind, label, color in kinds:
        counts = _binned([count / factor for count in forecast.sent[kind]])
        above = [a + b for a, b in zip(below, counts, strict=True)]
        _steps(axes, above, forecast.world_size, color, label, below)
        below = above
    if not kinds:
        _say_nothing(axes, "no matrix has to move: every owner holds its own whole")
    axes.set_title("Sent for Newton-Schulz", loc="left")
    axes.set_ylabel(f"{unit} per rank")
    _finish(axes, forecast.world_size)


def _draw_moves(figure: Figure, axes: Axes, forecast: Forecast) -> None:
    axes.set_title(
        "Moves: momentum from the rank that holds it to the rank that needs it", loc="left"
    )
    _rank_axis(axes, forecast.world_size)
    if not forecast.moves:
        _say_nothing(axes, "nothing moves")
        axes.set_yticks([])
        return
    factor, unit = _scale(max(move.nbytes for move in forecast.moves), _BYTES)
    side = min(max(_PANEL_POINTS / forecast.world_size, 2.0), 12.0)
    points = axes.scatter(
        [move.holder for move in forecast.moves],
        [move.owner - move.holder for move in forecast.moves],
        c=[move.nbytes / factor for move in forecast.moves],
        s=side**2,
        marker="s",
        cmap="viridis_r",
        vmin=0,
    )
    figure.colorbar(points, ax=axes, label=f"{unit}, and as much back", pad=0.01)
    axes.axhline(0, color="#bbb", linewidth=0.8)
    farthest = max(abs(move.owner - move.holder) for move in forecast.moves)
    axes.set_ylim(-1.1 * farthest - 0.5, 1.1 * farthest + 0.5)
    axes.yaxis.set_major_locator(_whole_numbers(9))
    axes.set_ylabel("needed so many\nranks further")
    axes.set_xlabel("rank that holds it")
    axes.grid(alpha=0.3)


def _steps(
    axes: Axes,
    values: Sequence[float],
    world_size: int,
    color: str,
    label: str,
    baseline: Sequence[float] | float = 0.0,
) -> None:
    edges = _edges(world_size)
    axes.stairs(values, edges, baseline=baseline, fill=True, color=color, label=label)


def _finish(axes: Axes, world_size: int) -> None:
    axes.set_ylim(bottom=0)
    axes.margins(y=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    _rank_axis(axes, world_size)
    if axes.get_legend_handles_labels()[0]:
        # Above the panel: bars of every height may be anywhere in it.
        axes.legend(
            loc="lower right", bbox_to_anchor=(1.0, 0.97), ncols=4, fontsize=9, frameon=False
        )


def _rank_axis(axes: Axes, world_size: int) -> None:
    axes.set_xlim(-0.5, world_size - 0.5)
    axes.xaxis.set_major_locator(_whole_numbers(16))
    label = "rank"
    if world_size > _COLUMNS:
        label += f" (each column is the mean of {world_size / _COLUMNS:.3g})"
    axes.set_xlabel(label)


def _whole_numbers(most: int) -> Locator:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=most, integer=True)


def _say_nothing(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=11)


def _count(owners: Sequence[int], world_size: int) -> list[float]:
    counts = [0.0] * world_size
    for owner in owners:
        counts[owner] += 1
    return counts


def _edges(world_size: int) -> list[float]:
    columns = min(world_size, _COLUMNS)
    return [world_size * i / columns - 0.5 for i in range(columns + 1)]


def _binned(values: Sequence[float]) -> list[float]:
    """Means over the ranks that share a column."""
    columns = min(len(values), _COLUMNS)
    starts = [-(-len(values) * i // columns) for i in range(columns + 1)]
    return [sum(values[start:stop]) / (stop - start) for start, stop in pairwise(starts)]


def _scale(most: float, units: Sequence[str]) -> tuple[float, str]:
    factor = 1.0
    for unit in units[:-1]:
        if most < 1000 * factor:
            return factor, unit
        factor *= 1000
    return factor, units[-1]


def _shorten(name: str) -> str:
    if len(name) <= _LABEL_LETTERS:
        return name
    return "…" + name[1 - _LABEL_LETTERS :]


def _from_white() -> Colormap:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("owned", ["#ffffff", "#8fb8de", "#1f4e79", "#0b1f33"])

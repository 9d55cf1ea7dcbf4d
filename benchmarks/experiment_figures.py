"""The pictures of docs/experiments.md, from the results alone: one for each experiment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.experiment_jobs import (
    ADAMW_LRS,
    HIGH_LR,
    LR,
    MUON_LRS,
    PAPER_RULES,
    PAPER_UPDATE_RMS,
    SHORT,
    THRESHOLD,
    UPDATE_RMS,
)
from benchmarks.experiment_tables import (
    Rows,
    best_adamw,
    entropies,
    mean_loss,
    pick,
    rule_ratios,
    weight_rms,
)
from benchmarks.runs import Result
from distmuon.pictures.figure import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Corner = Literal["best", "lower right"]

_HEIGHT = 480
_LOSS = "validation loss, nats per byte"
_COLOURS = {"AdamW": "C1", "Muon": "C0"}


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with some panels side by side."""
    figure = new_figure(_HEIGHT)
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _finish(axes: Axes, title: str, across: str, up: str, *, legend: Corner = "best") -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc=legend, framealpha=0.85)


def _dots(axes: Axes, place: float, values: Sequence[float], **style: Any) -> None:
    """A dot for each seed."""
    axes.plot([place] * len(values), values, "o", alpha=0.7, markersize=5, **style)


def _losses(results: Sequence[Result]) -> list[float]:
    return [result.val_loss for result in results]


def _curves(axes: Axes, name: str, results: Sequence[Result], colour: str) -> None:
    """Validation losses over the steps, a line for each seed."""
    for index, result in enumerate(results):
        steps, losses = zip(*result.validation, strict=True)
        axes.plot(steps, losses, color=colour, linewidth=1.2, label=None if index else name)


def _against(axes: Axes, name: str, found: Mapping[float, Sequence[Result]], colour: str) -> None:
    """Final losses against a number: a dot for each seed, a line through the means."""
    for place, results in found.items():
        _dots(axes, place, _losses(results), color=colour)
    means = [mean_loss(results) for results in found.values()]
    axes.plot(list(found), means, "o-", color=colour, linewidth=1.5, markersize=3, label=name)


def _category_dots(axes: Axes, rows: Rows, colour: str = "C0") -> None:
    """Final losses of named rows: a dot for each seed, a dash for their mean."""
    for place, results in enumerate(rows.values()):
        _dots(axes, place, _losses(results), color=colour)
        axes.plot([place], [mean_loss(results)], "_", color="0.2", markersize=26)
    axes.set_xticks(range(len(rows)), [name.replace(",", "").replace(" ", "\n") for name in rows])
    axes.margins(x=0.15)


def draw_ratio(rows: Rows) -> Figure:
    """Losses over the steps and against the learning rate."""
    figure, (curves, rates) = _panels(2)
    best, adamw = best_adamw(rows)
    target = mean_loss(adamw)
    _curves(curves, f"AdamW, lr {best:g}", adamw, "C1")
    _curves(curves, f"Muon, lr {LR:g}", rows[f"Muon, lr {LR:g}"], "C0")
    curves.axhline(target, color="C1", linestyle=":", linewidth=1.2)
    for index, results in enumerate(pick(rows, (f"Muon, {s} steps" for s in SHORT)).values()):
        label = None if index else "Muon, shorter schedules: their ends"
        for result in results:
            curves.plot(result.steps, result.val_loss, "D", color="C2", markersize=5, label=label)
            label = None
    curves.set_ylim(1.55, 2.3)
    _finish(curves, "validation loss, a line for each seed", "optimizer step", _LOSS)
    places: set[float] = set()
    for name, tried in (("AdamW", ADAMW_LRS), ("Muon", MUON_LRS)):
        found = {lr: rows[f"{name}, lr {lr:g}"] for lr in tried if rows.get(f"{name}, lr {lr:g}")}
        _against(rates, name, found, _COLOURS[name])
        places |= found.keys()
    _log_ticks(rates, sorted(places))
    _finish(rates, "after 800 steps", "peak learning rate", _LOSS)
    return figure


def _log_ticks(axes: Axes, places: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.minorticks_off()


def draw_update_rms(rows: Rows) -> Figure:
    """Losses and weights against the update RMS."""
    figure, (losses, weights) = _panels(2)
    found = {rms: rows[f"{rms:g}"] for rms in UPDATE_RMS if rows.get(f"{rms:g}")}
    _against(losses, "Muon", found, "C0")
    losses.axhline(mean_loss(rows["AdamW"]), color="C1", linestyle="--", label="AdamW")
    _log_ticks(losses, UPDATE_RMS)
    _finish(losses, "validation loss after 800 steps", "RMS of Muon's updates, before lr", _LOSS)
    for index, (kind, colour) in enumerate((("query", "C0"), ("MLP", "C2"))):
        ours = [weight_rms(results, kind) for results in found.values()]
        theirs = [PAPER_UPDATE_RMS[f"{rms:g}"][1 + index] for rms in found]
        weights.plot(list(found), ours, "o-", color=colour, label=f"{kind}, here")
        weights.plot(list(found), theirs, "s--", color=colour, label=f"{kind}, Moonlight")
    _log_ticks(weights, UPDATE_RMS)
    weights.set_yscale("log")
    _finish(weights, "weights at the end", "RMS of Muon's updates, before lr", "weight RMS")
    return figure


def draw_shape_rules(rows: Rows) -> Figure:
    """Losses and weights under the three rules of Moonlight's table 1."""
    figure, (losses, weights) = _panels(2)
    _category_dots(losses, rows)
    _finish(losses, "validation loss after 800 steps", "", _LOSS)
    known = [name for name in ("p5", "keller") if rows.get(f"Baseline, {name}")]
    groups = {f"here, {name}": rule_ratios(rows, name) for name in known}
    _, query, mlp = PAPER_RULES["Baseline"]
    groups["Moonlight"] = {
        rule: {"query": sizes[1] / query, "MLP": sizes[2] / mlp}
        for rule, sizes in PAPER_RULES.items()
    }
    places = [(rule, kind) for kind in ("query", "MLP") for rule in ("Update Norm", "Adjusted LR")]
    width = 0.8 / len(groups)
    for index, (name, ratios) in enumerate(groups.items()):
        left = [place - 0.4 + (index + 0.5) * width for place in range(len(places))]
        heights = [ratios[rule][kind] if rule in ratios else 0.0 for rule, kind in places]
        bars = weights.bar(left, heights, width * 0.92, color=f"C{index}", label=name)
        weights.bar_label(bars, fmt="%.2f", fontsize=8, label_type="center")
    weights.axhline(1.0, color="0.3", linewidth=1, zorder=0)
    weights.set_xticks(range(len(places)), [f"{kind}\n{rule}" for rule, kind in places])
    weights.set_ylim(0, 2.6)
    weights.set_axisbelow(True)
    _finish(weights, "weight RMS at the end", "", "as a multiple of Baseline's")
    return figure


def draw_entropy(rows: Rows) -> Figure:
    """Singular value entropy of every matrix, by group."""
    figure, (axes,) = _panels(1)
    kinds = ("QO", "KV", "MLP")
    for index, name in enumerate(("AdamW", "Muon")):
        for place, kind in enumerate(kinds):
            values = entropies(rows[name], kind)
            label = None if place else f"{name}: a dot for each matrix and seed, a dash: mean"
            left = place - 0.15 + 0.3 * index
            _dots(axes, left, values, color=_COLOURS[name], label=label)
            axes.plot([left], [mean(values)], "_", color="0.2", markersize=30)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.margins(x=0.2)
    title = "singular value entropy of the weights at the end"
    up = "entropy, 1: all singular values equal"
    _finish(axes, title, "matrices", up, legend="lower right")
    return figure


def draw_max_dim(rows: Rows) -> Figure:
    """Losses and weights with and without the root."""
    figure, (losses, weights) = _panels(2)
    _category_dots(losses, rows)
    _finish(losses, "validation loss after 800 steps", "factor on the update", _LOSS)
    for index, kind in enumerate(("query", "MLP")):
        left = [place - 0.2 + 0.4 * index for place in range(len(rows))]
        heights = [weight_rms(results, kind) for results in rows.values()]
        bars = weights.bar(left, heights, 0.37, color=("C0", "C2")[index], label=kind)
        weights.bar_label(bars, fmt="%.2f", fontsize=8)
    weights.set_xticks(range(len(rows)), list(rows))
    _finish(weights, "weights at the end", "factor on the update", "weight RMS")
    return figure


def draw_coefficients(rows: Rows) -> Figure:
    """Losses with each coefficient set."""
    figure, (axes,) = _panels(1)
    _category_dots(axes, rows)
    _finish(axes, "validation loss after 800 steps", "Newton-Schulz coefficients", _LOSS)
    return figure


def draw_normuon(rows: Rows) -> Figure:
    """Losses over the steps and their difference."""
    figure, (curves, gaps) = _panels(2)
    for (name, results), colour in zip(rows.items(), ("C0", "C3"), strict=True):
        _curves(curves, name, results, colour)
    curves.set_ylim(1.55, 2.3)
    _finish(curves, "validation loss, a line for each seed", "optimizer step", _LOSS)
    muon = {result.seed: dict(result.validation) for result in rows["Muon"]}
    for result in rows["NorMuon"]:
        both = [(s, loss - muon[result.seed][s]) for s, loss in result.validation if s >= 200]
        gaps.plot(*zip(*both, strict=True), "o-", markersize=3, label=f"seed {result.seed}")
    gaps.axhline(0.0, color="0.3", linewidth=1)
    _finish(gaps, "NorMuon - Muon, from step 200 on", "optimizer step", "nats per byte")
    return figure


def draw_qk_clip(rows: Rows) -> Figure:
    """Largest logits and losses over the steps, with QK-Clip and without."""
    figure, (logits, losses) = _panels(2)
    colours = dict(zip(rows, ("C0", "C2", "C3", "C4"), strict=False))
    # Where nothing is clipped, one curve lies on the other.
    widths = dict(zip(rows, (3.0, 1.0, 1.2, 1.2), strict=False))
    for name, results in rows.items():
        for index, result in enumerate(results):
            label = None if index else name
            steps, largest = zip(*result.logits, strict=True)
            style: dict[str, Any] = {"color": colours[name], "linewidth": widths[name]}
            logits.plot(steps, largest, label=label, **style)
            if f"{HIGH_LR:g}" in name:
                steps, values = zip(*result.validation, strict=True)
                losses.plot(steps, values, label=label, **style)
    logits.axhline(THRESHOLD, color="0.2", linestyle="--", linewidth=1, label="threshold")
    logits.set_yscale("log")
    logits.set_ylim(bottom=1)
    title = "largest attention logit of the step"
    _finish(logits, title, "optimizer step", "logit", legend="lower right")
    losses.set_ylim(1.6, 2.6)
    _finish(losses, f"validation loss at lr {HIGH_LR:g}", "optimizer step", _LOSS)
    return figure


FIGURES: Mapping[str, Callable[[Rows], Figure]] = {
    "ratio": draw_ratio,
    "update_rms": draw_update_rms,
    "shape_rules": draw_shape_rules,
    "entropy": draw_entropy,
    "max_dim": draw_max_dim,
    "coefficients": draw_coefficients,
    "normuon": draw_normuon,
    "qk_clip": draw_qk_clip,
}

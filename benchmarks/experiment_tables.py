"""The tables of docs/experiments.md, from the results alone: nothing is trained here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import mean

from benchmarks.experiment_jobs import (
    ADAMW_LRS,
    KINDS,
    LR,
    MUON_LRS,
    PAPER_RULES,
    PAPER_UPDATE_RMS,
    SEEDS,
    SHORT,
    STEPS,
    UPDATE_RMS,
)
from benchmarks.runs import Result

Rows = Mapping[str, Sequence[Result]]


def to_markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table in Markdown.

    Args:
        head: titles of the columns.
        rows: cells of each row.
    """
    lines = (head, ["---"] * len(head), *rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines).replace(" --- ", "---")


def mean_loss(results: Sequence[Result]) -> float:
    """Mean of the seeds' last validation losses, nats per byte."""
    return mean(result.val_loss for result in results)


def loss_cells(results: Sequence[Result]) -> list[str]:
    """Cells of a row: the last validation loss of each seed, their mean and spread."""
    known = {result.seed: result.val_loss for result in results}
    cells = [f"{known[seed]:.4f}" if seed in known else "-" for seed in SEEDS]
    values = known.values()
    spread = f"{max(values) - min(values):.4f}" if len(values) > 1 else "-"
    return [*cells, f"{mean(values):.4f}", spread]


def loss_table(corner: str, rows: Rows) -> str:
    """Validation losses at the last step of every seed."""
    head = [corner, *(f"seed {seed}" for seed in SEEDS), "mean", "spread"]
    return to_markdown(head, ([name, *loss_cells(results)] for name, results in rows.items()))


def weight_rms(results: Sequence[Result], kind: str) -> float:
    """Root mean square of all weights of a kind in all layers and seeds.

    Args:
        results: of the seeds.
        kind: a key of `KINDS`; its matrices have one number of elements.
    """
    squares = [
        weight.rms**2
        for result in results
        for name, weight in result.weights.items()
        if name.split(".")[-2] in KINDS[kind]
    ]
    return math.sqrt(mean(squares))


def entropies(results: Sequence[Result], kind: str) -> list[float]:
    """Singular value entropy of every matrix of a kind, in the order of seeds and names."""
    return [
        weight.entropy
        for result in results
        for name, weight in result.weights.items()
        if name.split(".")[-2] in KINDS[kind]
    ]


def pick(rows: Rows, names: Iterable[str]) -> Rows:
    """Those of some rows that have any results."""
    return {name: rows[name] for name in names if rows.get(name)}


def best_adamw(rows: Rows) -> tuple[float, Sequence[Result]]:
    """AdamW at the learning rate with the smallest mean loss of the seeds that all were run with.

    Args:
        rows: of the experiment "ratio".

    Returns:
        The learning rate and its results.

    Raises:
        ValueError: if it is the smallest or largest that was tried: nobody knows what is beyond.
    """
    tried = {lr: rows[f"AdamW, lr {lr:g}"] for lr in ADAMW_LRS if rows.get(f"AdamW, lr {lr:g}")}
    common = set.intersection(*({result.seed for result in row} for row in tried.values()))
    best = min(tried, key=lambda lr: mean_loss([r for r in tried[lr] if r.seed in common]))
    if best in (min(tried), max(tried)):
        raise ValueError(f"AdamW's best lr {best:g} is the last one tried on its side.")
    return best, tried[best]


def crossing(validation: Sequence[tuple[int, float]], target: float) -> float | None:
    """Step at which a curve first falls to a loss, on straight lines between its points.

    Args:
        validation: step and loss.
        target: the loss.

    Returns:
        None if it never does.
    """
    for (step, loss), (later, lower) in pairwise(validation):
        if lower <= target < loss:
            return step + (later - step) * (loss - target) / (loss - lower)
    return None


def ratio_tables(rows: Rows) -> list[str]:
    """AdamW's sweep, Muon's, and the steps that Muon needs for the loss of the best AdamW."""
    best, adamw = best_adamw(rows)
    swept = pick(rows, (f"{name}, lr {lr:g}" for name, lr in _lrs()))
    targets = {result.seed: result.val_loss for result in adamw}
    passed = [
        step
        for result in rows[f"Muon, lr {LR:g}"]
        if (step := crossing(result.validation, targets[result.seed])) is not None
    ]
    losses = [*targets.values(), mean(targets.values())]
    passed.append(mean(passed))
    passing = to_markdown(
        ["", *(f"seed {seed}" for seed in targets), "mean"],
        [
            [f"AdamW, lr {best:g}, val loss", *(f"{loss:.4f}" for loss in losses)],
            ["step at which Muon passes it", *(f"{step:.0f}" for step in passed)],
            [f"share of {STEPS}", *(f"{step / STEPS:.3f}" for step in passed)],
        ],
    )
    short = to_markdown(
        [
            "Muon's schedule",
            "share",
            *(f"seed {seed}" for seed in SEEDS),
            "mean",
            "spread",
            "AdamW - Muon",
        ],
        (
            [
                f"{results[0].steps} steps",
                f"{results[0].steps / STEPS:.2f}",
                *loss_cells(results),
                f"{mean_loss(adamw) - mean_loss(results):+.4f}",
            ]
            for results in pick(rows, (f"Muon, {steps} steps" for steps in SHORT)).values()
        ),
    )
    return [loss_table("val loss", swept), passing, short, shortest(rows)]


def _lrs() -> list[tuple[str, float]]:
    return [("AdamW", lr) for lr in ADAMW_LRS] + [("Muon", lr) for lr in MUON_LRS]


def shortest(rows: Rows) -> str:
    """Say at which length of its own schedule Muon ends at AdamW's loss, on average over seeds."""
    _, adamw = best_adamw(rows)
    tried = [*pick(rows, (f"Muon, {s} steps" for s in SHORT)).values(), rows[f"Muon, lr {LR:g}"]]
    points = [(results[0].steps, mean_loss(results)) for results in tried]
    step = crossing(points, mean_loss(adamw))
    if step is None:
        return "Not between the lengths that were tried."
    return f"Between these, on straight lines: {step:.0f} steps, {step / STEPS:.2f} of AdamW's."


def update_rms_tables(rows: Rows) -> list[str]:
    """Moonlight's table 8: losses and weights for each update RMS, beside the paper's."""
    head = ["update RMS", "val loss", "spread", "train loss", "query RMS", "MLP RMS"]
    cells = []
    for name, results in pick(rows, ("AdamW", *(f"{rms:g}" for rms in UPDATE_RMS))).items():
        *_, average, spread = loss_cells(results)
        sizes = [f"{weight_rms(results, kind):.4f}" for kind in ("query", "MLP")]
        train = f"{mean(result.loss for result in results):.4f}"
        paper = [f"{value:g}" for value in PAPER_UPDATE_RMS[name]]
        cells.append([name, average, spread, train, *sizes, *paper])
    return [to_markdown([*head, "paper: val loss", "query RMS", "MLP RMS"], cells)]


def rule_ratios(rows: Rows, coefficients: str) -> dict[str, dict[str, float]]:
    """Weight RMS of Moonlight's three rules over that of its baseline.

    Args:
        rows: of the experiment "shape_rules".
        coefficients: "p5" or "keller".

    Returns:
        By the name of the rule, "query" and "MLP".
    """
    names = {rule: f"{rule}, {coefficients}" for rule in PAPER_RULES}
    base = rows[names["Baseline"]]
    return {
        rule: {
            kind: weight_rms(rows[name], kind) / weight_rms(base, kind) for kind in ("query", "MLP")
        }
        for rule, name in names.items()
        if rows.get(name)
    }


def shape_rules_tables(rows: Rows) -> list[str]:
    """Moonlight's table 1: losses and weight RMS under each rule."""
    cells = []
    for coefficients in ("p5", "keller"):
        if not rows.get(f"Baseline, {coefficients}"):
            continue
        for rule, ratios in rule_ratios(rows, coefficients).items():
            results = rows[f"{rule}, {coefficients}"]
            *_, average, spread = loss_cells(results)
            sizes = [weight_rms(results, kind) for kind in ("query", "MLP")]
            cells.append(
                [
                    *(f"{rule}, `{coefficients}`", average, spread),
                    *(f"{size:.4f}" for size in sizes),
                    *(f"{ratio:.3f}" for ratio in ratios.values()),
                ]
            )
    for rule, (loss, query, mlp) in PAPER_RULES.items():
        shares = (query / PAPER_RULES["Baseline"][1], mlp / PAPER_RULES["Baseline"][2])
        found = (f"{query:.5f}", f"{mlp:.4f}", *(f"{share:.3f}" for share in shares))
        cells.append([f"paper: {rule}", f"{loss:g}", "-", *found])
    head = ["rule", "val loss", "spread", "query RMS", "MLP RMS", "query/Baseline", "MLP/Baseline"]
    return [to_markdown(head, cells)]


def entropy_tables(rows: Rows) -> list[str]:
    """Moonlight's figure 4: singular value entropy of each group of matrices."""
    cells = []
    for kind in ("QO", "KV", "MLP"):
        adamw, muon = (entropies(rows[name], kind) for name in ("AdamW", "Muon"))
        higher = sum(ours > theirs for theirs, ours in zip(adamw, muon, strict=True))
        cells.append([kind, f"{mean(adamw):.3f}", f"{mean(muon):.3f}", f"{higher} of {len(muon)}"])
    return [to_markdown(["matrices", "AdamW", "Muon", "higher with Muon"], cells)]


def max_dim_tables(rows: Rows) -> list[str]:
    """Scaling by the longer side, with and without the root."""
    return [loss_table("scaling", rows), weights_table("scaling", rows)]


def weights_table(corner: str, rows: Rows) -> str:
    """Weight RMS of queries and MLPs."""
    cells = (
        [name, *(f"{weight_rms(results, kind):.4f}" for kind in ("query", "MLP"))]
        for name, results in rows.items()
    )
    return to_markdown([corner, "query RMS", "MLP RMS"], cells)


def plain_tables(rows: Rows) -> list[str]:
    """Validation losses and nothing else."""
    return [loss_table("val loss", rows)]


def qk_clip_tables(rows: Rows) -> list[str]:
    """Largest attention logits and losses, with QK-Clip and without."""
    cells = []
    for name, results in rows.items():
        largest = [max(logit for _, logit in result.logits) for result in results]
        cells.append(
            [
                name,
                *loss_cells(results),
                f"{min(largest):.0f} to {max(largest):.0f}",
                f"{mean(result.logits[-1][1] for result in results):.0f}",
                f"{sum(result.clipped for result in results)}",
            ]
        )
    head = ["val loss", *(f"seed {seed}" for seed in SEEDS), "mean", "spread"]
    more = ["largest logit", "logit at the end, mean", "clips seen"]
    return [to_markdown([*head, *more], cells)]


TABLES: Mapping[str, Callable[[Rows], list[str]]] = {
    "ratio": ratio_tables,
    "update_rms": update_rms_tables,
    "shape_rules": shape_rules_tables,
    "entropy": entropy_tables,
    "max_dim": max_dim_tables,
    "coefficients": plain_tables,
    "normuon": plain_tables,
    "qk_clip": qk_clip_tables,
}

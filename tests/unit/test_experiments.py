"""The experiments' plan, tables and pictures from made-up results; the page from the real ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from benchmarks.experiment_figures import FIGURES
from benchmarks.experiment_jobs import adamw, all_experiments, base
from benchmarks.experiment_tables import (
    TABLES,
    Rows,
    best_adamw,
    crossing,
    mean_loss,
    rule_ratios,
    shortest,
    weight_rms,
)
from benchmarks.experiments import RANKS, RESULTS, find_rows, image_path
from benchmarks.runs import ROOT, Job, Result, Weight, checksum, read_results, svd_entropy

EXPERIMENTS = all_experiments()
REAL = read_results(RESULTS)
PAGE = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
MATRICES = [
    f"layers.{layer}.{name}.weight"
    for layer in (0, 1)
    for name in (
        *(f"attention.{kind}_proj" for kind in "qkvo"),
        *("mlp.up_proj", "mlp.down_proj"),
    )
]


def invent(job: Job, *, end: float) -> Result:
    """A result whose loss falls along a line from 3 to some end."""
    (steps,) = [int(x[12:]) for x in job.overrides if x.startswith("train.steps=")] or [800]
    validation = tuple((s, 3 + (end - 3) * s / steps) for s in range(40, steps + 1, 40))
    return Result(
        config=checksum(job, RANKS),
        name=job.name,
        seed=job.seed,
        steps=steps,
        loss=end,
        validation=(*validation[:-1], (steps, end)),
        logits=((10, 5.0), (20, 1000.0), (30, 7.0)),
        clipped=3,
        weights={name: Weight(0.1, 0.5) for name in MATRICES},
        optimizer_ms=1.0,
        wall_s=1.0,
        ranks=RANKS,
        torch="0",
        machine="none",
    )


def invent_all() -> dict[str, Result]:
    ends = {"adamw-lr0.012": 1.7, "adamw-lr0.0085": 1.75}
    found = {}
    for rows in EXPERIMENTS.values():
        for row in rows.values():
            for job in row:
                usual = 1.8 if job.name.startswith("adamw") else 1.6
                end = ends.get(job.name, usual) + 0.001 * job.seed
                found[checksum(job, RANKS)] = invent(job, end=end)
    return found


@pytest.fixture(scope="module")
def invented() -> Mapping[str, Result]:
    return invent_all()


def rows_of(name: str, results: Mapping[str, Result]) -> Rows:
    return find_rows(EXPERIMENTS[name], results)


def test_a_checksum_names_what_is_trained_and_nothing_else() -> None:
    job = base(0)
    assert checksum(replace(job, name="other"), 2) == checksum(job, 2)
    others = [
        checksum(job, 3),
        checksum(base(1), 2),
        checksum(adamw(1.2e-2, 0), 2),
        checksum(replace(job, overrides=(*job.overrides, "optimizer.lr=1e-3")), 2),
    ]
    assert len({checksum(job, 2), *others}) == 5


def test_every_job_can_be_told_from_the_others() -> None:
    jobs = [job for rows in EXPERIMENTS.values() for row in rows.values() for job in row]
    by_name = {(job.name, job.seed): checksum(job, RANKS) for job in jobs}
    assert len(set(by_name.values())) == len(by_name) > 60
    assert all(by_name[job.name, job.seed] == checksum(job, RANKS) for job in jobs)


def test_results_read_back_equal_and_the_later_line_counts(tmp_path: Path) -> None:
    first, second = invent(base(0), end=1.5), invent(base(0), end=1.6)
    file = tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps(asdict(each)) + "\n" for each in (first, second)))
    assert read_results(file) == {first.config: second}
    assert read_results(tmp_path / "none.jsonl") == {}


def test_entropy_is_one_for_equal_singular_values_and_zero_for_rank_one() -> None:
    torch.manual_seed(0)
    assert svd_entropy(3 * torch.linalg.qr(torch.randn(8, 5)).Q) == pytest.approx(1, abs=1e-6)
    assert svd_entropy(torch.outer(torch.randn(8), torch.randn(5))) == pytest.approx(0, abs=1e-6)
    # p = (1/2, 1/4, 1/4): 3/2 ln 2 of ln 3.
    known = torch.diag(torch.tensor([2.0, 1.0, 1.0]).sqrt())
    assert svd_entropy(known) == pytest.approx(0.946395, abs=1e-5)


def test_a_curve_crosses_a_loss_between_its_points() -> None:
    curve = ((100, 2.0), (200, 1.8), (300, 1.9), (400, 1.5))
    assert crossing(curve, 1.85) == pytest.approx(175)
    assert crossing(curve, 1.6) == pytest.approx(375)
    assert crossing(curve, 1.4) is None


def test_a_sweep_whose_best_is_at_its_edge_is_no_sweep(invented: Mapping[str, Result]) -> None:
    rows = rows_of("ratio", invented)
    assert best_adamw(rows)[0] == 0.012
    for side in ("0.006", "0.0085"), ("0.024", "0.017"):
        cut = {name: row for name, row in rows.items() if name[10:] not in side}
        with pytest.raises(ValueError, match=r"best lr 0.012 is the last"):
            best_adamw(cut)


def test_the_tables_say_what_the_results_are(invented: Mapping[str, Result]) -> None:
    passing = TABLES["ratio"](rows_of("ratio", invented))
    assert "| Muon, lr 0.012 | 1.6000 | 1.6010 | 1.6020 | 1.6010 | 0.0020 |" in passing[0]
    # From 3 to 1.6 in 800 steps: at 1.7 after 1.3/1.4 of them.
    assert "| step at which Muon passes it | 743 | 743 | 743 | 743 |" in passing[1]
    assert (
        "| 360 steps | 0.45 | 1.6000 | 1.6010 | 1.6020 | 1.6010 | 0.0020 | +0.1000 |" in passing[2]
    )
    (table,) = TABLES["update_rms"](rows_of("update_rms", invented))
    assert "| 0.4 | 1.6010 | 0.0020 | 1.6010 | 0.1000 | 0.1000 | 3.314 | 0.0295 | 0.0451 |" in table
    (table,) = TABLES["qk_clip"](rows_of("qk_clip", invented))
    assert "| 1000 to 1000 | 7 | 9 |" in table


def test_ratios_are_those_of_the_weights(invented: Mapping[str, Result]) -> None:
    rows = dict(rows_of("shape_rules", invented))
    sizes = {name: Weight(0.3 if "mlp" in name else 0.1, 0.5) for name in MATRICES}
    rows["Adjusted LR, p5"] = [replace(r, weights=sizes) for r in rows["Adjusted LR, p5"]]
    ratios = rule_ratios(rows, "p5")
    assert ratios["Adjusted LR"] == {"query": pytest.approx(1.0), "MLP": pytest.approx(3.0)}
    assert weight_rms(rows["Adjusted LR, p5"], "MLP") == pytest.approx(0.3)
    (table,) = TABLES["shape_rules"](rows)
    assert "| 0.1000 | 0.3000 | 1.000 | 3.000 |" in table


@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_seeds_that_were_not_run_are_said_to_be_missing(
    name: str, invented: Mapping[str, Result]
) -> None:
    part = {key: result for key, result in invented.items() if result.seed != 2}
    tables = TABLES[name](rows_of(name, part))
    whole = TABLES[name](rows_of(name, invented))
    assert tables != whole or name == "entropy"


@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_every_experiment_has_a_picture_1200_pixels_wide(
    name: str, invented: Mapping[str, Result], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    path = image_path(name, tmp_path)
    FIGURES[name](rows_of(name, invented)).savefig(path)
    data = path.read_bytes()
    assert data[:4] == b"\x89PNG"
    assert int.from_bytes(data[16:20], "big") == 1200


# Most of the coefficient sets were run before there was a file of results.
@pytest.mark.parametrize("name", sorted(EXPERIMENTS.keys() - {"coefficients"}))
def test_the_page_has_the_tables_of_the_real_results(name: str) -> None:
    for table in TABLES[name](rows_of(name, REAL)):
        assert table in PAGE, f"python -m benchmarks.experiments tables {name}"
    assert image_path(name).is_file(), f"python -m benchmarks.experiments figures {name}"
    assert f"(images/{image_path(name).name})" in PAGE


def test_the_real_results_are_what_page_and_readme_say() -> None:
    rows = rows_of("ratio", REAL)
    _, adamw = best_adamw(rows)
    ends = zip(adamw, rows["Muon, lr 0.012"], rows["Muon, 416 steps"], strict=True)
    assert all(muon.val_loss < short.val_loss < theirs.val_loss for theirs, muon, short in ends)
    assert "0.45 of AdamW's" in shortest(rows)
    assert mean_loss(adamw) - mean_loss(rows["Muon, lr 0.012"]) == pytest.approx(0.15, abs=5e-3)
    ratios = rule_ratios(rows_of("shape_rules", REAL), "p5")["Adjusted LR"]
    assert ratios == {"query": pytest.approx(0.975, rel=0.15), "MLP": pytest.approx(1.94, rel=0.15)}
    plain, inert, *_ = rows_of("qk_clip", REAL).values()
    assert plain[0].validation == inert[0].validation
    assert (plain[0].logits, plain[0].weights) == (inert[0].logits, inert[0].weights)

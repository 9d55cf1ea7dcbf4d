"""`distmuon plot`: what the curves show, the picture and the page, and what it says otherwise."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure
from PIL import Image

from distmuon.cli.main import main
from distmuon.diagnostics import Diagnostics, GroupDiagnostics, MatrixDiagnostics
from distmuon.training.curves import LOSS, PANELS, Panel, Run, gather_facts, owner_loads
from distmuon.training.metrics import MetricsLog, StepMetrics, read_metrics, to_json
from distmuon.training.plot import describe_missing, draw_runs
from tests.browser import open_in_browser, read_strictly

GROUPS = (
    GroupDiagnostics(0, "muon", 3000, 1e-2, 0.5, 0.2, 0.1),
    GroupDiagnostics(1, "adamw", 300, 1e-2, 0.9, 0.6, 0.02),
    GroupDiagnostics(2, "adamw", 100, 1e-2, 0.1, 1.0, 1.0),
)


def line(step: int, *, ranks: int, factor: float = 1.0) -> StepMetrics:
    loss = factor * (2.0 + 3.5 / step)
    val_loss = loss + 0.1 if step % 100 == 0 else None
    plain = StepMetrics(step, loss, val_loss, 1e-2 / step, 1.0, 1e4, 5.0, step * 0.05, 50.0)
    if not ranks or step % 50:
        return plain
    groups = tuple(replace(g, update_rms=factor * g.update_rms) for g in GROUPS)
    loads = tuple(10**9 + 10**7 * rank for rank in range(ranks))
    matrix = MatrixDiagnostics("w", 0, 0.1, 0.9, 1.0, 1.1)
    seen = Diagnostics(step, {"muon": 0.5, "adamw": 0.9}, groups, (matrix,), loads)
    return replace(plain, diagnostics=seen, max_logits={"a": 3.0, "b": factor * 4.0})


def made_up(name: str, *, ranks: int = 4, factor: float = 1.0) -> Run:
    steps = [1, *range(10, 801, 10)]
    return Run(name, tuple(line(step, ranks=ranks, factor=factor) for step in steps))


def save(folder: Path, run: Run) -> Path:
    folder.mkdir(parents=True)
    with MetricsLog(folder / "metrics.jsonl") as log:
        for each in run.lines:
            log.write(each)
    return folder


def panel(title: str) -> Panel:
    return next(panel for panel in PANELS if panel.title == title)


SPECTRA = panel("singular values of Muon's updates")


def test_groups_of_an_algorithm_are_one_curve() -> None:
    muon, adamw = panel("update RMS").curves(made_up("x"))
    assert (muon.kind, adamw.kind) == ("muon", "adamw")
    assert muon.steps == tuple(range(50, 801, 50))
    assert muon.values[0] == pytest.approx(0.2)
    assert adamw.values[0] == pytest.approx(math.sqrt((300 * 0.36 + 100 * 1.0) / 400))
    _, weights = panel("weight RMS").curves(made_up("x"))
    assert weights.values[0] == pytest.approx(math.sqrt((300 * 0.0004 + 100 * 1.0) / 400))


def test_the_largest_logit_is_that_of_any_layer() -> None:
    (curve,) = panel("attention logit").curves(made_up("x", factor=2.0))
    assert set(curve.values) == {8.0}


def test_spectra_show_the_worst_of_the_sampled_matrices() -> None:
    kinds = {curve.kind: curve.values[0] for curve in SPECTRA.curves(made_up("x"))}
    assert kinds == {"largest": 1.1, "median": 1.0, "smallest": 0.9}


def test_numbers_that_are_none_are_left_out() -> None:
    run = made_up("x")
    seen = run.lines[5].diagnostics
    assert seen is not None
    nothing = replace(seen, groups=(replace(GROUPS[0], weight_rms=0.0),))
    strange = Run("x", (*run.lines[:5], replace(run.lines[5], diagnostics=nothing)))
    assert panel("effective learning rate").curves(strange) == []


def test_the_first_line_is_no_step_time() -> None:
    run = made_up("x")
    slow = Run("x", (replace(run.lines[0], step_ms=1e6, optimizer_ms=1e6), *run.lines[1:]))
    assert max(panel("step time").curves(slow)[0].values) == 50.0
    facts = gather_facts(slow)
    assert (facts.step_ms, facts.optimizer_ms) == (50.0, 5.0)


def test_loads_are_those_of_the_ranks_that_were_there_last() -> None:
    two, four = made_up("x", ranks=2), made_up("x", ranks=4)
    changed = Run("x", (*two.lines[:40], *four.lines[40:]))
    assert owner_loads(changed) == (1e9, 1.01e9, 1.02e9, 1.03e9)
    assert owner_loads(made_up("x", ranks=0)) == ()


def written_texts(figure: Figure) -> list[tuple[str, tuple[float, float, float, float]]]:
    """Every text that is drawn and its box in pixels."""
    figure.canvas.draw()
    texts = [text for legend in figure.legends for text in legend.get_texts()]
    for axes in figure.axes:
        texts += [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]  # type: ignore[attr-defined]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                # Ticks outside of the limits exist and are not drawn.
                if low <= tick.get_loc() <= high:
                    texts.append(tick.label1)
            texts.append(axis.get_offset_text())
        legend = axes.get_legend()
        texts += [*legend.get_texts(), legend.get_title()] if legend else []
    found = []
    for text in texts:
        if text.get_visible() and text.get_text():
            box = text.get_window_extent()
            found.append((text.get_text(), (box.x0, box.y0, box.x1, box.y1)))
    return found


@pytest.mark.parametrize(("count", "ranks"), [(1, 0), (2, 2), (1, 64), (7, 300)])
def test_no_text_covers_another_or_leaves_the_picture(count: int, ranks: int) -> None:
    runs = [made_up(f"run {i} {'x' * 90}", ranks=ranks, factor=1 + i / 9) for i in range(count)]
    figure = draw_runs(runs)
    width, height = (round(side * 100) for side in figure.get_size_inches())
    assert width == 1200
    texts = written_texts(figure)
    for name, (x0, y0, x1, y1) in texts:
        assert min(x0, y0) > -1, name
        assert x1 < width + 1, name
        assert y1 < height + 1, name
    for (one, a), (other, b) in combinations(texts, 2):
        across = min(a[2], b[2]) - max(a[0], b[0])
        up = min(a[3], b[3]) - max(a[1], b[1])
        assert across <= 1 or up <= 1, f"{one!r} covers {other!r}"


def test_a_panel_without_points_is_left_out_and_said() -> None:
    poor, rich = made_up("poor", ranks=0), made_up("rich")
    assert len(draw_runs([poor]).axes) == 3
    assert len(draw_runs([poor, rich]).axes) == len(PANELS) + 1
    assert len(draw_runs([rich], (LOSS,)).axes) == 1
    assert describe_missing([poor, rich]) == ""
    told = describe_missing([poor])
    assert "update RMS" in told
    assert "owner load" in told
    assert "train.diagnostics_every" in told


def test_the_command_writes_a_picture_and_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one = save(tmp_path / "runs/muon", made_up("muon"))
    two = save(tmp_path / "runs/other", made_up("other", ranks=0, factor=1.2))
    assert main(["plot", str(one), str(two / "metrics.jsonl")]) == 0
    printed = capsys.readouterr().out
    assert "written: plot.png, plot.html" in printed
    assert "2.0044" in printed
    assert "1.03 GFLOP, 1.015 x mean" in printed
    with Image.open(io.BytesIO((tmp_path / "plot.png").read_bytes())) as picture:
        assert picture.width == 2400
        assert len(picture.convert("RGB").getcolors(10**7) or ()) > 50
    page = (tmp_path / "plot.html").read_text(encoding="utf-8")
    read = read_strictly(page)
    assert len(read.images) == 1
    assert {"muon", "other"} <= set(" ".join(read.text).split())


def test_the_page_opens_in_a_browser(tmp_path: Path) -> None:
    folder = save(tmp_path / "runs/muon", made_up("muon"))
    path = tmp_path / "page.html"
    assert main(["plot", str(folder), "--html", str(path)]) == 0
    assert not (tmp_path / "plot.png").exists()
    opened = open_in_browser(path)
    assert opened.title == "Training run muon"
    assert opened.images[0][0] == 2400
    assert opened.width <= 1200
    assert (opened.requests, opened.complaints) == ((), ())


def test_json_has_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(tmp_path / "runs/muon", made_up("muon"))
    picture = tmp_path / "a.png"
    assert main(["plot", str(folder), str(folder), "--json", "--png", str(picture)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True
    assert told["written"] == [str(picture)]
    assert told["missing"] == []
    assert [run["name"] for run in told["runs"]] == [str(folder)] * 2
    assert told["runs"][0]["val_loss"] == pytest.approx(2.104375)
    assert told["runs"][0]["owner_loads"][0] == 1e9


# A line of a run.
WHOLE = to_json(StepMetrics(1, 2.0, None, 1e-3, 0.5, 1e3, 2.5, 10.0))


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (None, 2, "no such file"),
        ("", 1, "no whole line yet"),
        ('{"step": 1}\n', 1, "metrics.jsonl, line 1: 'loss' is missing. A training run writes no"),
        ("not json\n", 1, "line 1: no JSON: b'not json'"),
        ("[1]\n", 1, "line 1: no JSON object: [1]"),
        (WHOLE + WHOLE.replace("2.0", '"2.0"'), 1, "line 2: 'loss' is \"2.0\", no number"),
        (WHOLE + WHOLE.replace("2.0", "null"), 1, "line 2: 'loss' is null, no number"),
        (WHOLE + "\n", 1, "line 2: no JSON"),
        ("\N{SNOWMAN}\x00\n", 1, "line 1: no JSON"),
        (WHOLE[:-2] + ', "diagnostics": 3}\n', 1, "line 1: no JSON object: 3"),
        (WHOLE[:-2] + ', "diagnostics": {"step": 1}}\n', 1, "is missing"),
    ],
)
def test_what_is_no_run_is_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str | None,
    code: int,
    message: str,
) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert main(["plot", str(tmp_path)]) == code
    told = capsys.readouterr().err
    assert message in told
    assert "metrics.jsonl" in told
    assert "docs/errors.md#" in told


def test_figures_that_a_later_version_measures_are_left_out(tmp_path: Path) -> None:
    folder = save(tmp_path / "run", made_up("run"))
    file = folder / "metrics.jsonl"
    known = read_metrics(file)
    rows = [json.loads(each) for each in file.read_text().splitlines()]
    for row in rows:
        row["entropy"] = 0.5
        if "diagnostics" in row:
            row["diagnostics"] |= {"ranks": 4}
            row["diagnostics"]["matrices"][0] |= {"rank": 3}
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert read_metrics(file) == known
    assert main(["plot", str(folder), "--png", str(tmp_path / "plot.png")]) == 0

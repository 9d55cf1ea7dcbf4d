"""Diagnostics and loggers in the training run: what they write, and that they disturb nothing."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from distmuon.diagnostics import Diagnostics, GroupDiagnostics, MatrixDiagnostics
from distmuon.training.attention_logits import record_max_logits
from distmuon.training.config import ConfigError, Launch
from distmuon.training.config_file import load_config
from distmuon.training.loggers import CarefulLogger, flatten
from distmuon.training.loop import run_training
from distmuon.training.metrics import MetricsLog, StepMetrics, read_metrics
from distmuon.training.model import Transformer

ROOT = Path(__file__).resolve().parents[3]


def run(folder: Path, name: str, *overrides: str) -> list[StepMetrics]:
    common = ["train.steps=7", "sample.length=0", "run.save_every=0", "train.log_every=3"]
    where = [f"run.dir={folder}", f"run.name={name}"]
    config = load_config(ROOT / "configs/tiny.yaml", [*common, *where, *overrides])
    run_training(config, Launch(output="plain"))
    return read_metrics(folder / name / "metrics.jsonl")


def test_looking_changes_no_bit_of_a_run_and_every_line_says_what_was_seen(tmp_path: Path) -> None:
    quiet = run(tmp_path, "quiet")
    watched = run(tmp_path, "watched", "train.diagnostics_every=2")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("quiet", "watched"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert [line.step for line in quiet] == [1, 3, 6, 7]
    assert [line.step for line in watched] == [1, 2, 3, 4, 6, 7]
    assert all(line.diagnostics is None and line.max_logits is None for line in quiet)
    seen = {line.step: line for line in watched if line.diagnostics is not None}
    assert list(seen) == [1, 2, 4, 6]
    for step, line in seen.items():
        assert line.diagnostics is not None
        assert line.diagnostics.step == step
        muon, *others = line.diagnostics.groups
        assert 0.15 < muon.update_rms < 0.201, "0.2 at full rank"
        assert {group.algorithm for group in others} == {"adamw"}
        assert muon.lr == pytest.approx(line.lr)
        assert len(line.diagnostics.matrices) == 4
        assert all(0.97 < matrix.median < 1.03 for matrix in line.diagnostics.matrices)
        assert line.max_logits is not None
        assert list(line.max_logits) == ["layers.0.attention"]
        assert line.step_ms is not None
        assert line.step_ms > line.optimizer_ms
    raw = json.loads((tmp_path / "watched/metrics.jsonl").read_text().splitlines()[0])
    group = raw["diagnostics"]["groups"][0]
    assert group["effective_lr"] == pytest.approx(group["lr"] * group["ratio"])
    assert "diagnostics" not in (tmp_path / "quiet/metrics.jsonl").read_text()


def test_a_run_that_goes_on_measures_the_same_steps_and_sees_the_same(tmp_path: Path) -> None:
    options = ["train.diagnostics_every=3", "run.save_every=4", "run.keep_latest=0"]
    whole = run(tmp_path, "whole", *options)
    checkpoint = tmp_path / "whole/checkpoints/step-00000004"
    resumed = run(tmp_path, "resumed", *options, f"run.resume={checkpoint}")
    assert [each.step for each in resumed] == [each.step for each in whole]
    for one, two in zip(whole, resumed, strict=True):
        assert (one.diagnostics, one.max_logits) == (two.diagnostics, two.max_logits)
    assert [each.step for each in whole if each.diagnostics] == [1, 3, 6]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.name=adamw", r"train\.diagnostics_every needs optimizer\.name=muon"),
        ("train.diagnostics_every=-1", r"Invalid train\.diagnostics_every=-1\. Must be >= 0"),
        (
            "run.loggers=[paper]",
            r"Invalid run\.loggers='paper'\. Must be one of tensorboard",
        ),
    ],
)
def test_what_cannot_be_done_is_said_first(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, "x", "train.diagnostics_every=2", override)


def test_logits_are_recorded_inside_the_context_only() -> None:
    torch.manual_seed(0)
    config = load_config(None, ["model.layers=2"])
    model = Transformer(config.model, context=16)
    tokens = [torch.randint(256, (2, 16)) for _ in range(3)]
    each: list[dict[str, Tensor]] = []
    for batch in tokens[:2]:
        with record_max_logits(model) as found:
            output = model(batch)
        each.append(found)
    with record_max_logits(model) as both:
        for batch in tokens[:2]:
            model(batch)
    assert list(both) == ["layers.0.attention", "layers.1.attention"]
    for layer, largest in both.items():
        assert float(largest) == max(float(found[layer]) for found in each)
    before = dict(both)
    assert torch.equal(model(tokens[1]), output)
    model(tokens[2])
    assert both == before, "no hook is left"


def line(step: int) -> StepMetrics:
    group = GroupDiagnostics(0, "muon", 10, 0.1, 1.0, 0.2, 0.0)
    matrix = MatrixDiagnostics("w", 1, math.nan, 0.0, 1.0, 1.5)
    seen = Diagnostics(step, {"muon": 1.0}, (group,), (matrix,), (10, 30))
    logits = {"layers.0.attention": 3.5}
    return StepMetrics(step, 2.0, None, 1e-3, 0.5, 1e3, 2.5, 10.0, 4.0, seen, logits)


def test_metrics_with_numbers_that_are_none_read_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(line(1))
    assert "NaN" not in path.read_text(), "strict readers of JSON would stumble"
    (read,) = read_metrics(path)
    assert read.diagnostics is not None
    (matrix,) = read.diagnostics.matrices
    assert math.isnan(matrix.orthogonality_error)
    assert math.isnan(read.diagnostics.groups[0].ratio)
    known = replace(matrix, orthogonality_error=0.0)
    reference = line(1).diagnostics
    assert reference is not None
    assert replace(read.diagnostics, matrices=(known,)) == replace(
        reference, matrices=(replace(reference.matrices[0], orthogonality_error=0.0),)
    )


def test_a_full_disk_is_said_once_and_the_file_heals(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(line(1))
        for step in (2, 3):
            # A device that is always full; and nothing can be made in its place either.
            log._file = Path("/dev/full").open("a")
            path.with_suffix(".partial").mkdir(exist_ok=True)
            log.write(line(step))
        assert [each.step for each in read_metrics(path)] == [1]
        path.with_suffix(".partial").rmdir()
        log.write(line(4))
    assert [each.step for each in read_metrics(path)] == [1, 2, 3, 4]
    (record,) = caplog.records
    assert "No space left on device" in record.message


class Broken:
    """A place to log to that fails at its second line."""

    def __init__(self) -> None:
        self.taken: list[Mapping[str, float]] = []

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        if self.taken:
            raise ConnectionError("nobody is there")
        self.taken.append(scalars)

    def close(self) -> None:
        raise AssertionError("is not asked any more")


def test_a_logger_that_fails_warns_once_and_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    sink = Broken()
    logger = CarefulLogger("somewhere", lambda: sink)
    for step in range(1, 5):
        logger.log(line(step))
    logger.close()
    assert len(sink.taken) == 1
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "somewhere failed" in record.message
    assert "ConnectionError: nobody is there" in record.message


def test_a_logger_that_cannot_be_opened_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> Broken:
        raise PermissionError("no")

    logger = CarefulLogger("somewhere", fail)
    logger.log(line(1))
    logger.close()
    assert len(caplog.records) == 1


def test_every_figure_has_a_name() -> None:
    flat = flatten(line(1))
    assert flat["loss"] == 2.0
    assert flat["update_rms/0 muon"] == 0.2
    assert flat["singular_value_most/w"] == 1.5
    assert flat["max_logit/layers.0.attention"] == 3.5
    assert flat["owner_load/largest_over_mean"] == 1.5
    assert not {"step", "val_loss", "diagnostics"} & set(flat)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_logger_says_what_to_install(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    # What Weights & Biases leaves behind in the working directory looks like a package.
    (tmp_path / name).mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=rf"{name}, which is not installed.*distmuon\[loggers\]"):
        run(tmp_path, "x", f"run.loggers=[{name}]")


def test_tensorboard_gets_every_figure(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    lines = run(tmp_path, "x", "run.loggers=[tensorboard]", "train.diagnostics_every=3")
    events = accumulator.EventAccumulator(str(tmp_path / "x/tensorboard")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(each.step, pytest.approx(each.loss)) for each in lines]
    assert len(events.Scalars("update_rms/0 muon")) == 3


def test_tensorboard_without_a_folder_stops_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "x").mkdir()
    (tmp_path / "x/tensorboard").write_text("in the way")
    lines = run(tmp_path, "x", "run.loggers=[tensorboard]", "run.if_exists=replace")
    assert lines[-1].step == 7
    assert "tensorboard failed" in caplog.text


def test_weights_and_biases_gets_every_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    lines = run(tmp_path, "x", "run.loggers=[wandb]", "train.diagnostics_every=3")
    assert lines[-1].step == 7
    (summary,) = (tmp_path / "x/wandb").glob("offline-run-*/*.wandb")
    assert b"update_rms/0 muon" in summary.read_bytes()

"""Schedule, run folder, metrics, picture and one whole run in this process."""

from __future__ import annotations

import io
import json
import math
import shutil
from contextlib import ExitStack
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from distmuon.pictures.figure import to_png
from distmuon.training.bar import BarProgress
from distmuon.training.config import Config, ConfigError, Launch, TrainConfig
from distmuon.training.config_file import load_config
from distmuon.training.curves import LOSS, Run
from distmuon.training.data import load_corpus
from distmuon.training.loop import run_training
from distmuon.training.metrics import MetricsLog, StepMetrics, read_metrics
from distmuon.training.model import Transformer
from distmuon.training.optimizers import build_optimizer, lr_scale, state_bytes
from distmuon.training.plot import draw_runs
from distmuon.training.progress import PlainProgress, format_seconds, make_progress
from distmuon.training.resume import Start, open_folder
from distmuon.training.run_folder import RunFolder
from distmuon.training.trainer import NonFiniteError, Trainer, build_trainer
from distmuon.training.world import World

ALONE = World(0, 1, torch.device("cpu"), None)
ROOT = Path(__file__).resolve().parents[3]


def tiny(*overrides: str) -> Config:
    return load_config(ROOT / "configs/tiny.yaml", ["train.steps=4", *overrides])


def trainer(*overrides: str) -> Trainer:
    config = tiny(*overrides)
    return build_trainer(config, load_corpus(config.data), ALONE)


def metrics(step: int, loss: float = 2.0, val_loss: float | None = None) -> StepMetrics:
    return StepMetrics(step, loss, val_loss, 1e-3, 0.5, 1000.0, 2.5, 10.0 * step)


def test_the_schedule_rises_peaks_and_ends_where_it_should() -> None:
    train = TrainConfig(steps=100, warmup=0.1, final_lr=0.2)
    scales = [lr_scale(step, train) for step in range(100)]
    assert scales[0] == pytest.approx(0.1)
    assert scales[9] == 1.0
    assert scales[99] == pytest.approx(0.2)
    assert all(a < b for a, b in pairwise(scales[:10]))
    assert all(a > b for a, b in pairwise(scales[9:]))
    middle = scales[54]  # halfway down the cosine
    assert middle == pytest.approx(0.6, abs=0.01)


def test_wsd_stays_up_and_falls_along_a_line_at_the_end() -> None:
    train = TrainConfig(steps=100, warmup=0.1, schedule="wsd", cooldown=0.25, final_lr=0.2)
    scales = [lr_scale(step, train) for step in range(100)]
    assert scales[0] == pytest.approx(0.1)
    assert set(scales[9:75]) == {1.0}
    assert scales[99] == pytest.approx(0.2)
    falls = [a - b for a, b in pairwise(scales[74:])]
    assert falls == pytest.approx([0.8 / 25] * 25)


def test_linear_falls_all_the_way_and_constant_not_at_all() -> None:
    linear = TrainConfig(steps=50, warmup=0.2, schedule="linear", final_lr=0.0)
    scales = [lr_scale(step, linear) for step in range(50)]
    assert scales[9] == 1.0
    assert [a - b for a, b in pairwise(scales[9:])] == pytest.approx([1 / 40] * 40)
    constant = TrainConfig(steps=50, warmup=0.2, schedule="constant")
    assert {lr_scale(step, constant) for step in range(10, 60)} == {1.0}


def test_a_cooldown_has_to_fit_behind_the_warm_up() -> None:
    with pytest.raises(ConfigError, match=r"train.cooldown=0.6"):
        TrainConfig(warmup=0.5, schedule="wsd", cooldown=0.6)
    assert TrainConfig(warmup=0.9).cooldown == 0.2, "another schedule has none"


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "linear", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_schedule_of_a_short_run_is_finite(steps: int, schedule: Any) -> None:
    train = TrainConfig(steps=steps, warmup=0.5, schedule=schedule)
    assert all(0.0 < lr_scale(step, train) <= 1.0 for step in range(steps + 1))


def new_folder(*overrides: str) -> RunFolder:
    with ExitStack() as held:
        return open_folder(load_config(None, overrides), Start(), job=None, held=held)


def test_a_folder_is_never_written_into_twice(tmp_path: Path) -> None:
    overrides = [f"run.dir={tmp_path / 'a' / 'b'}", "run.name=x"]
    folders = [new_folder(*overrides).path.name for _ in range(3)]
    assert folders == ["x", "x-2", "x-3"]
    assert load_config(tmp_path / "a/b/x/config.yaml") == load_config(None, overrides)
    # Newest means highest, also where an older one was removed by hand.
    shutil.rmtree(tmp_path / "a/b/x-2")
    assert new_folder(*overrides).path.name == "x-4"


def test_replacing_removes_the_files_of_a_run_and_no_others(tmp_path: Path) -> None:
    overrides = [f"run.dir={tmp_path}", "run.name=x", "run.if_exists=replace"]
    folder = new_folder(*overrides)
    for file in (folder.metrics, folder.plot, folder.weights, folder.path / "notes.txt"):
        file.write_text("old")
    folder.checkpoint(5).mkdir(parents=True)
    assert new_folder(*overrides).path == folder.path
    left = {path.name for path in folder.path.iterdir()}
    assert left == {".lock", "config.yaml", "notes.txt"}


def test_a_folder_in_use_is_not_replaced(tmp_path: Path) -> None:
    overrides = [f"run.dir={tmp_path}", "run.name=x", "run.if_exists=replace"]
    folder = new_folder(*overrides)
    folder.metrics.write_text("young")
    with folder.hold(patience="none"):
        with pytest.raises(ConfigError, match=r"if_exists=replace: a running process is writing"):
            new_folder(*overrides)
    assert folder.metrics.exists()
    new_folder(*overrides)
    assert not folder.metrics.exists()


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run\.dir=.*cannot write a run here"):
        new_folder(f"run.dir={tmp_path / 'file' / 'runs'}")
    with pytest.raises(ConfigError, match=r"run\.dir=.*cannot write a run here"):
        new_folder(f"run.dir={tmp_path}", "run.name=file")


@pytest.mark.parametrize("head", ["untied", "tied"])
def test_saved_weights_load_into_a_new_model(tmp_path: Path, head: str) -> None:
    config = load_config(None, [f"model.head={head}"])
    model = Transformer(config.model, context=8)
    folder = RunFolder(tmp_path)
    folder.save_weights(model)
    saved = load_file(folder.weights)
    assert set(saved) == {name for name, _ in model.named_parameters()}
    torch.manual_seed(99)
    other = Transformer(config.model, context=8)
    other.load_state_dict(saved, strict=head == "untied")
    tokens = torch.arange(8)[None]
    assert torch.equal(model(tokens), other(tokens))


def test_saved_weights_hold_no_more_than_the_weights(tmp_path: Path) -> None:
    # Muon makes every parameter a view of one flat buffer; a file must not hold the buffer.
    run = trainer()
    run.step(0)
    folder = RunFolder(tmp_path)
    folder.save_weights(run.model)
    count = sum(parameter.numel() for parameter in run.model.parameters())
    assert 4 * count < folder.weights.stat().st_size < 4 * count + 4096


def test_metrics_are_in_the_file_at_once_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(metrics(1))
        log.write(metrics(2, val_loss=1.5))
        # Before the file is closed: a killed run keeps its lines.
        assert read_metrics(path) == [metrics(1), metrics(2, val_loss=1.5)]
    assert json.loads(path.read_text().splitlines()[0])["val_loss"] is None


def test_a_log_begins_with_the_lines_of_the_sitting_before(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step in (1, 2, 3):
            log.write(metrics(step))
    # Killed while it wrote.
    path.write_text(path.read_text() + '{"step": 4, "lo')
    kept = [line for line in read_metrics(path) if line.step <= 2]
    with MetricsLog(path, kept) as log:
        log.write(metrics(3, loss=1.0))
    assert read_metrics(path) == [metrics(1), metrics(2), metrics(3, loss=1.0)] == log.lines
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_picture_is_a_png_even_for_one_point() -> None:
    picture = to_png(draw_runs([Run("one", (metrics(1, val_loss=2.0),))], (LOSS,)))
    assert picture.startswith(b"\x89PNG")


def test_plain_lines_hold_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    with make_progress(steps=200, output="plain") as view:
        assert isinstance(view, PlainProgress)
        view.advance()
        view.show(metrics(50, loss=2.345, val_loss=1.25))
    line = capsys.readouterr().out
    assert line == (
        "step  50/200  loss 2.3450  val 1.2500  lr 1.00e-03  1,000 tokens/s  "
        "optimizer 2.5 ms  eta 25:00\n"
    )


def test_a_terminal_gets_a_bar_unless_lines_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert isinstance(make_progress(steps=3, output="terminal"), BarProgress)
    assert isinstance(make_progress(steps=3, output="plain"), PlainProgress)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (65.0, "1:05"), (3665.0, "1:01:05"), (59.9, "1:00")]
)
def test_durations_read_like_a_clock(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_accumulated_passes_give_the_step_of_one_pass(name: str) -> None:
    whole = trainer("train.batch=6", f"optimizer.name={name}")
    parts = trainer("train.batch=6", "train.accumulation=3", f"optimizer.name={name}")
    for step in range(2):
        first, second = whole.step(step), parts.step(step)
        assert first.loss == pytest.approx(second.loss, rel=1e-5)
        assert first.grad_norm == pytest.approx(second.grad_norm, rel=1e-4)
    assert whole.validate() == pytest.approx(parts.validate(), rel=1e-4)


def test_both_optimizers_decay_the_same_parameters() -> None:
    decays = {}
    for name in ("muon", "adamw"):
        config = tiny(f"optimizer.name={name}", "optimizer.weight_decay=0.3")
        model = Transformer(config.model, context=8)
        names = {parameter: fqn for fqn, parameter in model.named_parameters()}
        optimizer = build_optimizer(model, config.optimizer, ALONE)
        decays[name] = {
            names[parameter]: group["weight_decay"]
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
    assert decays["muon"] == decays["adamw"]
    assert decays["muon"]["norm.weight"] == 0.0
    assert decays["muon"]["layers.0.mlp.up_proj.weight"] == 0.3


def test_state_bytes_counts_both_averages_of_adamw() -> None:
    parameter = nn.Parameter(torch.zeros(10, 10))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert 800 <= state_bytes(optimizer) <= 816  # two float32 tensors and a step count


def test_an_option_that_the_optimizer_refuses_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r"optimizer: .*kellner"):
        trainer("optimizer.ns_coefficients=kellner")


def test_clipping_bounds_the_gradient_and_reports_it_unclipped() -> None:
    clipped = trainer("train.clip=0.01", "optimizer.name=adamw")
    free = trainer("train.clip=0", "optimizer.name=adamw")
    assert clipped.step(0).grad_norm == free.step(0).grad_norm > 0.01
    total = torch.nn.utils.get_total_norm([p.grad for p in clipped.model.parameters()])  # type: ignore[misc]
    assert float(total) == pytest.approx(0.01, rel=1e-3)
    total = torch.nn.utils.get_total_norm([p.grad for p in free.model.parameters()])  # type: ignore[misc]
    assert float(total) > 0.1


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(name: str) -> None:
    run = trainer(f"optimizer.name={name}")
    run.step(0)
    with torch.no_grad():
        run.model.lm_head.weight[0, 0] = math.inf
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    with pytest.raises(NonFiniteError, match=r"Step 2: loss (nan|inf)"):
        run.step(1)
    for key, value in run.model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize(
    ("measure", "name"), [("exact", "muon"), ("bound", "muon"), ("exact", "normuon")]
)
def test_attention_logits_are_clipped_and_told(measure: str, name: str) -> None:
    common = f"optimizer.name={name}", "optimizer.lr=0.05"
    measured = trainer("qk_clip.threshold=inf", *common)
    clipped = trainer("qk_clip.threshold=1.5", f"qk_clip.measure={measure}", *common)
    assert trainer().step(0).qk_clip is None
    runs = [[each.step(step).qk_clip for step in range(4)] for each in (measured, clipped)]
    assert all(logits["clipped_heads"] == 0 for logits in runs[0])
    assert runs[0][-1]["max_logit"] > 2 * runs[1][-1]["max_logit"]
    assert runs[1][0]["clipped_heads"] == 2
    if measure == "exact":
        assert runs[0][0]["max_logit"] == runs[1][0]["max_logit"]
    else:
        assert runs[0][0]["max_logit"] < runs[1][0]["max_logit"]


def test_the_largest_logit_of_all_passes_counts() -> None:
    whole = trainer("train.batch=6", "qk_clip.threshold=1.5")
    parts = trainer("train.batch=6", "train.accumulation=3", "qk_clip.threshold=1.5")
    for step in range(2):
        first, second = whole.step(step).qk_clip, parts.step(step).qk_clip
        assert first["max_logit"] == pytest.approx(second["max_logit"], rel=1e-4)
        whole.validate()  # is not observed
    assert first["clipped_heads"] == second["clipped_heads"] == 2


def test_what_cannot_clip_says_so() -> None:
    with pytest.raises(
        ConfigError, match=r"qk_clip needs optimizer.name=muon or normuon, not adamw"
    ):
        trainer("qk_clip.threshold=30", "optimizer.name=adamw")
    with pytest.raises(
        ConfigError, match=r"qk_clip needs run.engine=native or accelerate, not dee"
    ):
        trainer("qk_clip.threshold=30", "run.engine=deepspeed")


def test_bfloat16_trains_in_float32_weights() -> None:
    run = trainer("train.precision=bfloat16", "train.batch=2")
    assert math.isfinite(run.step(0).loss)
    assert all(parameter.dtype == torch.float32 for parameter in run.model.parameters())


def test_a_whole_run_in_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny(f"run.dir={tmp_path}", "train.log_every=3", "train.eval_every=2")
    run_training(config, Launch(output="plain"))
    lines = read_metrics(tmp_path / "tiny" / "metrics.jsonl")
    assert [line.step for line in lines] == [1, 2, 3, 4]
    assert [line.val_loss is None for line in lines] == [True, False, True, False]
    assert [line.elapsed_s for line in lines] == sorted(line.elapsed_s for line in lines)
    printed = capsys.readouterr().out
    assert "Muon orthogonalized 6 matrices x 4 steps = 24 of 24\n" in printed
    assert f"validation loss {lines[-1].val_loss:.4f}" in printed


@pytest.mark.parametrize("key", ["model.dim=1000000000000", "model.mlp_ratio=1" + 21 * "0"])
def test_a_model_that_does_not_fit_is_a_configuration_error(key: str) -> None:
    config = tiny(key)
    with pytest.raises(ConfigError, match=rf"with .*{key}.* cannot be made: .* Make it smaller"):
        build_trainer(config, load_corpus(config.data), World(0, 1, torch.device("cpu"), None))


def test_the_bar_shows_every_figure_in_80_columns() -> None:
    console = Console(width=80, force_terminal=True, record=True, file=io.StringIO())
    with BarProgress(800, console) as bar:
        for _ in range(333):
            bar.advance()
        bar.show(StepMetrics(330, 1.7151, None, 5.06e-3, 0.5, 124423.0, 122.6, 39.0))
    shown = console.export_text()
    assert "333/800" in shown
    assert "loss 1.7151 lr 5.1e-03 124,423 tok/s optimizer 122.6 ms eta" in shown


@pytest.mark.skipif(find_spec("pytorch_optimizer") is None, reason="needs distmuon[compare]")
@pytest.mark.filterwarnings("ignore:Using backward")
def test_second_derivatives_reach_an_optimizer_that_takes_them() -> None:
    run = trainer("optimizer.name=sophia", "optimizer.lr=0.01")
    losses = [run.step(step).loss for step in range(3)]
    assert losses[-1] < losses[0]
    weight = next(run.model.parameters())
    assert float(run.optimizer.state[weight]["hessian_moment"].abs().sum()) > 0

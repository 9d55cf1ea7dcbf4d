"""`distmuon init` writes what `distmuon train` takes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distmuon.cli.init import starter
from distmuon.cli.main import main
from distmuon.training.config import Config
from distmuon.training.config_file import load_config
from distmuon.training.keys import describe_keys
from distmuon.training.loop import Recorder
from distmuon.training.metrics import StepMetrics
from distmuon.training.trainer import NonFiniteError

ROOT = Path(__file__).parents[3]
# Two steps of a model of a few thousand parameters.
SMALL = ["model.layers=1", "model.dim=16", "model.heads=2", "data.source=pydoc", "data.context=16"]
SMALL += ["data.val_windows=8", "train.steps=2", "sample.length=0", "run.save_every=0"]


def test_the_file_is_the_defaults_and_explains_every_key(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    assert main(["init", str(file)]) == 0
    assert load_config(file) == Config()
    text = file.read_text()
    for info in describe_keys():
        assert f"  {info.name.split('.')[1]}: {info.default}\n" in text
    words = " ".join(text.replace("#", " ").split())
    for info in describe_keys():
        assert " ".join(info.meaning.split()) in words, info.name


@pytest.mark.parametrize("name", ["yes", "null", "On", "a b", "7", "1e3", "- x", "ä"])
def test_values_that_yaml_would_read_as_something_else(tmp_path: Path, name: str) -> None:
    file = tmp_path / "run.yaml"
    config = Config(run=replace(Config().run, name=name))
    file.write_text(starter(config), encoding="utf-8")
    assert load_config(file) == config


def test_an_existing_file_is_overwritten_only_by_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "optimizer.lr=0.02", "model.dim=32"]) == 0
    before = Path("distmuon.yaml").read_text()
    assert main(["init"]) == 2
    assert "--force" in capsys.readouterr().err
    assert Path("distmuon.yaml").read_text() == before
    assert load_config("distmuon.yaml").optimizer.lr == 0.02
    assert main(["init", "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["written"] == "distmuon.yaml"
    assert load_config("distmuon.yaml") == Config()
    assert main(["init", "other.yaml", "optimizer.rl=1"]) == 2
    assert "'optimizer.lr'" in capsys.readouterr().err
    assert not Path("other.yaml").exists()
    assert main(["init", "no/such/folder/x.yaml"]) == 2


def start(*arguments: str, folder: Path, several: bool = False) -> str:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *(launcher if several else []), "-m", "distmuon", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("several", [False, True], ids=["one process", "torchrun"])
def test_the_file_trains_two_steps(tmp_path: Path, several: bool) -> None:
    start("init", "run.yaml", *SMALL, folder=tmp_path)
    said = start("train", "--config", "run.yaml", folder=tmp_path, several=several)
    assert "step 2/2" in said
    assert f"ranks      {1 + several} on" in said
    assert ("-m distmuon train --config run.yaml" in said) == (not several), "the hint"
    assert (tmp_path / "runs" / "run" / "model.safetensors").exists()


def test_train_hands_its_arguments_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("usage: distmuon train")
    assert "optimizer.lr=" in said.out
    assert "hint" not in said.err
    assert main(["train", "optimizer.rl=1", "--config", "x"]) == 2
    assert "hint: this is one process" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["init", "--bogus"])
    assert "unrecognized arguments: --bogus" in capsys.readouterr().err


def train_for_programs(
    capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str
) -> tuple[int, list[dict[str, Any]], str]:
    given = [*SMALL, f"run.dir={folder}", "train.log_every=1", *arguments]
    code = main(["train", "--json", *given])
    said = capsys.readouterr()
    return code, [json.loads(line) for line in said.out.splitlines()], said.err


def test_train_hands_out_its_metrics_and_what_it_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, answers, words = train_for_programs(capsys, tmp_path)
    assert code == 0
    *lines, last = answers
    file = tmp_path / "run/metrics.jsonl"
    assert lines == [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert next(iter(last)) == "ok"
    assert (last["ok"], last["finished"], last["step"]) == (True, True, 2)
    assert last["val_loss"] == lines[-1]["val_loss"]
    assert last["folder"] == str(tmp_path / "run")
    assert all(Path(each).exists() for each in last["files"])
    assert last["optimizer"]["orthogonalized"] == last["optimizer"]["expected"] == 12
    assert last["optimizer"]["state_bytes"][0] > 0
    for told in ("text       ", "step 2/2  loss", "Muon orthogonalized 6 matrices x 2 steps"):
        assert told in words

    code, answers, _ = train_for_programs(capsys, tmp_path, "optimizer.name=adamw")
    assert code == 0
    assert set(answers[-1]["optimizer"]) == {"name", "state_bytes"}


def test_train_tells_programs_what_went_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, answers, words = train_for_programs(capsys, tmp_path, "optimizer.rl=1")
    assert code == 2
    ((ok, error),) = (answer.values() for answer in answers)
    assert not ok
    assert "unknown key 'optimizer.rl'" in error
    assert error in words

    arguments = [*SMALL, f"run.dir={tmp_path}", "train.log_every=1"]
    arguments += ["optimizer.lr=1e30", "optimizer.weight_decay=0"]
    with pytest.raises(NonFiniteError):
        main(["train", "--json", *arguments])
    *_, last = capsys.readouterr().out.splitlines()
    told = json.loads(last)
    assert not told["ok"]
    assert told["error"].startswith("NonFiniteError: ")


def test_a_stopped_run_says_where_it_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(recorder: Recorder, metrics: StepMetrics) -> None:
        hand_on(recorder, metrics)
        if metrics.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    hand_on = Recorder.record
    monkeypatch.setattr(Recorder, "record", record)
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    try:
        longer = ("train.steps=4", "run.save_every=4")
        code, answers, _ = train_for_programs(capsys, tmp_path, *longer)
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), handlers, strict=True):
            signal.signal(number, handler)
    assert code == 0
    last = answers[-1]
    assert (last["ok"], last["finished"], last["step"]) == (True, False, 2)
    assert last["stopped_by"] == "SIGTERM"
    assert Path(last["checkpoint"]).is_dir()


def test_metrics_that_are_damaged_are_not_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_for_programs(capsys, tmp_path, "run.save_every=1")[0] == 0
    file = tmp_path / "run/metrics.jsonl"
    damaged = file.read_text().replace('"loss"', '"loos"', 1)
    file.write_text(damaged)
    again = ("train.steps=3", "run.save_every=1", f"run.resume={tmp_path / 'run'}")
    code, answers, _ = train_for_programs(capsys, tmp_path, *again)
    assert code == 2
    assert "metrics.jsonl, line 1: 'loss' is missing" in answers[-1]["error"]
    assert file.read_text() == damaged

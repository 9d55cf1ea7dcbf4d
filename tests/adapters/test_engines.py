"""The training run under Accelerate: the same YAML, the same losses."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("accelerate", reason="needs the extra distmuon[accelerate]")
pytest.importorskip("omegaconf", reason="needs the extra distmuon[train]")

from distmuon.training.config import Config, ConfigError
from distmuon.training.config_file import load_config
from distmuon.training.data import load_corpus
from distmuon.training.metrics import Progress, read_metrics
from distmuon.training.snapshot import load_snapshot, save_snapshot
from distmuon.training.trainer import build_trainer
from distmuon.training.world import World
from tests.adapters.launched import as_launched
from tests.harness import run_ranks

ROOT = Path(__file__).resolve().parents[2]


def tiny(*overrides: str) -> Config:
    return load_config(str(ROOT / "configs/tiny.yaml"), [*overrides, "train.accumulation=2"])


def losses(config: Config) -> list[tuple[float, float, float]]:
    as_launched()
    group = dist.group.WORLD if dist.get_world_size() > 1 else None
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), group)
    trainer = build_trainer(config, load_corpus(config.data), world)
    steps = [trainer.step(step) for step in range(20)]
    assert type(trainer.engine).__name__.lower() == f"{config.run.engine}engine"
    return [(each.loss, each.grad_norm, each.lr) for each in steps]


@pytest.mark.parametrize("world_size", [1, 2])
def test_twenty_steps_have_the_same_losses_norms_and_rates(world_size: int) -> None:
    config = tiny("train.clip=0.5", "run.device=cpu")
    under = replace(config, run=replace(config.run, engine="accelerate"))
    native = run_ranks(world_size, losses, config)
    accelerated = run_ranks(world_size, losses, under)
    assert native[0][0][1] > 0.5, "nothing was clipped"
    for here, there in zip(native, accelerated, strict=True):
        for mine, theirs in zip(here, there, strict=True):
            assert theirs == pytest.approx(mine, abs=1e-5)


def changes_horses(config: Config, under: Config, folder: Path) -> list[tuple[float, float]]:
    """Losses of steps 6 to 10, native all the way and under Accelerate from a native checkpoint."""
    as_launched()
    world = World(dist.get_rank(), 2, torch.device("cpu"), dist.group.WORLD)
    corpus = load_corpus(config.data)
    native = build_trainer(config, corpus, world)
    for step in range(5):
        native.step(step)
    save_snapshot(native, Progress(step=5), folder / "step-5", text=corpus.fingerprint())
    accelerated = build_trainer(under, corpus, world)
    load_snapshot(accelerated, folder / "step-5")
    return [(native.step(step).loss, accelerated.step(step).loss) for step in range(5, 10)]


def test_a_run_goes_on_under_another_engine(tmp_path: Path) -> None:
    config = tiny("run.device=cpu")
    under = replace(config, run=replace(config.run, engine="accelerate"))
    for pairs in run_ranks(2, changes_horses, config, under, tmp_path):
        assert all(native == accelerated for native, accelerated in pairs)


def adamw_refused(config: Config) -> str:
    with pytest.raises(ConfigError) as caught:
        losses(config)
    return str(caught.value)


def test_adamw_under_accelerate_is_refused() -> None:
    config = tiny("optimizer.name=adamw", "run.engine=accelerate", "run.device=cpu")
    for said in run_ranks(2, adamw_refused, config):
        assert "optimizer.name=muon" in said


def unlaunched(config: Config) -> str:
    """Ranks that only torch.distributed knows of."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), dist.group.WORLD)
    with pytest.raises(ConfigError) as caught:
        build_trainer(config, load_corpus(config.data), world)
    return str(caught.value)


def test_ranks_that_accelerate_does_not_see_are_an_error() -> None:
    for said in run_ranks(2, unlaunched, tiny("run.engine=accelerate", "run.device=cpu")):
        assert "sees 1 processes" in said


@pytest.mark.slow
def test_the_command_under_accelerate_launch(tmp_path: Path) -> None:
    variables = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    variables |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CI": "1"}
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    config = ["--config_file", str(ROOT / "configs/accelerate/cpu.yaml")]
    script = [str(ROOT / "launch/train_accelerate.py"), "--config", str(ROOT / "configs/tiny.yaml")]
    done = subprocess.run(
        [*launcher, *config, *script, "train.log_every=1"],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "under ZeRO-1 on 2 ranks" in done.stdout
    assert "engine: accelerate" in (tmp_path / "runs/tiny/config.yaml").read_text()
    assert len(read_metrics(tmp_path / "runs/tiny/metrics.jsonl")) == 20


def test_accelerate_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distmuon.training.engines.find_spec", lambda _: None)
    config = tiny("run.engine=accelerate", "run.device=cpu")
    with pytest.raises(ConfigError, match=r"distmuon\[accelerate\]"):
        build_trainer(config, load_corpus(config.data), World(0, 1, torch.device("cpu"), None))

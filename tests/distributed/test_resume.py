"""A run in two sittings is the run in one: same bits on the same ranks, same losses on others."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from distmuon import checkpoint
from distmuon.training.config import Config, ConfigError, Launch
from distmuon.training.config_file import load_config
from distmuon.training.data import load_corpus
from distmuon.training.loop import run_in_world
from distmuon.training.metrics import StepMetrics, read_metrics
from distmuon.training.run_folder import RunFolder
from distmuon.training.signals import StopSignals
from distmuon.training.trainer import StepResult, Trainer
from distmuon.training.world import World
from tests.harness import run_ranks

ROOT = Path(__file__).resolve().parents[2]
# A line of metrics after steps 1, 3, 6, 8 (validation), 9 and 10: one spans the checkpoint of 4.
STEPS = ("train.steps=10", "train.log_every=3", "train.eval_every=8", "sample.length=0")
SAVING = ("run.save_every=4", "run.keep_latest=0", "run.name=x", "run.seed=3")


def configure(folder: Path, *overrides: str) -> Config:
    return load_config(
        ROOT / "configs/tiny.yaml", [f"run.dir={folder}", *STEPS, *SAVING, *overrides]
    )


def sit(config: Config, launch: Launch | None = None) -> str:
    """One sitting of a run, on every rank of the harness; returns a ConfigError's text."""
    rank, size = dist.get_rank(), dist.get_world_size()
    world = World(rank, size, torch.device("cpu"), dist.group.WORLD if size > 1 else None)
    with StopSignals(notice="silent") as signals:
        try:
            corpus = load_corpus(config.data)
            run_in_world(config, corpus, world, launch or Launch(output="plain"), signals)
        except ConfigError as error:
            return str(error)
    return ""


def folder_of(config: Config) -> RunFolder:
    return RunFolder(Path(config.run.dir) / config.run.name)


def cut_short(source: Path, target: Path, *, step: int) -> RunFolder:
    """Make of a finished run what it was when it was killed, some time after a checkpoint."""
    shutil.copytree(source, target)
    folder = RunFolder(target)
    folder.weights.unlink()
    for path in folder.checkpoints.iterdir():
        if path != folder.checkpoint(step):
            shutil.rmtree(path)
    return folder


def without_times(lines: Sequence[StepMetrics]) -> list[dict[str, object]]:
    timed = ("tokens_per_s", "optimizer_ms", "step_ms", "elapsed_s")
    return [{k: v for k, v in asdict(line).items() if k not in timed} for line in lines]


def assert_same_run(one: Path, other: Path) -> None:
    """Bitwise: the measurements, the weights, and the optimizer's state at the end."""
    first, second = RunFolder(one), RunFolder(other)
    lines = read_metrics(second.metrics)
    assert without_times(lines) == without_times(read_metrics(first.metrics))
    assert [line.elapsed_s for line in lines] == sorted(line.elapsed_s for line in lines)
    assert second.weights.read_bytes() == first.weights.read_bytes()
    last = checkpoint.latest(first.checkpoints)
    assert last is not None
    shards = sorted(path.name for path in last.glob("*.safetensors"))
    assert shards
    for name in shards:
        here, there = load_file(last / name), load_file(second.checkpoints / last.name / name)
        assert here.keys() == there.keys()
        for key, tensor in here.items():
            assert torch.equal(tensor, there[key]), key


def sit_both_ways(config: Config, other: Config) -> list[str]:
    """Train without an interruption, then once more from the middle of a copy."""
    told = [sit(config)]
    if dist.get_rank() == 0:
        cut_short(folder_of(config).path, folder_of(other).path, step=4)
    dist.barrier()
    return [*told, sit(other)]


@pytest.fixture(scope="module", params=["muon", "adamw"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of one sitting, and with one of two; both on two ranks."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    name = f"optimizer.name={request.param}"
    configs = configure(folder / "one", name), configure(folder / "two", name)
    assert run_ranks(2, sit_both_ways, *configs) == [["", ""]] * 2
    return folder


def test_two_sittings_are_one_run_bitwise(runs: Path) -> None:
    kept = sorted(path.name for path in RunFolder(runs / "one/x").checkpoints.iterdir())
    assert kept == ["step-00000004", "step-00000008", "step-00000010"]
    assert [path.name for path in (runs / "two").iterdir()] == ["x"], "it goes on in its own folder"
    assert_same_run(runs / "one/x", runs / "two/x")


def test_two_sittings_clip_the_same_attention_logits(tmp_path: Path) -> None:
    configs = [configure(tmp_path / each, "qk_clip.threshold=0.3") for each in ("one", "two")]
    assert run_ranks(2, sit_both_ways, *configs) == [["", ""]] * 2
    lines = read_metrics(tmp_path / "one/x/metrics.jsonl")
    assert any(line.qk_clip["clipped_heads"] for line in lines if line.qk_clip and line.step > 4)
    assert_same_run(tmp_path / "one/x", tmp_path / "two/x")


@pytest.mark.parametrize("ranks", [1, 3])
def test_other_ranks_go_on_with_the_same_losses(runs: Path, tmp_path: Path, ranks: int) -> None:
    cut_short(runs / "one/x", tmp_path / "x", step=4)
    config = configure(tmp_path, f"optimizer.name={optimizer_of(runs / 'one/x')}")
    assert run_ranks(ranks, sit, config) == [""] * ranks
    there, here = (read_metrics(path / "x/metrics.jsonl") for path in (runs / "one", tmp_path))
    assert [line.step for line in here] == [line.step for line in there] == [1, 3, 6, 8, 9, 10]
    for first, second in zip(there, here, strict=True):
        assert second.lr == first.lr
        # A lost momentum or a wrong batch shows in the third digit at the latest.
        assert second.loss == pytest.approx(first.loss, rel=1e-6)
    weights = load_file(tmp_path / "x/model.safetensors")
    for name, tensor in load_file(runs / "one/x/model.safetensors").items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5)


def optimizer_of(run: Path) -> str:
    return load_config(run / "config.yaml").optimizer.name


def sit_through_signals(config: Config, whole: Config) -> list[str]:
    """Be told to stop on one rank only and again while saving; go on; then all in one sitting."""
    step, save = Trainer.step, checkpoint.save

    def signalled(self: Trainer, number: int) -> StepResult:
        if dist.get_rank() == 1 and number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number)

    def interrupted(*args: Any, **kwargs: Any) -> checkpoint.PendingSave:
        os.kill(os.getpid(), signal.SIGINT)
        pending = save(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGTERM)
        return pending

    Trainer.step, checkpoint.save = signalled, interrupted  # type: ignore[method-assign]
    told = [sit(config)]
    Trainer.step, checkpoint.save = step, save  # type: ignore[method-assign]
    os.kill(os.getpid(), signal.SIGTERM)  # a late one must not kill a rank that has saved
    if dist.get_rank() == 0:
        folder = folder_of(config)
        told += [path.name for path in folder.checkpoints.iterdir()]
        told += [str(line.step) for line in read_metrics(folder.metrics)]
        told += [str(folder.weights.exists())]
    dist.barrier()
    return [*told, sit(config), sit(whole)]


def test_one_ranks_signal_stops_all_after_the_same_step(tmp_path: Path) -> None:
    configs = [configure(tmp_path / name, "run.save_every=100") for name in ("two", "one")]
    first, second = run_ranks(2, sit_through_signals, *configs)
    assert first == ["", "step-00000003", "1", "3", "False", "", ""]
    assert second == ["", "", ""]
    assert_same_run(tmp_path / "one/x", tmp_path / "two/x")


def test_all_ranks_refuse_a_damaged_checkpoint_together(runs: Path, tmp_path: Path) -> None:
    folder = cut_short(runs / "one/x", tmp_path / "x", step=4)
    shard = sorted(folder.checkpoint(4).glob("*.safetensors"))[-1]
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    wanted = (f"run.resume={tmp_path / 'x'}", f"optimizer.name={optimizer_of(runs / 'one/x')}")
    texts = run_ranks(2, sit, configure(tmp_path, *wanted))
    assert all(text.startswith("run.resume: ") and shard.name in text for text in texts), texts
    assert [path.name for path in tmp_path.iterdir()] == ["x"], "no folder for a run that is none"

"""A run in two sittings is the run in one: same bits on the same ranks, same losses on others."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from distmuon import checkpoint
from distmuon.training import snapshot
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


def train(ranks: int, config: Config) -> None:
    assert run_ranks(ranks, sit, config) == [""] * ranks


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
    timed = ("tokens_per_s", "optimizer_ms", "elapsed_s")
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


@pytest.fixture(scope="module", params=["muon", "adamw"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks that nothing interrupted."""
    folder = tmp_path_factory.mktemp(request.param)
    train(2, configure(folder, f"optimizer.name={request.param}"))
    kept = sorted(path.name for path in (folder / "x/checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000008", "step-00000010"]
    return folder / "x"


def optimizer_of(run: Path) -> str:
    return f"optimizer.name={load_config(run / 'config.yaml').optimizer.name}"


def test_two_sittings_are_one_run_bitwise(whole: Path, tmp_path: Path) -> None:
    cut_short(whole, tmp_path / "x", step=4)
    train(2, configure(tmp_path, optimizer_of(whole)))
    assert [path.name for path in tmp_path.iterdir()] == ["x"], "it goes on in its own folder"
    assert_same_run(whole, tmp_path / "x")


@pytest.mark.parametrize("ranks", [1, 3])
def test_other_ranks_go_on_with_the_same_losses(whole: Path, tmp_path: Path, ranks: int) -> None:
    cut_short(whole, tmp_path / "x", step=4)
    train(ranks, configure(tmp_path, optimizer_of(whole)))
    there, here = read_metrics(whole / "metrics.jsonl"), read_metrics(tmp_path / "x/metrics.jsonl")
    assert [line.step for line in here] == [line.step for line in there] == [1, 3, 6, 8, 9, 10]
    for first, second in zip(there, here, strict=True):
        assert second.lr == first.lr
        # Measured: 2e-7. A lost momentum or a wrong batch shows in the second digit.
        assert second.loss == pytest.approx(first.loss, rel=1e-5)
    weights = load_file(tmp_path / "x/model.safetensors")
    for name, tensor in load_file(whole / "model.safetensors").items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4)


def sit_with_signals(config: Config, twice: str) -> str:
    """Rank 1 is told to stop in its third step, rank 0 never, or again while it saves."""
    rank = dist.get_rank()
    step, save = Trainer.step, checkpoint.save

    def signalled(self: Trainer, number: int) -> StepResult:
        if rank == 1 and number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number)

    def interrupted(*args: object, **kwargs: object) -> object:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        return save(*args, **kwargs)  # type: ignore[arg-type]

    Trainer.step = signalled  # type: ignore[method-assign]
    if twice == "again":
        snapshot.checkpoint.save = interrupted  # type: ignore[assignment]
    text = sit(config)
    handler = signal.getsignal(signal.SIGTERM)
    deaf = getattr(handler, "__self__", None)
    return text or ("deaf" if isinstance(deaf, StopSignals) else "listening")


@pytest.mark.parametrize("twice", ["once", "again"])
def test_one_ranks_signal_stops_all_after_the_same_step(tmp_path: Path, twice: str) -> None:
    config = configure(tmp_path, "run.save_every=100")
    told = run_ranks(2, sit_with_signals, config, twice)
    assert told == ["deaf", "deaf"], "a late second signal must not kill a rank that has saved"
    folder = RunFolder(tmp_path / "x")
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step-00000003"]
    assert not folder.weights.exists()
    assert [line.step for line in read_metrics(folder.metrics)] == [1, 3]
    if twice == "again":
        return
    train(2, config)
    train(2, configure(tmp_path / "whole", "run.save_every=100"))
    assert_same_run(tmp_path / "whole/x", tmp_path / "x")


def test_a_signal_in_the_last_step_ends_the_run_as_usual(tmp_path: Path) -> None:
    config = configure(tmp_path, "train.steps=3")
    assert run_ranks(2, sit_with_signals, config, "once") == ["listening", "listening"]
    assert RunFolder(tmp_path / "x").weights.exists()


def test_all_ranks_refuse_a_damaged_checkpoint_together(whole: Path, tmp_path: Path) -> None:
    folder = cut_short(whole, tmp_path / "x", step=4)
    shard = sorted(folder.checkpoint(4).glob("*.safetensors"))[-1]
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    path = f"run.resume={folder.checkpoint(4)}"
    texts = run_ranks(2, sit, configure(tmp_path, optimizer_of(whole), path))
    assert all(text.startswith("run.resume: ") and shard.name in text for text in texts), texts
    assert [path.name for path in tmp_path.iterdir()] == ["x"], "no folder for a run that is none"


@contextmanager
def held(folder: RunFolder) -> Iterator[None]:
    with folder.hold(patience="none"):
        yield

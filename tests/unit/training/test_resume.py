"""Which folder and which checkpoint a run begins with, on one process."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from distmuon import checkpoint
from distmuon.training.config import Config, ConfigError, Launch
from distmuon.training.config_file import load_config
from distmuon.training.keys import describe_keys
from distmuon.training.loop import run_training
from distmuon.training.metrics import read_metrics
from distmuon.training.run_folder import RunFolder
from distmuon.training.trainer import StepResult, Trainer
from distmuon.training.world import meet

ROOT = Path(__file__).resolve().parents[3]
SMALL = ("train.steps=4", "train.log_every=1", "data.val_windows=4", "sample.length=0")


def configure(folder: Path, *overrides: str) -> Config:
    fixed = (f"run.dir={folder}", "run.name=x", "run.save_every=2")
    return load_config(ROOT / "configs/tiny.yaml", [*SMALL, *fixed, *overrides])


def train(folder: Path, *overrides: str, job: str | None = None) -> None:
    run_training(configure(folder, *overrides), Launch(output="plain", job=job))


def refusal(folder: Path, *overrides: str) -> str:
    before = sorted(folder.rglob("*"))
    with pytest.raises(ConfigError) as caught:
        train(folder, *overrides)
    assert sorted(folder.rglob("*")) == before, "a refused run leaves no trace"
    return str(caught.value)


def interrupt(folder: RunFolder, *, step: int = 2) -> None:
    """Make of a finished run one that was killed after a step."""
    folder.weights.unlink()
    for path in folder.checkpoints.iterdir():
        if path != folder.checkpoint(step):
            shutil.rmtree(path)


@pytest.fixture
def interrupted(tmp_path: Path) -> RunFolder:
    train(tmp_path)
    interrupt(RunFolder(tmp_path / "x"))
    return RunFolder(tmp_path / "x")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def steps(folder: Path) -> list[int]:
    return [line.step for line in read_metrics(folder / "metrics.jsonl")]


def test_the_same_command_twice_makes_two_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path)
    train(tmp_path)
    assert names(tmp_path) == ["x", "x-2"]
    printed = capsys.readouterr().out
    assert "resumes" not in printed
    assert f"saves      {tmp_path}/x/checkpoints every 2 steps and on Ctrl-C, newest 2" in printed


def test_after_an_interruption_the_same_command_goes_on(
    interrupted: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path)
    assert names(tmp_path) == ["x"]
    assert steps(interrupted.path) == [1, 2, 3, 4]
    assert interrupted.weights.exists()
    where = f"resumes    after step 2 of {interrupted.checkpoint(2)} (saved by 1 rank)"
    assert where in capsys.readouterr().out


def test_a_scaled_update_goes_on_with_its_own_scale_only(tmp_path: Path) -> None:
    scale = "optimizer.update_scale=0.5"
    train(tmp_path, scale)
    whole = (tmp_path / "x" / "model.safetensors").read_bytes()
    interrupt(RunFolder(tmp_path / "x"))
    assert "optimizer.update_scale is 0.5 there, 0.25 here" in refusal(
        tmp_path, "optimizer.update_scale=0.25"
    )
    train(tmp_path, scale)
    assert (tmp_path / "x" / "model.safetensors").read_bytes() == whole


def test_only_the_newest_run_of_a_name_goes_on(interrupted: RunFolder, tmp_path: Path) -> None:
    train(tmp_path, "run.resume=never")
    train(tmp_path)
    assert names(tmp_path) == ["x", "x-2", "x-3"]
    assert not interrupted.weights.exists()


def test_a_run_without_a_checkpoint_is_left_alone(tmp_path: Path) -> None:
    train(tmp_path, "run.save_every=0")
    assert not RunFolder(tmp_path / "x").checkpoints.exists()
    RunFolder(tmp_path / "x").weights.unlink()
    train(tmp_path)
    assert names(tmp_path) == ["x", "x-2"]


def test_a_run_that_is_running_is_left_alone(interrupted: RunFolder, tmp_path: Path) -> None:
    with interrupted.hold(patience="none"):
        train(tmp_path)
    assert names(tmp_path) == ["x", "x-2"]


def test_a_job_that_torchrun_starts_again_finds_its_own_folder(tmp_path: Path) -> None:
    train(tmp_path, job="a")
    train(tmp_path, job="b")
    interrupt(RunFolder(tmp_path / "x"))
    # Not the newest; and what it began with is no longer what it goes on with.
    train(tmp_path, f"run.resume={tmp_path / 'x-2'}", job="a")
    assert names(tmp_path) == ["x", "x-2"]
    assert steps(tmp_path / "x") == [1, 2, 3, 4]
    # Before its first checkpoint it begins anew in its folder.
    RunFolder(tmp_path / "x-2").weights.unlink()
    shutil.rmtree(RunFolder(tmp_path / "x-2").checkpoints)
    train(tmp_path, job="b")
    assert names(tmp_path) == ["x", "x-2"]
    # A name given by hand may come again after the run has ended.
    train(tmp_path, job="b")
    assert names(tmp_path) == ["x", "x-2", "x-3"]


def test_a_name_that_looks_like_a_number_of_another_is_not_mistaken(tmp_path: Path) -> None:
    train(tmp_path, "run.name=x-2")
    interrupt(RunFolder(tmp_path / "x-2"))
    train(tmp_path)
    assert names(tmp_path) == ["x-2", "x-3"]


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path)
    folder = RunFolder(tmp_path / "x")
    folder.weights.unlink()
    (shard,) = folder.checkpoint(4).glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    train(tmp_path)
    assert "resumes    after step 2 of" in capsys.readouterr().out
    assert steps(folder.path) == [1, 2, 3, 4]
    assert checkpoint.latest(folder.checkpoints, check="content") == folder.checkpoint(4)


def test_replacing_goes_on_with_an_interrupted_run_too(
    interrupted: RunFolder, tmp_path: Path
) -> None:
    text = interrupted.metrics.read_text().splitlines()
    train(tmp_path, "run.if_exists=replace")
    assert interrupted.metrics.read_text().splitlines()[:2] == text[:2]
    train(tmp_path, "run.if_exists=replace")
    assert interrupted.metrics.read_text().splitlines()[:2] != text[:2], (
        "a finished one is replaced"
    )
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("place", ["run", "checkpoints", "checkpoint"])
def test_a_path_begins_a_new_run_with_that_state(tmp_path: Path, place: str) -> None:
    train(tmp_path)
    source = RunFolder(tmp_path / "x")
    path = {
        "run": source.path,
        "checkpoints": source.checkpoints,
        "checkpoint": source.checkpoint(4),
    }[place]
    train(tmp_path, f"run.resume={path}", "train.steps=6", "optimizer.lr=0.5")
    assert names(tmp_path) == ["x", "x-2"]
    assert steps(tmp_path / "x") == [1, 2, 3, 4]
    lines = read_metrics(tmp_path / "x-2/metrics.jsonl")
    assert [line.step for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[:4] == read_metrics(source.metrics)
    # The configuration's learning rate, not the checkpoint's.
    assert lines[-1].lr == pytest.approx(0.5 * 0.1)


def test_what_may_change_is_said_and_what_may_not_is_refused(
    interrupted: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refusal(tmp_path, "optimizer.lr=0.5", "train.steps=8")
    assert f"run.resume: {interrupted.checkpoint(2)} belongs to a run with another" in told
    assert "optimizer.lr is 0.01 there, 0.5 here" in told
    assert "train.steps" not in told
    assert f"run.resume={interrupted.checkpoint(2)}" in told
    assert "run.resume=never" in told
    told = refusal(tmp_path, "model.dim=64", f"run.resume={interrupted.path}")
    assert "model.dim is 32 there, 64 here. The saved state means nothing to another" in told
    assert "optimizer.name is 'muon' there" in refusal(tmp_path, "optimizer.name=adamw")
    told = refusal(tmp_path, "train.steps=2")
    assert "has done 2 steps already, so train.steps=2 leaves nothing to do" in told

    train(tmp_path, "train.steps=5", "train.eval_every=3")
    assert "changed    train.steps 4 -> 5, train.eval_every 10 -> 3" in capsys.readouterr().out
    assert load_config(interrupted.config).train.steps == 5


def test_another_text_is_refused(interrupted: RunFolder, tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_text("to be or not to be, that is the question. " * 400)
    assert "was trained on another text" in refusal(tmp_path, f"data.path={text}")
    train(tmp_path, f"data.path={text}", f"run.resume={interrupted.path}")
    assert steps(tmp_path / "x-2") == [1, 2, 3, 4]


def test_what_is_no_checkpoint_of_a_run_is_refused_by_name(tmp_path: Path) -> None:
    assert "run.resume=nowhere: no such folder" in refusal(tmp_path, "run.resume=nowhere")
    (tmp_path / "empty").mkdir()
    told = refusal(tmp_path, f"run.resume={tmp_path / 'empty'}")
    assert f"{tmp_path / 'empty'} is no complete checkpoint" in told
    checkpoint.save(tmp_path / "foreign", metadata={"epoch": 3}, tensors={"t": torch.zeros(1)})
    told = refusal(tmp_path, f"run.resume={tmp_path / 'foreign'}")
    assert "is a checkpoint of another program: its metadata has ['epoch']" in told


def test_a_run_is_not_replaced_by_one_that_begins_with_it(
    interrupted: RunFolder, tmp_path: Path
) -> None:
    told = refusal(tmp_path, f"run.resume={interrupted.path}", "run.if_exists=replace")
    assert "would remove the run that this one begins with" in told


def test_a_run_that_only_lacks_its_last_files_gets_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path)
    folder = RunFolder(tmp_path / "x")
    before = folder.weights.read_bytes()
    folder.weights.unlink()
    folder.plot.unlink()
    capsys.readouterr()
    train(tmp_path)
    assert folder.weights.read_bytes() == before
    assert folder.plot.exists()
    assert "step 4/4" not in capsys.readouterr().out
    assert steps(folder.path) == [1, 2, 3, 4]


def test_lost_metrics_are_told_and_do_not_stop_the_run(
    interrupted: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted.metrics.unlink()
    train(tmp_path)
    assert "metrics    those up to step 2 are lost or incomplete" in capsys.readouterr().out
    assert steps(interrupted.path) == [3, 4]


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    train(tmp_path, "run.save_every=1", "run.keep_latest=3")
    kept = names(RunFolder(tmp_path / "x").checkpoints)
    assert kept == ["step-00000002", "step-00000003", "step-00000004"]


def test_the_random_state_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[float] = []
    step = Trainer.step

    def drawing(self: Trainer, number: int) -> StepResult:
        drawn.append(float(torch.rand(())))
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", drawing)
    train(tmp_path)
    interrupt(RunFolder(tmp_path / "x"))
    train(tmp_path)
    assert len(drawn) == 6
    assert drawn[4:] == drawn[2:4]


@pytest.mark.parametrize(("at", "saving"), [(1, "200"), (1, "0"), (3, "200")])
def test_a_signal_ends_the_run_after_its_step(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    at: int,
    saving: str,
) -> None:
    step, handlers = Trainer.step, [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]

    def signalled(self: Trainer, number: int) -> StepResult:
        if number == at:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", signalled)
    try:
        train(tmp_path, f"run.save_every={saving}", "run.resume=never")
        after = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), handlers, strict=True):
            signal.signal(number, handler)
    printed = capfd.readouterr()
    folder = RunFolder(tmp_path / "x")
    assert printed.err.count("Stopping after this step") == 1
    # In the last step there is nothing left to stop, and the files of the end are still written.
    assert folder.weights.exists() == (at == 3)
    assert (after == handlers) == (at == 3), "deaf once it has stopped"
    if at == 3:
        assert "stopped" not in printed.out
    elif saving == "0":
        assert "stopped by SIGTERM after step 2/4; nothing is saved" in printed.out
        assert not folder.checkpoints.exists()
    else:
        assert f"stopped by SIGTERM after step 2/4, saved to {folder.checkpoint(2)}" in printed.out
        assert "to go on: the same command with run.resume=auto" in printed.out
        assert names(folder.checkpoints) == ["step-00000002"]


def test_ranks_do_not_meet_those_that_are_dead() -> None:
    """Regression: a restarted rank read the address of a dead one from torchrun's store."""
    store, limit = dist.HashStore(), timedelta(seconds=30)
    met: list[tuple[int, str]] = []

    def join(rank: int) -> None:
        met.append((rank, meet(store, rank, 3, limit=limit)))

    for order in ((1, 2, 0), (2, 0, 1), (0, 1, 2)):
        threads = [threading.Thread(target=join, args=(rank,)) for rank in order]
        for thread in threads:
            thread.start()
            thread.join(0.05)  # the later ones come when the earlier ones wait already
        for thread in threads:
            thread.join(30)
    groups = [{name for _, name in met[index : index + 3]} for index in (0, 3, 6)]
    assert all(len(group) == 1 for group in groups), met
    assert len(set.union(*groups)) == 3, "every meeting has a name of its own"


def test_a_rank_does_not_wait_for_ever_for_rank_zero() -> None:
    store = dist.HashStore()
    store.set("meeting", "of the dead")
    with pytest.raises(RuntimeError, match=r"Rank 1 waited 0:00:00.200000 for rank 0"):
        meet(store, 1, 2, limit=timedelta(seconds=0.2))


def test_the_documentation_says_which_keys_may_change() -> None:
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    section = page.partition("### What may change")[2].partition("\n#")[0]
    parts = {
        kind: section.partition(f"- **{title}**")[2].partition("\n- ")[0]
        for kind, title in (("free", "Freely"), ("fork", "In a new run"), ("fixed", "Never"))
    }
    for info in describe_keys():
        whole = f"`{info.name.split('.')[0]}.*`"
        for kind, text in parts.items():
            named = f"`{info.name}`" in text or whole in text
            assert named == (kind == info.on_resume), f"{info.name} is {info.on_resume}"

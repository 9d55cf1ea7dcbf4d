"""Saves that are killed or run out of disk: the checkpoint before always loads."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import nn

from distmuon import Muon, checkpoint
from tests.harness import RankFailure, run_ranks

Mode = Literal["sync", "async", "same name"]
MODES: tuple[Mode, ...] = ("sync", "async", "same name")
WORLD_SIZE = 2
SIDE = 512


def _model(process_group: Any) -> tuple[nn.Linear, Muon]:
    model = nn.Linear(SIDE, SIDE)
    groups: list[dict[str, Any]] = [
        {"params": [("weight", model.weight)]},
        {"params": [("bias", model.bias)], "algorithm": "adamw"},
    ]
    return model, Muon(groups, process_group=process_group)


def save_for_ever(folder: Path, mode: Mode) -> None:
    """Everything in checkpoint number k is k, so that a mixture of two would show."""
    model, optimizer = _model(dist.group.WORLD)
    buckets = optimizer.open()
    (folder / f"pid-{dist.get_rank()}").write_text(str(os.getpid()))
    for number in range(1, 100_000):
        for bucket in buckets:
            for tensor in bucket.shard.tensors.values():
                tensor.fill_(number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(number)
        checkpoint.save(
            folder / "saves" / ("last" if mode == "same name" else f"step-{number}"),
            optimizer,
            model=model,
            metadata={"number": number},
            async_save=mode == "async",
            keep_latest=2,
        )


def _killer(folder: Path, delay: float, victim: int, killed: threading.Event) -> None:
    deadline = time.monotonic() + 40
    while checkpoint.latest(folder / "saves") is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(delay)
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        os.kill(int((folder / f"pid-{victim}").read_text()), signal.SIGKILL)
        killed.set()


def _kill_while_saving(folder: Path, mode: Mode, delay: float, victim: int) -> None:
    folder.mkdir()
    killed = threading.Event()
    killer = threading.Thread(target=_killer, args=(folder, delay, victim, killed))
    killer.start()
    with pytest.raises(RankFailure):
        run_ranks(WORLD_SIZE, save_for_ever, folder, mode)
    killer.join()
    assert killed.is_set()


def _check_latest(saves: Path) -> int:
    path = checkpoint.latest(saves, check="content")
    assert path is not None
    model, optimizer = _model(None)
    loaded = checkpoint.load(path, optimizer, model=model)
    number = loaded.metadata["number"]
    state = [v for entry in optimizer.state_dict()["state"].values() for v in entry.values()]
    for tensor in (*model.parameters(), *(v for v in state if isinstance(v, torch.Tensor))):
        assert bool((tensor == number).all()), f"{path} is a mixture"
    return int(number)


def kill_at_random_moments(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, *, moments: int, seed: int
) -> int:
    """Returns how many of the kills left an unfinished folder behind."""
    chance = random.Random(seed)
    inside = 0
    for moment in range(moments):
        mode, victim = MODES[moment % len(MODES)], chance.randrange(WORLD_SIZE)
        folder = tmp_path / str(moment)
        _kill_while_saving(folder, mode, chance.uniform(0, 0.3), victim)
        saves = folder / "saves"
        # The survivor of the two may be in its last breath: it, too, is killed by now.
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            number = _check_latest(saves)
        for left in saves.glob(".saving-*"):
            inside += 1
            assert f"Passed over {left}: it was never finished" in caplog.text
        model, optimizer = _model(None)
        checkpoint.save(saves / "next", optimizer, model=model, metadata={"number": number})
        assert not list(saves.glob(".*")), "the next save clears up"
    return inside


def test_i6_a_rank_killed_while_saving_leaves_the_checkpoint_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kill_at_random_moments(tmp_path, caplog, moments=4, seed=4)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_i6_ranks_killed_at_20_moments_of_saving(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inside = kill_at_random_moments(tmp_path, caplog, moments=20, seed=20)
    assert inside >= 3, f"only {inside} of 20 kills fell into the writing of a file"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"may not mount a tmpfs: {done.stderr.strip()}; the limit test runs anywhere")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill_the_disk(folder: Path, mode: Mode) -> list[str]:
    model, optimizer = _model(dist.group.WORLD)
    buckets = optimizer.open()
    messages = []
    # One checkpoint has 2 MB for state and parameters; the disk has room for three.
    for number in range(1, 9):
        for bucket in buckets:
            bucket.shard.state["momentum_buffer" if bucket.plan else "exp_avg"].fill_(number)
        try:
            checkpoint.save(
                folder / f"step-{number}",
                optimizer,
                model=model,
                metadata={"number": number},
                async_save=mode == "async",
            ).wait()
        except checkpoint.CheckpointError as error:
            messages.append(str(error))
            dist.barrier()
            assert not list(folder.glob(".saving-*")), "what did not fit is removed"
    return messages


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_i6_a_full_disk_leaves_the_checkpoint_before(small_disk: Path, mode: Mode) -> None:
    both = run_ranks(WORLD_SIZE, fill_the_disk, small_disk, mode)
    assert both[0] == both[1], "every rank is told the same"
    assert len(both[0]) >= 4
    for message in both[0]:
        assert "rank-0000" in message
        assert "No space left on device" in message
    path = checkpoint.latest(small_disk, check="content")
    assert path is not None
    model, optimizer = _model(None)
    number = checkpoint.load(path, optimizer, model=model).metadata["number"]
    assert number == 8 - len(both[0])
    assert bool((optimizer.state_dict()["state"][0]["momentum_buffer"] == number).all())

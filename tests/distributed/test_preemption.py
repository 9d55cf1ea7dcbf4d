"""Signals and dying ranks under a real torchrun: what is saved is found again, and nothing else."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from distmuon import checkpoint
from distmuon.checkpoint.manifest import read_manifest
from distmuon.training.metrics import read_metrics
from tests.distributed.test_resume import assert_same_run, configure, sit
from tests.distributed.test_train_run import TINY, environment
from tests.harness import run_ranks

LIMIT_SECONDS = 120.0
# As launch/train.py, but each rank leaves its process number and its exit code behind.
RANK = """
import os, sys
from pathlib import Path
from distmuon.training.main import main

rank = os.environ["RANK"]
Path(f"pid-{rank}").write_text(f"{os.getpid()} {os.getppid()}")
code = main(sys.argv[1:])
Path(f"code-{rank}").write_text(str(code))
sys.exit(code)
"""
LENGTH = ("train.steps=60", "train.log_every=1", "train.eval_every=1000", "sample.length=0")


class Job:
    """A torchrun; what it prints goes to a file."""

    def __init__(self, command: list[str], folder: Path, name: str) -> None:
        self.output = folder / f"printed-{name}"
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment(), stdout=file, stderr=subprocess.STDOUT
            )

    @property
    def printed(self) -> str:
        return self.output.read_text()

    def wait_for(self, text: str) -> None:
        wait_until(lambda: text in self.printed or self.process.poll() is not None)
        assert text in self.printed, self.printed

    def end(self) -> int:
        return self.process.wait(LIMIT_SECONDS)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def torchrun(
    folder: Path, *options: str, overrides: tuple[str, ...] = (), name: str = "job"
) -> Iterator[Job]:
    script = folder / "rank.py"
    script.write_text(RANK)
    program = [sys.executable, "-m", "torch.distributed.run", *options, str(script)]
    job = Job([*program, *TINY, *LENGTH, "run.name=x", "run.seed=3", *overrides], folder, name)
    try:
        yield job
    finally:
        job.process.kill()
        job.process.wait()
        # A rank is in a session of its own and does not end with its torchrun.
        for number, _ in ranks_in(folder):
            kill(number)


def ranks_in(folder: Path) -> list[tuple[int, int]]:
    """Process number of each rank that was started last, and its torchrun's."""
    texts = [file.read_text().split() for file in sorted(folder.glob("pid-*"))]
    return [(int(rank), int(parent)) for rank, parent in texts]


def kill(number: int) -> None:
    """Kill a rank, unless another process has its number by now."""
    try:
        command = Path(f"/proc/{number}/cmdline").read_bytes()
    except OSError:
        return
    if b"rank.py" in command:
        os.kill(number, signal.SIGKILL)


def codes(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in sorted(folder.glob("code-*"))}


def train_in_one_sitting(folder: Path, ranks: int, *overrides: str) -> Path:
    config = configure(folder / "one", *LENGTH, *overrides)
    assert run_ranks(ranks, sit, config) == [""] * ranks
    return folder / "one/x"


@pytest.mark.slow
def test_sigterm_to_torchrun_with_four_ranks_loses_nothing(tmp_path: Path) -> None:
    ranks = 4
    options = ("--standalone", "--nproc-per-node", str(ranks))
    with torchrun(tmp_path, *options) as job:
        job.wait_for("step  5/60")
        job.process.send_signal(signal.SIGTERM)
        assert job.end() == 1, "torchrun fails by the signal, however well its ranks end"
    assert codes(tmp_path) == {f"code-{rank}": "0" for rank in range(ranks)}
    assert job.printed.count("stopped by SIGTERM after step ") == 1, job.printed
    assert "to go on: the same command" in job.printed
    (saved,) = (tmp_path / "runs/x/checkpoints").iterdir()
    assert f"saved to runs/x/checkpoints/{saved.name}" in job.printed
    logged = read_metrics(tmp_path / "runs/x/metrics.jsonl")
    assert saved.name == f"step-{logged[-1].step:08}"
    assert 5 <= logged[-1].step < 60

    with torchrun(tmp_path, *options) as job:
        assert job.end() == 0, job.printed
    assert f"resumes    after step {logged[-1].step} of runs/x/checkpoints/" in job.printed
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["x"]
    one = train_in_one_sitting(tmp_path, ranks, "run.save_every=200")
    assert_same_run(one, tmp_path / "runs/x")


def test_a_killed_rank_is_started_again_where_the_last_checkpoint_was(tmp_path: Path) -> None:
    options = ("--standalone", "--nproc-per-node", "2", "--max-restarts", "1")
    with torchrun(tmp_path, *options, overrides=("run.save_every=10",)) as job:
        job.wait_for("step 15/60")
        kill(ranks_in(tmp_path)[1][0])
        assert job.end() == 0, job.printed
    assert "resumes    after step 10 of runs/x/checkpoints/step-00000010" in job.printed
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["x"]
    one = train_in_one_sitting(tmp_path, 2, "run.save_every=10")
    assert_same_run(one, tmp_path / "runs/x")


@pytest.mark.slow
def test_a_rank_killed_before_the_first_checkpoint_begins_anew_in_its_folder(
    tmp_path: Path,
) -> None:
    options = ("--standalone", "--nproc-per-node", "2", "--max-restarts", "1")
    with torchrun(tmp_path, *options) as job:
        job.wait_for("step  5/60")
        kill(ranks_in(tmp_path)[1][0])
        assert job.end() == 0, job.printed
    assert "resumes" not in job.printed
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["x"]
    lines = read_metrics(tmp_path / "runs/x/metrics.jsonl")
    assert [line.step for line in lines] == [*range(1, 61)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.slow
def test_a_lost_machine_leaves_the_others_to_go_on(tmp_path: Path) -> None:
    """Two agents with 2 + 1 ranks; the second dies with its rank, and the first goes on with 2."""
    options = (
        *("--nnodes", "1:2", "--max-restarts", "3", "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", f"localhost:{free_port()}", "--rdzv-id", "job7"),
        *("--local-addr", "localhost"),
    )
    overrides = ("run.save_every=10", "train.steps=100")
    checkpoints = tmp_path / "runs/x/checkpoints"
    # The store is on the machine that stays, whichever starts faster.
    conf = ["--rdzv-conf=last_call_timeout=10,is_host=" + answer for answer in ("true", "false")]

    def saved_by_three() -> bool:
        path = checkpoint.latest(checkpoints)
        try:
            return path is not None and read_manifest(path).world_size == 3
        except checkpoint.CheckpointError:  # pruned since
            return False

    with torchrun(
        tmp_path, *options, conf[0], "--nproc-per-node", "2", overrides=overrides, name="a"
    ) as first:
        with torchrun(
            tmp_path, *options, conf[1], "--nproc-per-node", "1", overrides=overrides, name="b"
        ) as second:
            wait_until(saved_by_three)
            second.process.kill()
            for number, parent in ranks_in(tmp_path):
                if parent == second.process.pid:
                    kill(number)
        assert first.end() == 0, first.printed
    assert "ranks      2 on cpu" in first.printed
    assert "(saved by 3 ranks)" in first.printed
    lines = read_metrics(tmp_path / "runs/x/metrics.jsonl")
    assert [line.step for line in lines] == [*range(1, 101)]
    one = read_metrics(train_in_one_sitting(tmp_path, 2, *overrides) / "metrics.jsonl")
    for here, there in zip(lines, one, strict=True):
        # Rounding grows from 1e-7 to 1e-5 over so many steps; a lost momentum is off by 1e-2.
        assert here.loss == pytest.approx(there.loss, rel=1e-3)

"""The training command as a user starts it: torchrun, real ranks, real text, files on disk.

Nothing here is skipped: the text is the one that ships with Python.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from distmuon.training.config_file import load_config
from distmuon.training.metrics import StepMetrics, read_metrics

ROOT = Path(__file__).resolve().parents[2]
TINY = ("--config", str(ROOT / "configs/tiny.yaml"))
LIMIT_SECONDS = 120.0

# Trains as launch/train.py does and fails if a DDP wrapper outlives the process group.
TEARDOWN = """
import gc, sys
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from distmuon.training.main import main

destroy = dist.destroy_process_group
calls = []

def checked(*args):
    alive = [x for x in gc.get_objects() if isinstance(x, DistributedDataParallel)]
    assert not alive, "a DDP wrapper is alive at destroy_process_group"
    calls.append(args)
    destroy(*args)

dist.destroy_process_group = checked
code = main(sys.argv[1:])
assert len(calls) == 1
sys.exit(code)
"""


def environment() -> dict[str, str]:
    """A user's environment: nothing of a torchrun around these tests, one thread per rank."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    }
    paths = [str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]
    return kept | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "CI": "1"}


def command(world_size: int, script: Path, *arguments: str) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, "--nproc-per-node", str(world_size), str(script), *arguments]


def launch(
    world_size: int, folder: Path, *arguments: str, script: Path = ROOT / "launch/train.py"
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(world_size, script, *arguments),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )


def train(world_size: int, folder: Path, *overrides: str) -> tuple[list[StepMetrics], str]:
    """Train with configs/tiny.yaml; return the metrics and what was printed."""
    done = launch(world_size, folder, *TINY, *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    path = re.search(r"^folder +(\S+)$", done.stdout, re.MULTILINE)
    assert path is not None, done.stdout
    return read_metrics(folder / path[1] / "metrics.jsonl"), done.stdout


def owned_matrices(printed: str) -> list[int]:
    """Read the number of ranks, and the least and most matrices that one of them owns."""
    found = re.search(r"; (\d+) ranks own (\d+)(?: to (\d+))? matrices each; ", printed)
    assert found is not None, printed
    return [int(found[1]), int(found[2]), int(found[3] or found[2])]


def test_two_ranks_train_and_leave_everything_behind(tmp_path: Path) -> None:
    lines, printed = train(2, tmp_path, "optimizer.lr=2e-2")

    folder = tmp_path / "runs" / "tiny"
    files = {".lock", "checkpoints", "config.yaml", "metrics.jsonl", "loss.png"}
    files |= {"model.safetensors"}
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000020"]
    assert {path.name for path in folder.iterdir()} == files
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    overrides = ["optimizer.lr=0.02"]
    assert load_config(folder / "config.yaml") == load_config(TINY[1], overrides)
    weights = load_file(folder / "model.safetensors")
    assert weights["layers.0.attention.q_proj.weight"].shape == (32, 32)

    assert [line.step for line in lines] == [1, 5, 10, 15, 20]
    assert 5.4 < lines[0].loss < 5.7, "a new model predicts nearly uniformly: log(256) = 5.545"
    assert lines[-1].loss < lines[0].loss - 1.5
    middle, last = lines[2].val_loss, lines[-1].val_loss
    assert middle is not None
    assert last is not None
    assert last < middle < 4.5
    assert all(line.tokens_per_s > 0 and line.optimizer_ms > 0 for line in lines)

    assert "under ZeRO-1 on 2 ranks" in printed
    assert "Muon orthogonalized 6 matrices x 20 steps = 120 of 120\n" in printed
    ranks, least, most = owned_matrices(printed)
    assert (ranks, least + most) == (2, 6)
    assert re.search(r"sent by all of them a step: .*publish 115\.\d\d kB", printed), printed
    assert re.search(r"state [\d.]+ kB on each rank; 0 steps skipped\n", printed), printed
    assert f"validation loss {last:.4f}" in printed
    assert "sample of 60 bytes" in printed
    assert printed.count("step  1/20") == 1, "only rank 0 prints"


def test_the_world_size_changes_the_losses_by_rounding_only(tmp_path: Path) -> None:
    alone = subprocess.run(
        [sys.executable, str(ROOT / "launch/train.py"), *TINY],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    assert alone.returncode == 0, alone.stdout + alone.stderr
    assert "ranks      1 on cpu" in alone.stdout
    one = read_metrics(tmp_path / "runs/tiny/metrics.jsonl")
    three, printed = train(3, tmp_path)
    ranks, least, most = owned_matrices(printed)
    assert ranks == 3
    assert 1 <= least <= 2 <= most
    assert "runs/tiny-2" in printed, "an existing run is not overwritten"
    for first, second in zip(one, three, strict=True):
        assert second.loss == pytest.approx(first.loss, abs=2e-3)
        assert second.val_loss == pytest.approx(first.val_loss, abs=2e-3)


def test_adamw_runs_under_zero_1(tmp_path: Path) -> None:
    lines, printed = train(2, tmp_path, "optimizer.name=adamw")
    assert lines[-1].loss < lines[0].loss - 1.5
    assert "AdamW under ZeRO-1 on 2 ranks" in printed
    assert "orthogonalized" not in printed
    # 28,768 parameters x 2 averages x 4 bytes = 230 kB, shared by two.
    held = [float(text) for text in re.findall(r"rank \d: ([\d.]+) kB", printed)]
    assert sum(held) == pytest.approx(230.2, abs=0.2)
    assert max(held) < 0.6 * sum(held)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=0.1", "unknown key 'optimizer.lrr'. Did you mean 'optimizer.lr'?"),
        ("optimizer.ns_coefficients=kellner", "optimizer: Invalid ns_coefficients"),
    ],
)
def test_a_users_mistake_exits_2_and_is_told_once(
    tmp_path: Path, override: str, message: str
) -> None:
    done = launch(2, tmp_path, *TINY, override)
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1, done.stderr
    assert message in told[0]
    assert re.search(r"exitcode +: 2 ", done.stderr), "torchrun reports the code of the rank"
    # Nothing of ours; gloo may say there that the ranks have met (torch before 2.13).
    assert not re.search("error|folder|optimizer", done.stdout)
    assert not (tmp_path / "runs").exists()


def test_the_last_rank_standing_does_not_wait_for_a_rank_that_is_gone(tmp_path: Path) -> None:
    """Rank 1 dies in the middle of the run; torchrun must be back long before the timeout."""
    script = tmp_path / "dies.py"
    script.write_text(
        "import os, sys\n"
        "from distmuon.training import trainer\n"
        "from distmuon.training.main import main\n"
        "step = trainer.Trainer.step\n"
        "def dying(self, number):\n"
        "    if number == 3 and self.world.rank == 1:\n"
        "        os._exit(7)\n"
        "    return step(self, number)\n"
        "trainer.Trainer.step = dying\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    began = time.monotonic()
    done = launch(2, tmp_path, *TINY, "run.timeout_s=100", script=script)
    assert done.returncode != 0
    assert time.monotonic() - began < 60
    assert re.search(r"exitcode +: 7 ", done.stderr), done.stderr


def test_ctrl_c_saves_and_ends_all_ranks(tmp_path: Path) -> None:
    arguments = (*TINY, "train.steps=1000000", "train.log_every=1")
    process = subprocess.Popen(
        command(2, ROOT / "launch/train.py", *arguments),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step "):
                break
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1, "torchrun's own; its ranks end with 0"
    last = read_metrics(tmp_path / "runs/tiny/metrics.jsonl")[-1].step
    saved = f"saved to runs/tiny/checkpoints/step-{last:08}"
    assert f"stopped by SIGINT after step {last}/1000000, {saved}\nto go on: the same" in rest
    assert (tmp_path / f"runs/tiny/checkpoints/step-{last:08}/manifest.json").exists()


def test_no_ddp_wrapper_outlives_the_process_group(tmp_path: Path) -> None:
    """Regression: a rank hung at its very end (see the note in distmuon/training/world.py)."""
    script = tmp_path / "teardown.py"
    script.write_text(TEARDOWN)
    done = launch(2, tmp_path, *TINY, "train.steps=2", script=script)
    assert done.returncode == 0, done.stderr

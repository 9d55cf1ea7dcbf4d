"""The scripts of the documentation, started by both launchers on two processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the extra distmuon[hf]")
pytest.importorskip("omegaconf", reason="needs the extra distmuon[train]")

from tests.docs.code_blocks import find_blocks

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file"]
ACCELERATE += [str(ROOT / "configs/accelerate/cpu.yaml")]


def write_script(page: str, name: str, folder: Path) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    (code,) = (b.code for b in find_blocks(text, page) if b.code.startswith(f"# {name}"))
    (folder / name).write_text(code, encoding="utf-8")


def run(launcher: list[str], folder: Path, *arguments: str) -> str:
    variables = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    variables |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, *arguments],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_pretraining_and_fine_tuning(tmp_path: Path) -> None:
    write_script("accelerate.md", "pretrain.py", tmp_path)
    write_script("transformers.md", "finetune.py", tmp_path)
    printed = run(ACCELERATE, tmp_path, "pretrain.py", "40")
    losses = [float(loss) for loss in re.findall(r"step \d+: loss ([\d.]+)", printed)]
    assert len(losses) == 3
    assert losses[-1] < losses[0] - 1
    found = re.search(r"Muon orthogonalized (\d+) matrices x 40 steps = (\d+) of (\d+)", printed)
    assert found is not None, printed
    assert int(found[1]) * 40 == int(found[2]) == int(found[3]) > 0
    printed = run(TORCHRUN, tmp_path, "finetune.py", "16")
    found = re.search(r"evaluation loss ([\d.]+) before, ([\d.]+) after 16 steps", printed)
    assert found is not None, printed
    before, after = map(float, found.groups())
    assert after < before < losses[0], "what was pretrained is read, and improves"
    assert (tmp_path / "finetuned/checkpoint-16/distmuon/manifest.json").is_file()

"""The commands where nothing but the base install is there: plain tables, and errors that say what
to install.
"""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
EXTRAS = (
    "accelerate deepspeed lightning matplotlib omegaconf peft PIL pytorch_optimizer rich "
    "safetensors tensorboard transformers triton wandb yaml"
).split()
# Read by every Python that has it on its path: these packages are not found, as if not installed.
WITHOUT = """
import os, sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in os.environ["WITHOUT"].split()
        return None if hidden else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""
# One process for many commands: each would import torch.
EACH = """
import contextlib, io, json, sys
from distmuon.cli.main import main
told = []
for command in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(command)
    told.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(told))
"""
SMALL = ["model.layers=1", "model.dim=16", "model.heads=2", "data.source=pydoc", "data.context=16"]
SMALL += ["data.val_windows=8", "train.steps=2", "sample.length=0", "run.save_every=0"]
Answer = tuple[int, str, str]


def environment(folder: Path, without: list[str]) -> dict[str, str]:
    path = folder / "without"
    path.mkdir()
    (path / "sitecustomize.py").write_text(WITHOUT)
    return {**os.environ, "PYTHONPATH": f"{path}:{ROOT}", "WITHOUT": " ".join(without)}


def run_each(folder: Path, *commands: list[str]) -> list[Answer]:
    done = subprocess.run(
        [sys.executable, "-c", EACH, json.dumps(commands)],
        cwd=folder,
        env=environment(folder, EXTRAS),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(each) for each in json.loads(done.stdout)]


def test_commands_do_without_extras_or_name_them(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text((ROOT / "configs/tiny.yaml").read_text())
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    plan, page, estimate, doctor, init, *refused = run_each(
        tmp_path,
        ["plan", "llama-7b"],
        ["plan", "llama-7b", "--html", "plan.html"],
        ["estimate", "llama-7b"],
        ["doctor"],
        ["init", "new.yaml"],
        ["init", "other.yaml", "optimizer.lr=0.01"],
        ["plan", "run.yaml"],
        ["plan", "some/model"],
        ["plot", "."],
        ["train", "--json"],
    )
    for code, out, err in (plan, estimate, init):
        assert (code, err) == (0, "")
        assert out
    assert "model.layers.{0..31}.self_attn.q_proj.weight" in plan[1]
    assert page[0] == 2
    assert "Pictures need matplotlib" in page[2]
    assert "pip install 'distmuon[plot]'" in page[2]
    assert doctor[1].startswith("## distmuon doctor")
    for (code, out, err), extra, needed in zip(
        refused,
        ("train", "train", "hf", "plot", "train"),
        ("omegaconf", "omegaconf and yaml", "transformers", "matplotlib", "safetensors"),
        strict=True,
    ):
        assert code == 2
        assert needed in err
        assert f"pip install 'distmuon[{extra}]'" in err
        assert "(docs/errors.md#missing-package)" in err
        assert "Traceback" not in err
        assert out == "" or not json.loads(out)["ok"]
    assert {path.name for path in tmp_path.iterdir()} == {
        "run.yaml",
        "new.yaml",
        "metrics.jsonl",
        "without",
    }


def on_a_terminal(folder: Path, without: list[str], *arguments: str) -> str:
    """What a command shows on a terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "distmuon", *arguments],
        cwd=folder,
        env={**environment(folder, without), "TERM": "xterm", "CI": ""},
        stdout=theirs,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # the other side is closed
        pass
    finally:
        os.close(ours)
    assert process.wait() == 0, shown
    return shown.decode().replace("\r\n", "\n")


def test_a_terminal_without_rich_gets_plain_tables(tmp_path: Path) -> None:
    shown = on_a_terminal(tmp_path, ["rich"], "estimate", "llama-7b")
    assert "\x1b" not in shown
    title, *_ = (line for line in shown.splitlines() if line.startswith("bytes per rank"))
    assert title.split() == "bytes per rank AdamW DDP AdamW ZeRO-1 distmuon".split()


@pytest.mark.slow
def test_a_terminal_without_rich_gets_plain_lines_of_training(tmp_path: Path) -> None:
    shown = on_a_terminal(tmp_path, ["rich"], "train", *SMALL)
    assert "\x1b" not in shown
    assert "\nstep 2/2  loss " in shown
    assert "Muon orthogonalized 6 matrices x 2 steps = 12 of 12\n" in shown


def test_the_extras_that_are_hidden_are_all() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {"pyyaml": "yaml"}
    wanted = {
        names.get(name, name)
        for extra, lines in project["optional-dependencies"].items()
        if extra not in ("all", "dev")
        for name in (line.split(">")[0].split("[")[0] for line in lines)
    }
    assert wanted <= set(EXTRAS)

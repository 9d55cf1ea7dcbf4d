"""A training run inside DeepSpeed in two sittings is the run in one, and any engine goes on."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from distmuon.training.config import Config
from distmuon.training.metrics import read_metrics
from distmuon.training.run_folder import RunFolder
from tests.distributed.deepspeed_ranks import deepspeed_world
from tests.distributed.test_resume import (
    assert_same_run,
    configure,
    cut_short,
    folder_of,
    sit,
    sit_both_ways,
)
from tests.harness import run_ranks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="needs DeepSpeed: DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed",
)

LIMIT = 120.0
ENGINE = "run.engine=deepspeed"
TWENTY = ("train.steps=20", "train.log_every=1", "run.save_every=0")


def sit_in_both_engines(folder: Path) -> list[str]:
    """A run in one sitting and in two, one that began without DeepSpeed, two of twenty steps."""
    twenty = [
        configure(folder / f"{engine} 20", f"run.engine={engine}", *TWENTY)
        for engine in ("native", "deepspeed")
    ]
    one, two, native, moved = (
        configure(folder / name, *(() if name == "native" else (ENGINE,)))
        for name in ("one", "two", "native", "moved")
    )
    with deepspeed_world():
        told = [*sit_both_ways(one, two), sit(native)]
        if dist.get_rank() == 0:
            cut_short(folder_of(native).path, folder_of(moved).path, step=4)
        dist.barrier()
        return [*told, sit(moved), *map(sit, twenty)]


def sit_each(configs: Sequence[Config]) -> list[str]:
    with deepspeed_world():
        return [sit(config) for config in configs]


def test_a_run_goes_on_to_the_bit_on_other_ranks_and_in_either_engine(tmp_path: Path) -> None:
    """One test: its runs are made once, whichever worker has it."""
    assert run_ranks(2, sit_in_both_engines, tmp_path, timeout=LIMIT) == [[""] * 6] * 2
    kept = sorted(path.name for path in RunFolder(tmp_path / "one/x").checkpoints.iterdir())
    assert kept == ["step-00000004", "step-00000008", "step-00000010"]
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["x"], "in its own folder"
    assert_same_run(tmp_path / "one/x", tmp_path / "two/x")
    assert_same_losses(tmp_path / "native/x", tmp_path / "moved/x")
    assert_twenty_same_losses(tmp_path)
    configs = [
        configure(tmp_path / f"{engine} 3", f"run.engine={engine}")
        for engine in ("deepspeed", "native")
    ]
    for config in configs:
        cut_short(tmp_path / "one/x", folder_of(config).path, step=4)
    assert run_ranks(3, sit_each, configs, timeout=LIMIT) == [[""] * 2] * 3
    for config in configs:
        assert_same_losses(tmp_path / "one/x", folder_of(config).path)


def assert_twenty_same_losses(folder: Path) -> None:
    native, deepspeed = (
        [line.loss for line in read_metrics(RunFolder(folder / f"{engine} 20/x").metrics)]
        for engine in ("native", "deepspeed")
    )
    assert len(native) == len(deepspeed) == 20
    assert max(abs(a - b) for a, b in zip(native, deepspeed, strict=True)) <= 1e-5
    assert native[-1] < native[0] - 1.0


def assert_same_losses(one: Path, other: Path) -> None:
    there, here = (read_metrics(RunFolder(each).metrics) for each in (one, other))
    assert [line.step for line in here] == [line.step for line in there] == [1, 3, 6, 8, 9, 10]
    for first, second in zip(there, here, strict=True):
        assert second.lr == first.lr
        # A lost momentum or a wrong batch shows in the third digit at the latest.
        assert second.loss == pytest.approx(first.loss, rel=1e-6)
    weights = load_file(RunFolder(other).weights)
    for name, tensor in load_file(RunFolder(one).weights).items():
        # Gradients are summed in another order, and every step moves a weight by about 1e-3.
        torch.testing.assert_close(weights[name], tensor, rtol=0.0, atol=1e-4)

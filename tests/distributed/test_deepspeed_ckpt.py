"""`distmuon ckpt` on what a DeepSpeed engine has saved."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from distmuon import checkpoint
from distmuon.cli.main import main
from tests.distributed.deepspeed_ranks import Case, deepspeed_world, make_model, start, train
from tests.harness import run_ranks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="needs DeepSpeed: DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed",
)

LIMIT = 120.0
CASE = Case(2, dtype=torch.bfloat16)
KEYS = {"muon": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}


def whole_state(engine: object) -> dict[str, Tensor]:
    """Every parameter, its master and its state, as DeepSpeed itself puts them together."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found = {}
    optimizer = engine.basic_optimizer  # type: ignore[attr-defined]
    for partition in optimizer.partitions.values():
        spec = partition.bucket.spec
        for name, parameter in zip(spec.names, spec.parameters, strict=True):
            found[f"model/{name}"] = parameter.detach().clone()
            found[f"optimizer/master/{name}"] = safe_get_full_fp32_param(parameter)
            for key in KEYS[spec.algorithm]:
                full = safe_get_full_optimizer_state(parameter, key)
                found[f"optimizer/{key}/{name}"] = full
    return {name: tensor.clone() for name, tensor in found.items()}


def save_both_kinds(folder: Path) -> dict[str, Tensor]:
    from distmuon.deepspeed import save

    with deepspeed_world():
        engine = start(CASE)
        train(engine, CASE, range(2))
        save(folder / "ours/step-2", engine, metadata={"step": 2})
        engine.save_checkpoint(str(folder / "theirs"))
        return whole_state(engine)


def load_and_save_again(folder: Path, again: Path) -> None:
    from distmuon.deepspeed import load, save

    with deepspeed_world():
        engine = start(CASE, make_model(torch.bfloat16))
        load(folder, engine)
        save(again, engine)


def assert_holds(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        assert torch.equal(found[name].reshape(tensor.shape), tensor), name


def test_every_action_reads_what_an_engine_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = run_ranks(2, save_both_kinds, tmp_path, timeout=LIMIT)[0]
    assert any(name.startswith("optimizer/momentum_buffer/") for name in expected)
    path = tmp_path / "ours"

    def ckpt(*arguments: object) -> int:
        return main(["ckpt", *map(str, arguments)])

    for action in ("inspect", "verify"):
        assert ckpt(action, path) == 0
    assert ckpt("consolidate", path, tmp_path / "all.safetensors") == 0
    assert_holds(load_file(tmp_path / "all.safetensors"), expected)
    assert ckpt("reshard", path, tmp_path / "on3", "--ranks", 3) == 0
    assert ckpt("verify", tmp_path / "on3") == 0
    run_ranks(3, load_and_save_again, tmp_path / "on3", tmp_path / "again", timeout=LIMIT)
    assert ckpt("consolidate", tmp_path / "again", tmp_path / "again.safetensors") == 0
    assert_holds(load_file(tmp_path / "again.safetensors"), expected)
    for kind, keys in KEYS.items():
        assert ckpt("export", path, tmp_path / kind, "--optimizer", kind) == 0
        state = checkpoint.read_export(tmp_path / kind)
        names = [name for group in state["param_groups"] for name in group["param_names"]]
        numbers = [number for group in state["param_groups"] for number in group["params"]]
        assert f"optimizer/{keys[0]}/{names[0]}" in expected
        exported = {
            f"optimizer/{key}/{name}": state["state"][number][key]
            for name, number in zip(names, numbers, strict=True)
            for key in keys
        }
        assert_holds(expected, exported)
    capsys.readouterr()
    for folder in (tmp_path / "theirs", tmp_path / "theirs/global_step2"):
        assert ckpt("inspect", folder) == 2
        said = capsys.readouterr().err
        assert "is a checkpoint of DeepSpeed's own" in said
        assert "distmuon.deepspeed.save" in said

"""`distmuon ckpt`, on checkpoints that real ranks have saved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from distmuon import checkpoint
from distmuon.checkpoint.manifest import read_manifest
from distmuon.cli.main import main
from tests.distributed.checkpoint_runs import Bag, assert_same, build, snapshot, train
from tests.harness import run_ranks

ROOT = Path(__file__).parents[2]


def save_one(folder: Path) -> dict[str, Tensor]:
    group = dist.group.WORLD if dist.is_initialized() else None
    model, optimizer = build(torch.bfloat16, group, seed=1)
    train(model, optimizer, range(3))
    checkpoint.save(
        folder,
        optimizer,
        model=model,
        metadata={"step": 3},
        tensors={"position": torch.arange(4)},
        rank_tensors={"rng": torch.ones(3)},
    )
    return snapshot(model, optimizer)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("runs") / "saves"
    return folder / "step-3", run_ranks(3, save_one, folder / "step-3")[0]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any, str]:
    code = main(["ckpt", *map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else None, err


def test_inspect_and_verify(
    saved: tuple[Path, dict[str, Tensor]], capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = saved
    code, answer, _ = run(capsys, "inspect", path.parent)
    assert code == 0
    assert answer["path"] == str(path), "the newest in a folder of checkpoints"
    assert (answer["ranks"], answer["steps"], answer["parameters"]) == (3, [3], 7)
    assert answer["metadata"] == {"step": 3}
    assert answer["per rank"] == ["rng"]
    matrices = 61 * 150 + 37 + 3 * 11 * 6 + 40 * 9
    assert answer["elements"]["optimizer/momentum_buffer"] == matrices
    assert answer["elements"]["optimizer/master"] == matrices + 23 + 19 * 5 + 1
    code, answer, _ = run(capsys, "verify", path)
    assert code == 0
    assert answer["verified"].startswith("3 files, ")
    assert main(["ckpt", "inspect", str(path)]) == 0
    assert "ranks        3" in capsys.readouterr().out


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "verify", tmp_path / "nothing")[0] == 2
    assert run(capsys, "verify", tmp_path)[0] == 1
    for wrong in (["ckpt"], ["ckpt", "reshard", ".", "out", "--ranks", "0"], ["ckpt", "melt", "."]):
        with pytest.raises(SystemExit) as caught:
            main(wrong)
        assert caught.value.code == 2
    save_one(tmp_path / "a")
    capsys.readouterr()
    file = tmp_path / "a" / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    for action in (["verify"], ["reshard", tmp_path / "b", "--ranks", 2]):
        code, answer, err = run(capsys, action[0], tmp_path / "a", *action[1:])
        assert code == 1
        assert not answer["ok"]
        assert "rank-00000.safetensors is damaged" in answer["error"]
        assert "rank-00000.safetensors is damaged" in err
    assert not (tmp_path / "b").exists()


def test_a_checkpoint_is_not_resharded_onto_itself_by_another_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_one(tmp_path / "a")
    for out in (tmp_path, tmp_path / "b" / ".."):
        code, answer, _ = run(capsys, "reshard", tmp_path / "a", out / "a", "--ranks", 2)
        assert code == 1
        assert "is the checkpoint itself" in answer["error"]
    assert read_manifest(tmp_path / "a").world_size == 1


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_reshard_writes_what_so_many_ranks_would_have(
    saved: tuple[Path, dict[str, Tensor]],
    ranks: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, expected = saved
    code, answer, _ = run(capsys, "reshard", path, tmp_path / "new", "--ranks", ranks)
    assert code == 0
    assert answer["ranks"] == ranks
    run_ranks(ranks, save_one, tmp_path / "real")
    resharded, real = read_manifest(tmp_path / "new"), read_manifest(tmp_path / "real")
    assert resharded.tensors == real.tensors
    assert resharded.rank_tensors is None
    model, optimizer = build(torch.bfloat16, None, seed=2)
    loaded = checkpoint.load(tmp_path / "new", optimizer, model=model)
    assert_same(snapshot(model, optimizer), expected)
    assert (loaded.metadata, loaded.tensors["position"].tolist()) == ({"step": 3}, [0, 1, 2, 3])


def test_consolidate(
    saved: tuple[Path, dict[str, Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, expected = saved
    file = tmp_path / "model.safetensors"
    assert run(capsys, "consolidate", path, file, "--only", "model")[0] == 0
    model = Bag(torch.bfloat16, 2)
    model.load_state_dict(load_file(file))
    assert_same({f"model/{n}": v for n, v in model.state_dict().items()}, expected)
    assert run(capsys, "consolidate", path, tmp_path / "all.safetensors")[0] == 0
    whole = load_file(tmp_path / "all.safetensors")
    assert torch.equal(whole["optimizer/momentum_buffer/wide"], expected["wide/momentum_buffer"])
    assert torch.equal(whole["optimizer/exp_avg_sq/table"], expected["table/exp_avg_sq"])
    assert run(capsys, "consolidate", path, tmp_path / "no" / "folder")[0] == 1
    assert sorted(os.listdir(tmp_path)) == ["all.safetensors", "model.safetensors"]


def test_torchs_own_optimizers_go_on_from_an_export(tmp_path: Path) -> None:
    model, optimizer = build(torch.float32, None, seed=1)
    train(model, optimizer, range(3))
    checkpoint.save(tmp_path / "a", optimizer, model=model)
    expected = snapshot(model, optimizer)
    for kind in ("muon", "adamw"):
        assert (
            main(["ckpt", "export", str(tmp_path / "a"), str(tmp_path / kind), "--optimizer", kind])
            == 0
        )
    state = checkpoint.read_export(tmp_path / "adamw")
    (names,) = (group["param_names"] for group in state["param_groups"])
    adamw = torch.optim.AdamW([model.get_parameter(name) for name in names], lr=1.0)
    adamw.load_state_dict(state)
    for name in names:
        entry = adamw.state[model.get_parameter(name)]
        assert torch.equal(entry["exp_avg_sq"], expected[f"{name}/exp_avg_sq"])
    grads = {n: torch.randn_like(p) for n, p in model.named_parameters() if p.requires_grad}
    twin, ours = build(torch.float32, None, seed=1)
    checkpoint.load(tmp_path / "a", ours, model=twin)
    for each in (model, twin):
        for name, grad in grads.items():
            each.get_parameter(name).grad = grad.clone()
    adamw.step()
    ours.step()
    for name in names:
        torch.testing.assert_close(model.get_parameter(name), twin.get_parameter(name))

    state = checkpoint.read_export(tmp_path / "muon")
    assert [group["lr"] for group in state["param_groups"]] == [2e-2, 5e-3]
    flat = [name for group in state["param_groups"] for name in group["param_names"]]
    assert flat == ["wide", "tall", "row", "experts"]
    matrices = flat[:3]
    muon = torch.optim.Muon(
        [{"params": [model.get_parameter(n) for n in matrices[:2]]}, {"params": [model.row]}]
    )
    # torch.optim.Muon takes no stacks of matrices.
    assert state["param_groups"][1]["param_names"].pop() == "experts"
    del state["state"][state["param_groups"][1]["params"].pop()]
    muon.load_state_dict(state)
    for name in matrices:
        buffer = muon.state[model.get_parameter(name)]["momentum_buffer"]
        assert torch.equal(buffer, expected[f"{name}/momentum_buffer"])
    muon.step()
    buffer = muon.state[model.get_parameter("wide")]["momentum_buffer"]
    later = ours.state_dict()["state"][0]["momentum_buffer"]
    torch.testing.assert_close(buffer, later)


def test_an_export_that_torch_cannot_express_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, optimizer = build(torch.float32, None, seed=1, adjust_lr_fn="max_dim")
    checkpoint.save(tmp_path / "a", optimizer, model=model)
    code, answer, _ = run(capsys, "export", tmp_path / "a", tmp_path / "b", "--optimizer", "muon")
    assert code == 1
    assert "adjust_lr_fn='max_dim'" in answer["error"]
    (tmp_path / "c").write_bytes(b"not one")
    with pytest.raises(checkpoint.CheckpointError, match="is no file of"):
        checkpoint.read_export(tmp_path / "c")


def test_an_export_has_the_installed_torchs_name_of_a_scaling(tmp_path: Path) -> None:
    model, optimizer = build(torch.float32, None, seed=1, adjust_lr_fn="mup")
    checkpoint.save(tmp_path / "a", optimizer, model=model)
    try:
        torch.optim.Muon([torch.zeros(1, 1)], adjust_lr_fn="spectral_unclamped")
    except ValueError:  # torch 2.13 has no name for it
        with pytest.raises(checkpoint.CheckpointError, match=r"'mup', which .* does not know"):
            checkpoint.export(tmp_path / "a", tmp_path / "b", "muon")
    else:
        checkpoint.export(tmp_path / "a", tmp_path / "b", "muon")
        groups = checkpoint.read_export(tmp_path / "b")["param_groups"]
        assert {group["adjust_lr_fn"] for group in groups} == {"spectral_unclamped"}


def test_a_scaling_of_a_newer_torch_is_not_taken_for_none(tmp_path: Path) -> None:
    """load_state_dict of torch.optim.Muon takes any name, and scales by 1 if it is unknown."""
    model, optimizer = build(torch.float32, None, seed=1)
    checkpoint.save(tmp_path / "a", optimizer, model=model)
    written = checkpoint.export(tmp_path / "a", tmp_path / "b", "muon").read_bytes()
    assert written.count(b"match_rms_adamw") > 0
    (tmp_path / "b").write_bytes(written.replace(b"match_rms_adamw", b"match_rms_later"))
    with pytest.raises(checkpoint.CheckpointError, match="'match_rms_later', which torch"):
        checkpoint.read_export(tmp_path / "b")


def test_the_command_runs_and_says_how(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "distmuon", "ckpt", "verify", "--help"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "examples:" in done.stdout
    assert "exit codes: 0 done, 1 the checkpoint is broken" in done.stdout

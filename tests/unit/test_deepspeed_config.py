"""What a DeepSpeed configuration is refused for; DeepSpeed itself is not needed to say so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distmuon import build_param_groups
from distmuon.adapters.deepspeed import ZeroOrtho, check_config, tag
from distmuon.adapters.deepspeed.by_name import TaggedZeroOrtho
from distmuon.adapters.deepspeed.config_check import is_old

GOOD: dict[str, Any] = {
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 2},
}
CONFIGS = Path(__file__).parents[2] / "configs" / "deepspeed"

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"zero_optimization": {"stage": 3}}, "Set it to 2"),
    ({"zero_optimization": {"stage": 1, "elastic_checkpoint": True}}, "Set it to false"),
    (
        {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "nvme"}}},
        'set it to "none"',
    ),
    (
        {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
        '"zero_force_ds_cpu_optimizer": false',
    ),
    ({"tensor_parallel": {"autotp_size": 2}}, "Set it to 1"),
    ({"optimizer": {"type": "Muon", "params": {}}}, "Remove the section"),
    ({"zero_allow_untested_optimizer": False}, '"zero_allow_untested_optimizer": true'),
]


@pytest.mark.parametrize(("change", "advice"), REFUSED, ids=[advice for _, advice in REFUSED])
def test_a_config_is_refused_with_what_to_change(change: dict[str, Any], advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        check_config({**GOOD, **change})


def test_a_config_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(GOOD))
    check_config(path)
    path.write_text(json.dumps({**GOOD, "zero_optimization": {"stage": 3}}))
    with pytest.raises(ValueError, match="stage is 3"):
        check_config(str(path))


def test_a_named_optimizer_may_stand_in_the_config() -> None:
    section = {"optimizer": {"type": "DistMuon", "params": {"lr": 1e-3}}}
    check_config({"zero_optimization": {"stage": 2}, **section}, by_name=True)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.name)
def test_our_configs_are_not_refused(path: Path) -> None:
    check_config(path, by_name="optimizer" in json.loads(path.read_text()))


@pytest.mark.parametrize(
    ("version", "old"), [("0.18.9", True), ("0.19.0", False), ("0.19.8+cpu", False), ("1.0", False)]
)
def test_versions_with_wrong_gradients_are_old(version: str, old: bool) -> None:
    assert is_old(version) == old


def test_a_name_that_deepspeed_takes_for_its_own_is_refused() -> None:
    class ZeroMuon(ZeroOrtho):
        pass

    with pytest.raises(ValueError, match='a name without "muon"'):
        ZeroMuon(build_param_groups(nn.Linear(3, 3)))


def test_zero3_parameters_are_refused_at_once() -> None:
    model = nn.Linear(3, 3)
    model.weight.ds_id = 0
    with pytest.raises(ValueError, match='"stage": 2'):
        ZeroOrtho(build_param_groups(model))


def test_untagged_parameters_are_refused() -> None:
    model = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"tag\(model\)"):
        TaggedZeroOrtho(model.parameters())


def test_tags_make_the_same_groups_as_names() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 9))
    model[1].bias.requires_grad_(requires_grad=False)
    tag(model)
    tagged = TaggedZeroOrtho(model.parameters(), lr=0.1, adam_lr=0.2, weight_decay=0.3)
    named = ZeroOrtho(build_param_groups(model, weight_decay=0.3), lr=0.1)
    for one, other in zip(tagged.param_groups, named.param_groups, strict=True):
        assert [id(p) for p in one["params"]] == [id(p) for p in other["params"]]
        assert one["algorithm"] == other["algorithm"]
        assert one["weight_decay"] == other["weight_decay"]
    assert [group["lr"] for group in tagged.param_groups] == [0.1, 0.2, 0.2]


def test_normuon_is_refused_because_deepspeed_would_lose_its_state() -> None:
    group = {"params": [("w", nn.Parameter(torch.zeros(4, 4)))], "algorithm": "normuon"}
    with pytest.raises(ValueError, match=r"one value per row.*would lose it"):
        ZeroOrtho([group])

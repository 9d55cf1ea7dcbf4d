"""What a DeepSpeed configuration is refused for; DeepSpeed itself is not needed to say so."""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distmuon import Muon, build_param_groups
from distmuon.adapters.deepspeed import ZeroOrtho, check_config, tag
from distmuon.adapters.deepspeed.build import in_cheap_order
from distmuon.adapters.deepspeed.by_name import TaggedZeroOrtho
from distmuon.adapters.deepspeed.config_check import is_old
from distmuon.adapters.deepspeed.partition import read_layout
from distmuon.cost import default_cost_model
from distmuon.group_check import PLAIN_READING
from distmuon.layout import Layout, read_spec
from distmuon.ownership import assign_fixed

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


def test_what_is_no_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Invalid configuration of type int"):
        check_config(5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r'"zero_optimization" in the configuration is 2.*braces'):
        check_config({"zero_optimization": 2})
    with pytest.raises(ValueError, match=r"stage is '3'. Must be 0, 1 or 2"):
        check_config({"zero_optimization": {"stage": "3"}})
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(ValueError, match=r"broken.json is no JSON"):
        check_config(broken)


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


NOT_HERE: list[tuple[str, Any, str]] = [
    ("qk_clip", object(), "Use distmuon.Muon with DistributedDataParallel or Accelerate"),
    ("diagnostics_every", 5, "measure with distmuon.Muon"),
    ("process_group", object(), "DeepSpeed's own ranks are taken"),
    ("layout", "auto", "ZeRO cuts the parameters"),
    ("cost_model", object(), "ZeRO cuts the parameters"),
    ("max_split", 2, "ZeRO cuts the parameters"),
    ("split_dtype", "float16", "ZeRO cuts the parameters"),
    ("reduce", "hook", "DeepSpeed averages the gradients"),
    ("missing_grad", "zero", "DeepSpeed averages the gradients"),
    ("nonfinite", "skip", "DeepSpeed averages the gradients"),
    ("max_skips", 3, "DeepSpeed averages the gradients"),
    ("publish_bytes", 1 << 20, '"allgather_bucket_size"'),
    ("state_dict_kind", "sharded", "saves each rank's own part"),
    ("check_desync_every", 100, "compare their setup"),
    ("profile", "phases", '"wall_clock_breakdown": true'),
    ("wire", "bfloat16", "in fp32"),
]


@pytest.mark.parametrize(("name", "value", "advice"), NOT_HERE, ids=[n for n, _, _ in NOT_HERE])
def test_muons_other_arguments_are_refused_with_what_to_do(
    name: str, value: object, advice: str
) -> None:
    groups = build_param_groups(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=f"{name} is not for DeepSpeed: .*{advice}"):
        ZeroOrtho(groups, **{name: value})


def test_every_argument_of_muon_is_taken_or_refused() -> None:
    ours, here = (set(inspect.signature(each).parameters) for each in (Muon, ZeroOrtho))
    assert ours - here - {"params"} == {name for name, _, _ in NOT_HERE}


def test_what_is_turned_off_may_be_given() -> None:
    groups = build_param_groups(nn.Linear(3, 3))
    ZeroOrtho(groups, qk_clip=None, diagnostics_every=0, max_update_rms=1.0)
    with pytest.raises(TypeError, match="Unknown argument 'learning_rate'"):
        ZeroOrtho(groups, learning_rate=1.0)


@pytest.mark.parametrize("algorithm", ["lion", "torch.optim.SGD"])
def test_a_companion_is_refused(algorithm: str) -> None:
    group = {"params": [("w", nn.Parameter(torch.zeros(4, 4)))], "algorithm": algorithm}
    with pytest.raises(ValueError, match=r"Inside DeepSpeed it must be one of"):
        ZeroOrtho([group])


def test_a_partition_elsewhere_than_its_parameters_is_refused() -> None:
    """Offload keeps partitions in host memory; "meta" stands for any other device."""
    named = [("w", nn.Parameter(torch.zeros(4, 6)))]
    group = {**PLAIN_READING, "algorithm": "muon"}
    layout, _ = read_layout(named, torch.zeros(12), 2, group)
    assert layout.numel == 24
    elsewhere = torch.zeros(12, device="meta")
    with pytest.raises(ValueError, match=r"on meta, .* on cpu: .*Remove zero_optimization.offload"):
        read_layout(named, elsewhere, 2, group)
    moved = [("w", nn.Parameter(torch.zeros(4, 6, device="meta")))]
    with pytest.raises(ValueError, match=r"on cpu, .* on meta: .*over meta cannot send"):
        read_layout(moved, torch.zeros(12), 2, group)


def test_groups_are_checked_as_muons_are() -> None:
    layer = nn.Linear(3, 3)
    norm = {"params": list(nn.LayerNorm(3).named_parameters()), "algorithm": "adamw"}
    with pytest.raises(ValueError, match="No parameter is routed to Muon"):
        ZeroOrtho([{"params": [], "algorithm": "muon"}, norm])
    with pytest.raises(TypeError, match=r"Entry 0 of the groups is a Parameter. Must be a dict"):
        ZeroOrtho(layer.parameters())  # type: ignore[arg-type]
    twice = {"params": [("w", layer.weight)]}
    with pytest.raises(ValueError, match="w is already in the optimizer as w"):
        ZeroOrtho([twice, {**twice, "algorithm": "adamw"}])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"wave_bytes": 0}, r"wave_bytes=0. Must be >= 1"),
        ({"wave_bytes": "64"}, "wave_bytes='64'. Must be an int"),
        ({"momentum_key": "momentum"}, "Invalid momentum_key='momentum'"),
        ({"lr": "fast"}, "Invalid lr='fast'"),
        ({"betas": 0.9}, "Invalid betas=0.9"),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        ZeroOrtho(build_param_groups(nn.Linear(3, 3)), **options)


def gpt2_matrices() -> list[tuple[str, torch.Tensor]]:
    shapes = {**dict.fromkeys("qkvo", (768, 768)), "up": (3072, 768), "down": (768, 3072)}
    return [
        (f"h.{layer}.{name}", torch.empty(shape, device="meta"))
        for layer in range(12)
        for name, shape in shapes.items()
    ]


def balance_and_moved(named: Sequence[tuple[str, torch.Tensor]], ranks: int) -> tuple[float, float]:
    """Work of the busiest rank over the mean, and the share of elements that travel each way."""
    specs = tuple(read_spec(name, p.shape, PLAIN_READING) for name, p in named)
    offsets = (0, *itertools.accumulate(spec.numel for spec in specs))
    # As ZeRO cuts it: padded at the end to a multiple of two elements for each rank.
    layout = Layout(specs, offsets[:-1], ranks, -(-offsets[-1] // (2 * ranks)) * 2)
    ownership = assign_fixed(layout)
    loads = ownership.loads(default_cost_model("cpu"))
    return max(loads) * ranks / sum(loads), sum(ownership.traffic()[0]) / offsets[-1]


@pytest.mark.parametrize(("ranks", "given", "left"), [(8, 0.05, 0.0), (16, 0.11, 0.015)])
def test_zero_gets_the_matrices_in_an_order_that_keeps_them_at_home(
    ranks: int, given: float, left: float
) -> None:
    named = gpt2_matrices()
    arranged = in_cheap_order({"params": named, "algorithm": "muon", **PLAIN_READING}, ranks)
    assert sorted(name for name, _ in arranged["params"]) == sorted(name for name, _ in named)
    before, after = (balance_and_moved(each, ranks) for each in (named, arranged["params"]))
    assert before[1] > given
    assert after[1] <= left
    assert after[0] <= before[0] < 1.1

"""Handles, and what is refused when state is loaded."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex

from distmuon import Muon
from distmuon.dcp import StateHandle


def make(*, cols: int = 6, dtype: torch.dtype = torch.float32, **options: Any) -> Muon:
    torch.manual_seed(0)
    muon = [("a", nn.Parameter(torch.randn(4, cols))), ("b", nn.Parameter(torch.randn(5, 4)))]
    rest = [("c", nn.Parameter(torch.randn(3)))]
    groups = [{"params": muon}, {"params": rest, "algorithm": "adamw"}]
    optimizer = Muon(groups, **options)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.data = parameter.data.to(dtype)
    return optimizer


def step(optimizer: Muon, seed: int = 0) -> None:
    torch.manual_seed(seed)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def handle() -> StateHandle:
    return StateHandle("momentum_buffer of a", (4, 6), [range(3, 12)], torch.arange(9.0))


USES: list[Callable[[StateHandle], Any]] = [
    lambda h: h + 1,
    lambda h: torch.equal(h, h),
    lambda h: torch.zeros(4, 6).copy_(h),
    lambda h: h.copy_(torch.zeros(4, 6)),
    lambda h: h.zero_(),
    lambda h: h.new_empty(3),
    lambda h: h[0],
    lambda h: torch.cat([h, h]),
]


@pytest.mark.parametrize("use", USES)
def test_a_handle_is_not_taken_for_the_whole(use: Callable[[StateHandle], Any]) -> None:
    with pytest.raises(RuntimeError, match=r"stands for one rank's part.*consolidate_state_dict"):
        use(handle())


@pytest.mark.parametrize("save", [pickle.dumps, lambda h: torch.save(h, "/dev/null")])
def test_a_handle_is_not_pickled(save: Callable[[StateHandle], Any]) -> None:
    with pytest.raises(TypeError, match=r"momentum_buffer of a, .*ranks' would be lost. Save it"):
        save(handle())


def test_copies_of_a_handle_are_of_their_own_and_alike() -> None:
    original = handle()
    others = [copy.deepcopy(original), original.clone(), original.to(torch.float64)]
    original.local.zero_()
    for other in others:
        assert isinstance(other, StateHandle)
        assert other.local.sum() == 36
        assert (other.shape, other.ranges) == (original.shape, (range(3, 12),))
    original.copy_(others[0])
    assert original.local.sum() == 36
    assert original.detach() is original
    with pytest.raises(ValueError, match="covers other elements"):
        original.copy_(StateHandle("x", (4, 6), [range(4, 13)], torch.zeros(9)))


def test_pieces_are_views_and_unknown_ones_are_refused() -> None:
    pieces = handle()
    chunks = pieces.__create_chunk_list__()
    assert [tuple(chunk.offsets) for chunk in chunks] == [(0, 3), (1, 0)]
    piece = pieces.__get_tensor_shard__(MetadataIndex("a", chunks[1].offsets))
    piece.fill_(-1)
    assert pieces.local.tolist() == [0, 1, 2, -1, -1, -1, -1, -1, -1]
    with pytest.raises(ValueError, match="no piece at"):
        pieces.__get_tensor_shard__(MetadataIndex("a", torch.Size((2, 0))))


def test_importing_the_package_does_not_import_checkpointing() -> None:
    code = "import sys, distmuon; assert 'torch.distributed.checkpoint' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- one dictionary, many forms ----------------------------------------------------------------


def test_handles_taken_before_the_first_step_stay_views_of_the_state(tmp_path: Path) -> None:
    source = make()
    step(source)
    dcp.save(source.sharded_state_dict(), checkpoint_id=tmp_path)
    expected = source.state_dict()["state"]
    late = make()
    state = late.sharded_state_dict()
    assert not state["state"]["a"]["momentum_buffer"].local.any()
    step(late, 7)
    dcp.load(state, checkpoint_id=tmp_path)
    late.load_state_dict(state)
    found = late.state_dict()["state"]
    assert torch.equal(found[0]["momentum_buffer"], expected[0]["momentum_buffer"])
    assert torch.equal(found[2]["exp_avg_sq"], expected[2]["exp_avg_sq"])
    assert found[2]["step"] == expected[2]["step"] == 1


def test_loaded_state_is_there_before_the_first_step_and_takes_no_hidden_one() -> None:
    source = make(dtype=torch.bfloat16)
    step(source)
    saved = copy.deepcopy(source.state_dict())
    other = make(dtype=torch.bfloat16)
    other.load_state_dict(saved)
    assert list(other.state[other.param_groups[0]["params"][0]]) == ["momentum_buffer", "master"]
    again = other.state_dict()["state"]
    for number, entry in saved["state"].items():
        for key, value in entry.items():
            assert torch.equal(torch.as_tensor(again[number][key]), torch.as_tensor(value)), key


def test_state_is_matched_by_name_where_both_sides_have_names() -> None:
    source = make()
    step(source)
    saved = copy.deepcopy(source.state_dict())
    first = saved["param_groups"][0]
    first["params"].reverse()
    first["param_names"] = ["module." + name for name in reversed(first["param_names"])]
    other = make()
    other.load_state_dict(saved)
    assert other.param_groups[0]["param_names"] == ["a", "b"]
    found, expected = other.state_dict()["state"], source.state_dict()["state"]
    for number in (0, 1):
        mine, theirs = found[number]["momentum_buffer"], expected[number]["momentum_buffer"]
        assert torch.equal(mine, theirs)


def change_name(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["param_names"] = ["a", "z"]


def add_state(saved: dict[str, Any]) -> None:
    saved["state"][7] = saved["state"][0]


def bad_step(saved: dict[str, Any]) -> None:
    saved["state"][2]["step"] = 1.5


def foreign_handle(saved: dict[str, Any]) -> None:
    saved["state"][0]["momentum_buffer"] = handle()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_name, "Group 0 was saved without b; in its place it has z"),
        (add_state, r"state of \[7\], which none of its parameter groups lists"),
        (bad_step, r"saved step of c is 1\.5"),
        (foreign_handle, "is a handle from another layout: here this rank holds elements 0 to 24"),
    ],
)
def test_foreign_state_is_refused_and_changes_nothing(
    damage: Callable[[dict[str, Any]], None], message: str
) -> None:
    source = make()
    step(source)
    saved = copy.deepcopy(source.state_dict())
    damage(saved)
    other = make(lr=0.5)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(saved)
    assert other.param_groups[0]["lr"] == 0.5
    assert other.state_dict()["state"] == {}


def test_a_file_of_other_shapes_or_layers_is_refused_by_key(tmp_path: Path) -> None:
    source = make()
    step(source)
    dcp.save(source.sharded_state_dict(), checkpoint_id=tmp_path)
    state = make(cols=7).sharded_state_dict()
    with pytest.raises(CheckpointException, match=r"Size mismatch .*state\.a\.momentum_buffer"):
        dcp.load(state, checkpoint_id=tmp_path)
    more = Muon([("a", nn.Parameter(torch.ones(4, 6))), ("new", nn.Parameter(torch.ones(3, 3)))])
    with pytest.raises(CheckpointException, match=r"state\.new\.momentum_buffer"):
        dcp.load({"state": more.sharded_state_dict()["state"]}, checkpoint_id=tmp_path)


def test_parameters_without_names_cannot_be_saved_by_name() -> None:
    with pytest.raises(ValueError, match=r"group 0 have no names .* \(name, parameter\) pairs"):
        Muon([nn.Parameter(torch.ones(3, 3))]).sharded_state_dict()


def test_a_layout_that_changed_after_loading_is_an_error_that_loading_again_mends() -> None:
    source = make()
    step(source)
    saved = copy.deepcopy(source.state_dict())
    other = make()
    other.load_state_dict(saved)
    first = other.param_groups[0]["params"][0]
    first.data = first.data.to(torch.float64)
    with pytest.raises(RuntimeError, match="laid out otherwise than when state was loaded"):
        step(other)
    other.load_state_dict(saved)
    step(other)
    assert other.state_dict()["state"][2]["step"] == 2


def test_the_kind_is_checked_and_handles_are_not_consolidated() -> None:
    with pytest.raises(ValueError, match="Invalid state_dict_kind='half'"):
        make(state_dict_kind="half")
    with pytest.raises(RuntimeError, match="nothing would use what is gathered"):
        make(state_dict_kind="sharded").consolidate_state_dict()


def test_changing_every_dtype_after_loading_is_fine() -> None:
    source = make()
    step(source)
    saved = copy.deepcopy(source.state_dict())
    other = make()
    other.load_state_dict(saved)
    for group in other.param_groups:
        for parameter in group["params"]:
            parameter.data = parameter.data.to(torch.bfloat16)
    loaded: Tensor = other.state_dict()["state"][0]["momentum_buffer"].clone()
    assert torch.equal(loaded, saved["state"][0]["momentum_buffer"])
    step(other)
    assert "master" in other.state_dict()["state"][0]


def test_masters_are_the_parameters_values_before_the_first_step() -> None:
    optimizer = make(dtype=torch.bfloat16)
    state = optimizer.sharded_state_dict()["state"]
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            assert torch.equal(state[name]["master"].local, parameter.detach().float().flatten())


@pytest.mark.parametrize("stepped", [False, True])
def test_an_optimizers_own_handles_change_nothing_when_they_are_loaded(stepped: bool) -> None:
    optimizer, twin = make(state_dict_kind="sharded"), make()
    for each in (optimizer, twin) if stepped else ():
        step(each)
    optimizer.load_state_dict(optimizer.state_dict())  # as Accelerate's prepare does
    for each in (optimizer, twin):
        step(each, 1)
    for mine, other in zip(optimizer.param_groups, twin.param_groups, strict=True):
        assert all(map(torch.equal, mine["params"], other["params"]))

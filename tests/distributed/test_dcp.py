"""Sharded state through torch.distributed.checkpoint, and whole, on other numbers of ranks."""

import gc
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from distmuon import Muon
from tests.distributed.test_optimizer import (
    RAGGED,
    assert_same_bits,
    build,
    step_with_ones,
    train,
)
from tests.harness import run_ranks

Weights = dict[str, Tensor]


def save_both(folder: Path, dtype: torch.dtype, layout: Any) -> tuple[Weights, Any, set[int]]:
    weights, optimizer = train(RAGGED, dtype, dist.group.WORLD, steps=3, layout=layout)
    dcp.save({"optimizer": optimizer.sharded_state_dict()}, checkpoint_id=folder)
    optimizer.consolidate_state_dict(to=0)
    whole = optimizer.state_dict() if dist.get_rank() == 0 else None
    (plan,) = optimizer.plan
    names = [spec.name for spec in plan.ownership.layout.specs]
    holders = plan.ownership.layout.holders(names.index("wide"))
    return weights, whole, {piece.rank for piece in holders}


def resume_both(
    folder: Path, whole: Any, weights: Weights, dtype: torch.dtype, layout: Any
) -> tuple[Weights, Weights]:
    results = []
    for source in ("handles", "whole"):
        model, optimizer = build(RAGGED, dtype, dist.group.WORLD, layout=layout)
        for name, parameter in model.items():
            parameter.data.copy_(weights[name])
        saved = whole
        if source == "handles":
            saved = optimizer.sharded_state_dict()
            dcp.load({"optimizer": saved}, checkpoint_id=folder)
        optimizer.load_state_dict(saved)
        results.append(step_with_ones(model, optimizer))
    return results[0], results[1]


@pytest.mark.parametrize(
    ("before", "after", "dtype", "layout"),
    [
        (4, 2, torch.float32, "flat"),
        (2, 3, torch.bfloat16, "flat"),
        (8, 1, torch.float32, "flat"),
        (1, 4, torch.bfloat16, "flat"),
        (3, 8, torch.float32, "aligned"),  # more ranks than matrices: some hold nothing
    ],
)
def test_i6_state_reshards_bitwise_in_handles_and_whole(
    before: int, after: int, dtype: torch.dtype, layout: str, tmp_path: Path
) -> None:
    model, optimizer = build(RAGGED, dtype, None)
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        for parameter in model.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
        optimizer.step()
    expected = step_with_ones(model, optimizer)
    saved = run_ranks(before, save_both, tmp_path, dtype, layout)
    weights, whole, holders = saved[0]
    assert layout == "aligned" or holders == set(range(before)), "a matrix is cut by every rank"
    results = run_ranks(after, resume_both, tmp_path, whole, weights, dtype, layout)
    for source in range(2):
        assert_same_bits([result[source] for result in results], expected)


# --- frameworks --------------------------------------------------------------------------------

MUON = ("first.weight", "second.weight", "experts")


class Model(nn.Module):
    """Every kind of shape: matrices, a stack of them, a convolution, vectors, a scalar."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(6, 7)
        self.first = nn.Linear(7, 5)
        self.second = nn.Linear(5, 11)
        self.conv = nn.Conv1d(11, 3, 3)
        self.experts = nn.Parameter(torch.randn(3, 5, 4))
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.to(dtype)


def make(
    dtype: torch.dtype = torch.float32, muon: tuple[str, ...] = MUON, **options: Any
) -> tuple[Model, Muon]:
    model = Model(dtype)
    named = list(model.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named if n in muon], "lr": 0.02},
        {"params": [(n, p) for n, p in named if n not in muon], "algorithm": "adamw"},
    ]
    group = dist.group.WORLD if dist.is_initialized() else None
    return model, Muon(groups, process_group=group, **options)


def steps(model: Model, optimizer: torch.optim.Optimizer, seeds: Any) -> Weights:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            grad = torch.randn(parameter.shape, generator=generator)
            parameter.grad = grad.to(parameter.dtype)
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def save_as_frameworks_do(folder: Path, dtype: torch.dtype, flatten: bool) -> Weights:
    model, optimizer = make(dtype, state_dict_kind="sharded")
    weights = steps(model, optimizer, range(2))
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    # In a group of its own: its messages must not meet the step's.
    saving = dcp.async_save(state, checkpoint_id=folder, process_group=dist.new_group())
    steps(model, optimizer, [99])  # what is saved is the state at the call
    saving.result()
    return weights


def resume_as_frameworks_do(
    folder: Path, weights: Weights, dtype: torch.dtype, flatten: bool
) -> tuple[int, Weights]:
    model, optimizer = make(dtype, state_dict_kind="sharded")
    model.load_state_dict(weights)
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(model, optimizer, state, options=options)
    hidden = optimizer.report().steps
    return hidden, steps(model, optimizer, [2])


@pytest.mark.parametrize(("dtype", "flatten"), [(torch.float32, False), (torch.bfloat16, True)])
def test_torch_checkpointing_reshards_and_saves_in_the_background(
    dtype: torch.dtype, flatten: bool, tmp_path: Path
) -> None:
    model, optimizer = make(dtype)
    expected = steps(model, optimizer, range(3))
    weights = run_ranks(2, save_as_frameworks_do, tmp_path, dtype, flatten)[0]
    results = run_ranks(3, resume_as_frameworks_do, tmp_path, weights, dtype, flatten)
    assert [hidden for hidden, _ in results] == [0, 0, 0], "no hidden step"
    assert_same_bits([result for _, result in results], expected)


def load_whole(whole: Any, weights: Weights) -> list[Weights]:
    results = []
    for from_rank_0 in (False, True):
        model, optimizer = make(state_dict_kind="sharded")
        model.load_state_dict(weights)
        given = whole if dist.get_rank() == 0 or not from_rank_0 else {}
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=from_rank_0)
        set_optimizer_state_dict(model, optimizer, given, options=options)
        results.append(steps(model, optimizer, [2]))
    return results


def test_torchs_full_state_dict_is_taken_and_not_given_silently() -> None:
    model, optimizer = make()
    weights = steps(model, optimizer, range(2))
    whole = get_optimizer_state_dict(model, optimizer)
    whole = torch.load(_saved(whole))  # a copy that is not a view
    expected = steps(model, optimizer, [2])
    for results in zip(*run_ranks(2, load_whole, whole, weights), strict=True):
        assert_same_bits(list(results), expected)
    model, optimizer = make(state_dict_kind="sharded")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    with pytest.raises(TypeError, match=r"momentum_buffer of .* one rank's part, and the other"):
        _saved(get_optimizer_state_dict(model, optimizer, options=options))


def _saved(state: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


# --- the same file in other optimizers ---------------------------------------------------------

FLAT_MUON = ("first.weight", "second.weight")


def torch_optimizers(model: Model) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    named = dict(model.named_parameters())
    muon = torch.optim.Muon([named[name] for name in FLAT_MUON], lr=0.02)
    return muon, torch.optim.AdamW([p for name, p in named.items() if name not in FLAT_MUON])


def flat_tensors(state: Any) -> dict[str, Tensor]:
    return {
        f"{fqn}.{name}": torch.as_tensor(value).float()
        for fqn, entry in state["state"].items()
        for name, value in entry.items()
    }


def save_here(folder: Path) -> Any:
    model, optimizer = make(muon=FLAT_MUON)
    steps(model, optimizer, range(2))
    dcp.save(optimizer.sharded_state_dict(), checkpoint_id=folder)
    optimizer.consolidate_state_dict(to=0)
    if dist.get_rank():
        return None
    return flat_tensors(get_optimizer_state_dict(model, optimizer))


def load_here(folder: Path) -> Any:
    model, optimizer = make(muon=FLAT_MUON)
    state = optimizer.sharded_state_dict()
    dcp.load({"state": state["state"]}, checkpoint_id=folder)
    optimizer.load_state_dict(state)
    optimizer.consolidate_state_dict(to=1)
    if dist.get_rank() != 1:
        return None
    return flat_tensors(get_optimizer_state_dict(model, optimizer))


def test_torchs_own_muon_and_adamw_load_the_file(tmp_path: Path) -> None:
    expected = run_ranks(3, save_here, tmp_path)[0]
    model = Model(torch.float32)
    optimizers = torch_optimizers(model)
    state = get_optimizer_state_dict(model, optimizers)
    dcp.load({"state": state["state"]}, checkpoint_id=tmp_path)
    set_optimizer_state_dict(model, optimizers, state)
    found = flat_tensors(get_optimizer_state_dict(model, optimizers))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert found["first.weight.momentum_buffer"].any()


def test_the_file_of_torchs_own_muon_and_adamw_is_loaded(tmp_path: Path) -> None:
    model = Model(torch.float32)
    optimizers = torch_optimizers(model)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape)
    for optimizer in optimizers:
        optimizer.step()
    state = get_optimizer_state_dict(model, optimizers)
    dcp.save(state, checkpoint_id=tmp_path)
    expected = flat_tensors(state)
    found = run_ranks(2, load_here, tmp_path)[1]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


# --- memory ------------------------------------------------------------------------------------


def live_bytes() -> int:
    storages = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
        for each in gc.get_objects()
        if type(each) in (Tensor, nn.Parameter)
    }
    return sum(storages.values())


def bytes_after_loading(saved: Any) -> tuple[int, int]:
    _, optimizer = build(RAGGED, torch.float32, dist.group.WORLD)
    before = live_bytes()
    optimizer.load_state_dict(saved)
    return live_bytes() - before, optimizer.plan[0].ownership.layout.shard_numel * 4


def test_i3_whole_state_is_cut_as_it_is_loaded() -> None:
    _, optimizer = train(RAGGED, torch.float32, None, steps=1)
    saved = optimizer.state_dict()
    for kept, muon_shard in run_ranks(4, bytes_after_loading, saved):
        assert muon_shard <= kept < 1.1 * muon_shard  # AdamW's small part comes on top

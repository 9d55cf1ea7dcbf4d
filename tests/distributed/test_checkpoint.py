"""Checkpoints on real gloo ranks: any world size, any order, nothing half-changed."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distmuon import Muon, checkpoint
from distmuon.layout import LayoutKind
from tests.distributed.checkpoint_runs import (
    MATRICES,
    Bag,
    assert_same,
    build,
    snapshot,
    train,
)
from tests.harness import run_ranks

LAYOUTS: tuple[LayoutKind, ...] = ("flat", "aligned")
VARIANTS = tuple(itertools.product(LAYOUTS, (torch.float32, torch.bfloat16)))
ROOT = Path(__file__).parents[2]


def _group() -> Any:
    return dist.group.WORLD if dist.is_initialized() else None


def save_variants(folder: Path) -> int:
    cut = 0
    for layout, dtype in VARIANTS:
        model, optimizer = build(dtype, _group(), seed=1, layout=layout)
        train(model, optimizer, range(3))
        rank = optimizer.communicator.rank
        optimizer.param_groups[0]["lr"] = 0.0125
        checkpoint.save(
            folder / f"{layout}-{dtype}",
            optimizer,
            model=model,
            metadata={"step": 3, "best": float("inf")},
            tensors={"position": torch.tensor([7, 9]) + rank},
            rank_tensors={"rng": torch.tensor([rank, 5])},
        )
        places = optimizer.plan[0].ownership.layout
        if layout == "flat":
            cut += sum(len(places.holders(i)) > 1 for i in range(len(places.specs)))
    return cut


def load_variants(folder: Path) -> list[tuple[dict[str, Tensor], dict[str, Tensor], Any]]:
    found = []
    for layout, dtype in VARIANTS:
        model, optimizer = build(dtype, _group(), seed=2, order="reversed", layout=layout)
        loaded = checkpoint.load(folder / f"{layout}-{dtype}", optimizer, model=model)
        lrs = [group["lr"] for group in optimizer.param_groups]
        at_once = snapshot(model, optimizer)
        train(model, optimizer, range(3, 5))
        found.append((at_once, snapshot(model, optimizer), (loaded, lrs)))
    return found


@pytest.mark.parametrize(("saved_by", "loaded_by"), [(4, 2), (2, 3), (8, 1), (1, 4)])
def test_i6_state_of_n_ranks_loads_on_m_bitwise(
    saved_by: int, loaded_by: int, tmp_path: Path
) -> None:
    cuts = run_ranks(saved_by, save_variants, tmp_path)
    assert all(cut > 0 for cut in cuts) or saved_by == 1, "no border lies inside a matrix"
    for rank, results in enumerate(run_ranks(loaded_by, load_variants, tmp_path)):
        for (layout, dtype), (at_once, later, (loaded, lrs)) in zip(VARIANTS, results, strict=True):
            model, optimizer = build(dtype, None, seed=1, layout=layout)
            train(model, optimizer, range(3))
            assert_same(at_once, snapshot(model, optimizer))
            optimizer.param_groups[0]["lr"] = 0.0125
            train(model, optimizer, range(3, 5))
            assert_same(later, snapshot(model, optimizer))
            assert lrs == [2e-2, 5e-3, 0.0125], "groups are matched by their parameters"
            assert loaded.metadata == {"step": 3, "best": float("inf")}
            assert loaded.tensors["position"].tolist() == [7, 9], "rank 0's"
            assert loaded.world_size == saved_by
            assert loaded.rank_tensors is None, f"rank {rank} got another world size's"


def same_world(folder: Path) -> tuple[list[int], dict[str, Tensor], bool]:
    model, optimizer = build(torch.float32, _group(), seed=1)
    rank = optimizer.communicator.rank
    names = {"rng": torch.tensor([rank, 5])} | ({"extra": torch.ones(())} if rank else {})
    checkpoint.save(folder / "fresh", optimizer, model=model, rank_tensors=names)
    model, optimizer = build(torch.float32, _group(), seed=2)
    loaded = checkpoint.load(folder / "fresh", optimizer, model=model)
    assert loaded.rank_tensors is not None
    train(model, optimizer, range(2))
    own = loaded.rank_tensors
    return own["rng"].tolist(), snapshot(model, optimizer), "extra" in own


def test_a_fresh_optimizer_is_saved_and_each_rank_gets_its_own_back(tmp_path: Path) -> None:
    model, optimizer = build(torch.float32, None, seed=1)
    train(model, optimizer, range(2))
    expected = snapshot(model, optimizer)
    for rank, (own, found, extra) in enumerate(run_ranks(3, same_world, tmp_path)):
        assert own == [rank, 5]
        assert extra == (rank > 0)
        assert_same(found, expected)


def ddp_and_models_alone(folder: Path) -> None:
    model, optimizer = build(torch.float32, _group(), seed=1)
    wrapped = DistributedDataParallel(model)
    checkpoint.save(folder / "ddp", optimizer, model=wrapped)
    plain = Bag(torch.float32, 2, "reversed")
    checkpoint.load(folder / "ddp", model=plain, process_group=_group())
    for name, value in model.state_dict().items():
        assert torch.equal(plain.state_dict()[name], value), name
    checkpoint.save(folder / "model", model=model, process_group=_group())
    with pytest.raises(checkpoint.CheckpointError, match="saved without optimizer="):
        checkpoint.load(folder / "model", optimizer)
    checkpoint.save(folder / "state", optimizer)
    with pytest.raises(checkpoint.CheckpointError, match="saved without model="):
        checkpoint.load(folder / "state", optimizer, model=model)
    checkpoint.load(folder / "state", optimizer)


def test_wrapped_models_and_models_or_optimizers_alone(tmp_path: Path) -> None:
    run_ranks(2, ddp_and_models_alone, tmp_path)


def unaveraged_after_load(folder: Path) -> str:
    model, optimizer = build(torch.float32, _group(), seed=1)
    train(model, optimizer, range(1))
    checkpoint.save(folder / "a", optimizer, model=model)
    model, optimizer = build(torch.float32, _group(), seed=1)
    checkpoint.load(folder / "a", optimizer, model=model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 1.0 + dist.get_rank())
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    return str(caught.value)


def test_the_first_step_after_loading_still_wants_averaged_gradients(tmp_path: Path) -> None:
    for message in run_ranks(2, unaveraged_after_load, tmp_path):
        assert "must be averaged" in message


def misfits(folder: Path) -> str:
    model, optimizer = build(torch.float32, _group(), seed=1)
    train(model, optimizer, range(2))
    checkpoint.save(folder / "a", optimizer, model=model)
    other = Bag(torch.float32, 2)
    other.added = nn.Parameter(torch.ones(4, 4))
    other.wide = nn.Parameter(torch.ones(61, 151))
    other.tall = nn.Parameter(other.tall.detach().bfloat16())
    del other.row
    groups: list[dict[str, Any]] = [
        {"params": [(n, p) for n, p in other.named_parameters() if n in (*MATRICES, "added")]},
        {"params": [("bias", other.bias), ("scale", other.scale)], "algorithm": "adamw"},
        {"params": [("table", other.table)]},
    ]
    optimizer = Muon(groups, process_group=_group())
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.load(folder / "a", optimizer, model=other)
    assert not optimizer.state_dict()["state"], "nothing was allocated"
    assert optimizer.param_groups[0]["lr"] == 1e-3
    for name, value in other.state_dict().items():
        assert torch.equal(value, before[name])
    return str(caught.value)


def test_all_misfits_are_named_before_anything_is_changed(tmp_path: Path) -> None:
    for message in run_ranks(2, misfits, tmp_path):
        for line in (
            "added (muon F32 [4, 4]) is not in it: added?",
            "row (muon F32 [1, 37]) is not in the optimizer: removed?",
            "wide is muon F32 [61, 150] in the checkpoint and muon F32 [61, 151] in the optimizer",
            "tall is muon F32 [40, 9] in the checkpoint and muon BF16 [40, 9] in the optimizer",
            "table is adamw F32 [19, 5] in the checkpoint and muon F32 [19, 5] in the optimizer",
            "wide is F32 [61, 150] in the checkpoint and F32 [61, 151] in the model",
        ):
            assert line in message


def save_behind_training(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model, optimizer = build(torch.bfloat16, _group(), seed=1)
    train(model, optimizer, range(2))
    at_save = snapshot(model, optimizer)
    first = checkpoint.save(folder / "a", optimizer, model=model, async_save=True)
    train(model, optimizer, range(2, 4))  # the thread is writing what was copied
    second = checkpoint.save(folder / "b", optimizer, model=model, async_save=True)
    assert checkpoint.latest(folder) is not None, "the second save has waited for the first"
    assert first.wait() == folder / "a"
    assert second.wait() == second.wait() == folder / "b"
    dist.barrier()
    assert checkpoint.latest(folder) == folder / "b"
    model, optimizer = build(torch.bfloat16, _group(), seed=2)
    checkpoint.load(folder / "a", optimizer, model=model)
    return at_save, snapshot(model, optimizer)


def test_an_async_save_holds_what_was_there_when_it_was_called(tmp_path: Path) -> None:
    for at_save, loaded in run_ranks(2, save_behind_training, tmp_path):
        assert_same(loaded, at_save)


@contextlib.contextmanager
def no_large_files_on(rank: int) -> Iterator[None]:
    """Every file of this rank ends at 1,000 bytes, as on a disk with a quota."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def without_room(folder: Path, rank: int) -> list[str]:
    model, optimizer = build(torch.float32, _group(), seed=1)
    train(model, optimizer, range(2))
    expected = snapshot(model, optimizer)
    checkpoint.save(folder / "old", optimizer, model=model)
    train(model, optimizer, range(2, 3))
    messages = []
    with no_large_files_on(rank):
        for name in ("new", "old"):
            with pytest.raises(checkpoint.CheckpointError) as caught:
                checkpoint.save(folder / name, optimizer, model=model)
            messages.append(str(caught.value))
        pending = checkpoint.save(folder / "new", optimizer, model=model, async_save=True)
        for _ in range(2):
            with pytest.raises(checkpoint.CheckpointError) as caught:
                pending.wait()
            messages.append(str(caught.value))
        pending = checkpoint.save(folder / "new", optimizer, model=model, async_save=True)
        with pytest.raises(checkpoint.CheckpointError) as caught:
            checkpoint.save(folder / "newer", optimizer, model=model)
        messages.append(str(caught.value))
    dist.barrier()
    assert os.listdir(folder) == ["old"]
    model, optimizer = build(torch.float32, _group(), seed=2)
    checkpoint.load(folder / "old", optimizer, model=model)
    assert_same(snapshot(model, optimizer), expected)
    checkpoint.save(folder / "new", optimizer, model=model)
    return messages


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_write_fails_the_save_on_all_ranks(rank: int, tmp_path: Path) -> None:
    for messages in run_ranks(2, without_room, tmp_path, rank):
        assert len(messages) == 5
        for message in messages:
            assert f"rank {rank}: " in message
            assert f"rank-{rank:05d}.safetensors cannot be written" in message
            assert "File too large" in message


def peak_memory(folder: Path) -> tuple[float, float, float]:
    shape = (1024, 4096)
    parameters = [(f"m{i}", nn.Parameter(torch.zeros(shape))) for i in range(10)]
    optimizer = Muon(parameters, process_group=_group())
    (bucket,) = optimizer.open()
    bucket.shard.state["momentum_buffer"].fill_(1.0)
    checkpoint.save(folder / "first", optimizer)  # what is imported lazily does not count
    extra = []
    for name in ("sync", "async"):
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = _memory("VmRSS")
        pending = checkpoint.save(folder / name, optimizer, async_save=name == "async")
        pending.wait()
        extra.append(_memory("VmHWM") - before)
    return bucket.shard.state_bytes / 2**20, extra[0], extra[1]


def _memory(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def test_saving_needs_no_second_shard_and_async_just_one(tmp_path: Path) -> None:
    for shard, sync, behind in run_ranks(2, peak_memory, tmp_path):
        assert shard == pytest.approx(80)
        assert sync < shard / 4, "MiB"
        assert behind < shard + 64, "MiB"


def keep_two(folder: Path) -> None:
    _, optimizer = build(torch.float32, _group(), seed=1)
    for step in (1, 2, 9, 10):
        checkpoint.save(folder / f"step-{step}", optimizer, keep_latest=2)
        if step == 2 and dist.get_rank() == 0:
            (folder / "step-2" / "rank-00001.safetensors").unlink()
    with pytest.raises(ValueError, match="keep_latest"):
        checkpoint.save(folder / "step-11", optimizer, keep_latest=0)


def test_keep_latest_removes_older_whole_checkpoints_only(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    run_ranks(2, keep_two, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["logs", "step-10", "step-2", "step-9"]


def disagreeing(folder: Path) -> list[str]:
    _, optimizer = build(torch.float32, _group(), seed=1)
    rank = dist.get_rank()
    messages = []
    calls: list[tuple[Any, Any, Any]] = [
        (folder / str(rank), {}, {}),
        (folder / "a", {"bad": {1, 2}}, {}),
        (folder / "a", {}, {"z": torch.ones(2, dtype=torch.complex64)} if rank else {}),
        (folder / "a", {}, {"seed": 3} if rank else {}),
        (folder / "a", {}, [torch.ones(1)] if rank else {}),
        (None if rank else folder / "a", {}, {}),
    ]
    for path, metadata, own in calls:
        with pytest.raises(checkpoint.CheckpointError) as caught:
            checkpoint.save(path, optimizer, metadata=metadata, rank_tensors=own)
        messages.append(str(caught.value))
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.load(None if rank else folder / "a", optimizer)  # type: ignore[arg-type]
    return [*messages, str(caught.value)]


def test_ranks_that_save_nonsense_are_told_so_together(tmp_path: Path) -> None:
    parts = (
        *("different paths", "rank 0: metadata must be", "rank 1: z has dtype", "rank 1: rank_"),
        *("rank 1: AttributeError: 'list'", "rank 1: path=None is no path", "rank 1: path=None"),
    )
    for messages in run_ranks(2, disagreeing, tmp_path):
        for message, part in zip(messages, parts, strict=True):
            assert part in message
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("keep_latest", [True, 1.5, "3", 0])
def test_a_wrong_number_to_keep_is_refused_before_anything_is_written(
    keep_latest: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="keep_latest"):
        checkpoint.save(tmp_path / "a", keep_latest=keep_latest)
    assert os.listdir(tmp_path) == []


def test_another_optimizer_is_refused_by_its_type(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    other: Any = torch.optim.AdamW(model.parameters())
    with pytest.raises(TypeError, match=r"is a AdamW\. Must be a distmuon\.Muon"):
        checkpoint.save(tmp_path / "a", other)
    checkpoint.save(tmp_path / "a", model=model)
    with pytest.raises(TypeError, match=r"is a Linear.*model="):
        checkpoint.load(tmp_path / "a", model)  # type: ignore[arg-type]


EXITS = """
import sys, torch, torch.distributed as dist
from distmuon import checkpoint
from tests.distributed.checkpoint_runs import build
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
model, optimizer = build(torch.float32, dist.group.WORLD, seed=1)
checkpoint.save(f"{folder}/saves/a", optimizer, model=model, async_save=True)
dist.destroy_process_group()
"""


def test_a_pending_save_is_completed_at_the_interpreters_exit(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", EXITS, str(r), str(tmp_path)], env=environment)
        for r in range(2)
    ]
    assert [rank.wait(timeout=150) for rank in ranks] == [0, 0]
    assert checkpoint.latest(tmp_path / "saves", check="content") == tmp_path / "saves" / "a"

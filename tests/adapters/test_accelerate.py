"""Accelerate, as its users use it, on spawned gloo ranks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("accelerate", reason="needs the extra distmuon[accelerate]")

from accelerate import Accelerator
from safetensors import safe_open

from distmuon import Muon, build_param_groups
from distmuon.adapters.accelerate import attach, unwrap
from tests.adapters.launched import as_launched
from tests.harness import RankFailure, run_ranks

BATCH, MICRO_BATCHES, MAX_NORM = 24, 2, 0.5
REDUCES = ("ddp", "hook", "owned")


class Decoder(nn.Module):
    """Its head is tied, and no matrix is a multiple of another."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(19, 12)
        self.up = nn.Linear(12, 30)
        self.norm = nn.LayerNorm(30)
        self.down = nn.Linear(30, 12, bias=False)
        self.lm_head = nn.Linear(12, 19, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        logits: Tensor = self.lm_head(hidden + self.down(self.norm(self.up(hidden)).relu()))
        return logits


class Trained(NamedTuple):
    """What a rank has after training."""

    weights: dict[str, Tensor]
    norms: list[float]
    lrs: list[float]
    state_bytes: int


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Decoder()


def micro_batches(step: int, rank: int, world_size: int) -> list[Tensor]:
    """This rank's part of a step's batch, which is the same for every world size."""
    generator = torch.Generator().manual_seed(step)
    batch = torch.randint(19, (BATCH, 9), generator=generator)
    return list(batch.tensor_split(world_size)[rank].tensor_split(MICRO_BATCHES))


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def make_optimizer(model: nn.Module, reduce: Any = "ddp", group: Any = None) -> Muon:
    return Muon(build_param_groups(model), lr=0.02, process_group=group, reduce=reduce)


def train_alone(steps: range) -> Trained:
    """One process, no framework: what everything else is compared with."""
    model = make_model()
    optimizer = make_optimizer(model)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    norms, lrs = [], []
    for step in steps:
        for tokens in micro_batches(step, 0, 1):
            (loss_of(model, tokens) / MICRO_BATCHES).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return Trained(copy.deepcopy(model.state_dict()), norms, lrs, 0)


def train(
    steps: range,
    reduce: str,
    load: Path | None = None,
    save: tuple[int, Path] | None = None,
    seed: int = 0,
) -> Trained:
    """Under Accelerate, in the way its documentation shows."""
    as_launched()
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=MICRO_BATCHES, step_scheduler_with_optimizer=False
    )
    model: nn.Module = make_model(seed)
    optimizer: Any = make_optimizer(model, reduce, dist.group.WORLD)
    schedule: Any = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    if reduce == "owned":
        model = accelerator.prepare_model(model, evaluation_mode=True)
        optimizer, schedule = accelerator.prepare(optimizer, schedule)
    else:
        model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    attach(accelerator, optimizer, model)
    if load is not None:
        accelerator.load_state(str(load))
    norms, lrs = [], []
    for step in steps:
        for tokens in micro_batches(step, accelerator.process_index, accelerator.num_processes):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, tokens))
                if accelerator.sync_gradients:
                    norms.append(float(accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)))
                    lrs.append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                optimizer.zero_grad()
        schedule.step()
        if save is not None and step == save[0]:
            accelerator.save_state(str(save[1]))
    weights = {
        name: value.clone() for name, value in accelerator.unwrap_model(model).state_dict().items()
    }
    return Trained(weights, norms, lrs, unwrap(optimizer).report().state_bytes)


def assert_same(found: Trained, wanted: Trained, atol: float) -> None:
    for name, value in wanted.weights.items():
        torch.testing.assert_close(found.weights[name], value, rtol=0, atol=atol)


@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_accumulation_clipping_and_schedule_are_those_of_one_process(
    world_size: int, reduce: str
) -> None:
    alone = train_alone(range(3))
    for found in run_ranks(world_size, train, range(3), reduce):
        assert_same(found, alone, 1e-6)
        assert found.norms == pytest.approx(alone.norms, rel=1e-5)
        assert found.lrs == pytest.approx(alone.lrs)
    assert alone.norms[0] > MAX_NORM, "nothing was clipped"


@pytest.mark.parametrize("reduce", REDUCES)
def test_resuming_on_any_number_of_processes_goes_on_as_if_nothing_had_been(
    reduce: str, tmp_path: Path
) -> None:
    through = run_ranks(2, train, range(5), reduce, None, (1, tmp_path / "ckpt"))[0]
    for world_size in (2, 1, 4):
        resumed = run_ranks(world_size, train, range(2, 5), reduce, tmp_path / "ckpt", None, 1)
        for each in resumed:
            assert_same(each, through, 0 if world_size == 2 else 1e-6)
            assert each.lrs == through.lrs[2:]


def test_the_saved_weights_are_all_there(tmp_path: Path) -> None:
    trained = run_ranks(2, train, range(2), "ddp", None, (1, tmp_path))[0]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = {name: file.get_tensor(name) for name in file.keys()}
    assert set(saved) == set(trained.weights) - {"lm_head.weight"}  # tied
    for name, value in saved.items():
        assert torch.equal(value, trained.weights[name])


def test_each_of_two_processes_holds_half_of_the_state() -> None:
    (alone,) = run_ranks(1, train, range(1), "ddp")
    two = run_ranks(2, train, range(1), "ddp")
    whole = 4 * (2 * (19 * 12 + 30 + 30 + 30) + 12 * 30 + 30 * 12)
    assert whole <= alone.state_bytes < 1.1 * whole
    for each in two:
        assert each.state_bytes == pytest.approx(alone.state_bytes / 2, rel=0.1)


def train_scaled(reduce: str, scaled: bool) -> tuple[dict[str, Tensor], float, int]:
    """Four steps, the second without any rank if one of them overflows."""
    as_launched()
    accelerator = Accelerator(cpu=True)
    # By hand: Accelerate makes one for mixed_precision="fp16", which it refuses on CPUs.
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if scaled else None
    model: nn.Module = make_model()
    optimizer: Any = make_optimizer(model, reduce, dist.group.WORLD)
    if reduce == "owned":
        model = accelerator.prepare_model(model, evaluation_mode=True)
        optimizer = accelerator.prepare(optimizer)
    else:
        model, optimizer = accelerator.prepare(model, optimizer)
    attach(accelerator, optimizer, model)
    for step in range(4):
        if step == 1 and not scaled:
            continue
        overflows = step == 1 and accelerator.process_index == 1
        tokens = micro_batches(step, accelerator.process_index, accelerator.num_processes)[0]
        accelerator.backward(loss_of(model, tokens) * (float("inf") if overflows else 1.0))
        accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
    weights = {k: v.clone() for k, v in accelerator.unwrap_model(model).state_dict().items()}
    scale = accelerator.scaler.get_scale() if scaled else 0.0
    return weights, scale, unwrap(optimizer).report().skipped


@pytest.mark.parametrize("reduce", ["hook", "owned"])
def test_all_processes_skip_an_overflow_of_one_and_keep_one_scale(reduce: str) -> None:
    plain = run_ranks(2, train_scaled, reduce, False)[0]
    for weights, scale, skipped in run_ranks(2, train_scaled, reduce, True):
        assert scale == 2.0**9
        assert skipped == 1
        for name, value in plain[0].items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=0)


def _message(act: Any) -> str:
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        act()
    return str(caught.value)


def misuse(folder: Path) -> dict[str, str]:
    """What each mistake says. On two ranks, all of which make it."""
    as_launched()
    accelerator = Accelerator(cpu=True)
    raw = make_model()
    unsharded = make_optimizer(raw)
    sharded = make_optimizer(raw, "hook", dist.group.WORLD)
    plain = torch.optim.SGD(raw.parameters())
    said = {
        "not prepared": _message(lambda: attach(accelerator, sharded)),
        "no process group": _message(lambda: attach(accelerator, unsharded)),
        "not ours": _message(lambda: attach(accelerator, plain)),
    }
    model, optimizer = accelerator.prepare(raw, sharded)
    said["no model"] = _message(lambda: attach(accelerator, optimizer))
    said["bare model"] = _message(lambda: attach(accelerator, optimizer, raw))
    attach(accelerator, optimizer, model)
    accelerator.backward(loss_of(model, micro_batches(0, 0, 1)[0]))
    some = [raw.up.weight]
    said["some clipped"] = _message(lambda: accelerator.clip_grad_norm_(some, 1.0))
    elsewhere = nn.Linear(2, 2)
    elsewhere.weight.grad = torch.full((2, 2), 3.0)
    norm = accelerator.clip_grad_norm_([elsewhere.weight], 1.0)
    assert float(norm) == pytest.approx(6.0), "other parameters are clipped as ever"
    optimizer.step()
    accelerator.save_state(str(folder))
    accelerator.wait_for_everyone()
    saved = torch.load(folder / "optimizer.bin", weights_only=True)
    fresh = make_optimizer(make_model(), "ddp", dist.group.WORLD)
    said["reference alone"] = _message(lambda: fresh.load_state_dict(saved))
    said["reference elsewhere"] = _message(lambda: plain.load_state_dict(saved))
    return said


def test_mistakes_are_explained(tmp_path: Path) -> None:
    first, second = run_ranks(2, misuse, tmp_path)
    assert first == second
    for mistake, part in {
        "not prepared": "accelerator.prepare(model, optimizer) first",
        "no process group": "sharded over 1 processes, Accelerate runs 2",
        "not ours": "Must be a distmuon.Muon",
        "no model": "attach(accelerator, optimizer, model)",
        "bare model": "attach(accelerator, optimizer, model)",
        "some clipped": "pass model.parameters()",
        "reference alone": "in the folder 'distmuon' and has not been loaded",
        "reference elsewhere": "different number of parameter groups",
    }.items():
        assert part in first[mistake], first[mistake]


def save_unattached(folder: Path) -> None:
    as_launched()
    accelerator = Accelerator(cpu=True)
    raw = make_model()
    model, optimizer = accelerator.prepare(raw, make_optimizer(raw, "ddp", dist.group.WORLD))
    accelerator.backward(loss_of(model, micro_batches(0, 0, 1)[0]))
    optimizer.step()
    accelerator.save_state(str(folder))


def test_saving_without_attach_fails_on_every_rank_and_names_the_fix(tmp_path: Path) -> None:
    with pytest.raises(RankFailure, match=r"accelerate\.attach\(accelerator") as caught:
        run_ranks(2, save_unattached, tmp_path)
    assert "rank 1 raised later" in str(caught.value) or "rank 0 raised later" in str(caught.value)
    assert not (tmp_path / "optimizer.bin").exists()


def two_optimizers(folder: Path) -> tuple[Tensor, Tensor]:
    """As an adversarial pair has: both are saved, apart."""
    as_launched()
    accelerator = Accelerator(cpu=True)
    models = [make_model(seed) for seed in (0, 1)]
    optimizers = [make_optimizer(model, "ddp", dist.group.WORLD) for model in models]
    prepared = accelerator.prepare(*models, *optimizers)
    for model, optimizer in zip(prepared[:2], prepared[2:], strict=True):
        attach(accelerator, optimizer)
        accelerator.backward(loss_of(model, micro_batches(0, 0, 1)[0]))
        optimizer.step()
    accelerator.save_state(str(folder))
    accelerator.load_state(str(folder))
    for optimizer in optimizers:
        optimizer.consolidate_state_dict(to=0)
    if dist.get_rank() != 0:
        return torch.empty(0), torch.empty(0)
    first, second = (each.state_dict()["state"][0]["momentum_buffer"] for each in optimizers)
    return first, second


def test_two_optimizers_are_saved_apart(tmp_path: Path) -> None:
    (first, second), _ = run_ranks(2, two_optimizers, tmp_path)
    assert first.abs().sum() > 0
    assert second.abs().sum() > 0
    assert not torch.equal(first, second)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"distmuon", "distmuon_1"}


@pytest.mark.parametrize(
    "name", ["_optimizers", "register_save_state_pre_hook", "register_load_state_pre_hook"]
)
def test_what_the_adapter_uses_of_accelerate_still_exists(name: str) -> None:
    assert hasattr(Accelerator(cpu=True), name)

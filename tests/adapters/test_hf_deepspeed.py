"""Accelerate and the Trainer with a DeepSpeed configuration, against the native runs, on gloo."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

pytest.importorskip("transformers", reason="needs the extra distmuon[hf]")
pytest.importorskip("deepspeed", reason="needs the extra distmuon[deepspeed]")

from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, DistributedType, DummyOptim
from transformers import Trainer

from distmuon import Muon, build_param_groups
from distmuon.adapters.accelerate import attach
from distmuon.adapters.transformers import MuonTrainer
from distmuon.deepspeed import from_model, register, tag
from tests.adapters.launched import as_launched
from tests.adapters.test_transformers import make_arguments, make_data, make_model
from tests.distributed.deepspeed_ranks import deepspeed_world
from tests.harness import RankFailure, run_ranks

LIMIT = 120.0
FOR_TRAINER = Path(__file__).parents[2] / "configs/deepspeed/zero2-trainer.json"
STEPS, MICRO_BATCHES, CLIP, LR, ADAM_LR, DECAY = 20, 2, 0.5, 0.02, 0.005, 0.1
NAMED = {
    "type": "DistMuon",
    "params": {"lr": LR, "adam_lr": ADAM_LR, "weight_decay": DECAY, "betas": [0.9, 0.95]},
}


def make_config(stage: int, **changes: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage, "use_multi_rank_bucket_allreduce": False},
        **changes,
    }


def prepare(accelerator: Accelerator, kind: str) -> tuple[Any, Any]:
    """Model and optimizer of a kind of run, as Accelerate returns them."""
    model = make_model()
    if kind == "native":
        groups = build_param_groups(model, weight_decay=DECAY, adam_lr=ADAM_LR)
        muon = Muon(groups, lr=LR, process_group=dist.group.WORLD)
        wrapped, optimizer = accelerator.prepare(model, muon)
        attach(accelerator, optimizer, wrapped)
        return wrapped, optimizer
    optimizer: Any = None
    if kind == "named":
        register()
        tag(model)
        optimizer = DummyOptim([p for p in model.parameters() if p.requires_grad], lr=LR)
    else:
        optimizer = from_model(model, lr=LR, adam_lr=ADAM_LR, weight_decay=DECAY)
    return accelerator.prepare(model, optimizer)


def accelerated(kind: str) -> list[float]:
    """The losses of a run with Accelerate alone, over all ranks."""
    as_launched()
    return loop(Accelerator(cpu=True, gradient_accumulation_steps=MICRO_BATCHES), kind)


def accelerated_deepspeed(runs: list[tuple[str, int]]) -> list[list[float]]:
    """The losses of runs with Accelerate and DeepSpeed."""
    losses = []
    with deepspeed_world():
        for kind, stage in runs:
            # Without it Accelerate takes a machine without GPUs for one process.
            PartialState(backend="gloo")
            config = make_config(stage, **({"optimizer": NAMED} if kind == "named" else {}))
            accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
            assert accelerator.distributed_type == DistributedType.DEEPSPEED
            losses.append(loop(accelerator, kind))
            AcceleratorState._reset_state(reset_partial_state=True)
    return losses


def loop(accelerator: Accelerator, kind: str) -> list[float]:
    assert accelerator.num_processes == dist.get_world_size()
    model, optimizer = prepare(accelerator, kind)
    losses = []
    for step in range(STEPS):
        total = torch.zeros(())
        for micro in range(MICRO_BATCHES):
            with accelerator.accumulate(model):
                seed = step % 2 * 100 + micro * 10 + accelerator.process_index
                generator = torch.Generator().manual_seed(seed)
                tokens = torch.randint(3, 32, (2, 10), generator=generator)
                loss = model(input_ids=tokens, labels=tokens).loss
                total += loss.detach()
                accelerator.backward(loss)
                if kind == "native" and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
        dist.all_reduce(total)
        losses.append(float(total) / MICRO_BATCHES / dist.get_world_size())
    return losses


@pytest.mark.slow
def test_accelerate_with_deepspeed_has_the_losses_of_accelerate_alone() -> None:
    native = run_ranks(2, accelerated, "native", timeout=LIMIT)[0]
    runs = [("built", 1), ("built", 2), ("named", 2)]
    for losses in run_ranks(2, accelerated_deepspeed, runs, timeout=LIMIT):
        assert losses == [pytest.approx(native, abs=1e-5)] * 3
    assert native[-1] < native[0] - 0.1


def trained(folder: Path, kind: str) -> tuple[list[float], list[float]]:
    """Losses and learning rates that a Trainer logs."""
    settings: dict[str, Any] = {"model": make_model(), "train_dataset": make_data()}
    changes: dict[str, Any] = {"max_steps": STEPS, "save_steps": STEPS // 2}
    if kind == "native":
        as_launched()
        trainer = MuonTrainer(args=make_arguments(folder, **changes), **settings)
        return run_trainer(trainer, None)
    with deepspeed_world():
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")
        config = json.loads(FOR_TRAINER.read_text())
        if kind == "named":
            register()
            tag(settings["model"])
            auto = {"lr": "auto", "weight_decay": "auto"}
            config["optimizer"] = {"type": "DistMuon", "params": auto}
        changes |= {"deepspeed": config, "use_cpu": False}
        if kind != "separate":
            changes["accelerator_config"] = {"use_configured_state": True}
        trainer_cls = Trainer if kind == "named" else MuonTrainer
        trainer = trainer_cls(args=make_arguments(folder, **changes), **settings)
        half = folder / f"checkpoint-{STEPS // 2}"
        losses = run_trainer(trainer, str(half) if kind == "resumed" else None)
        assert type(trainer.deepspeed.basic_optimizer).__name__.endswith("ZeroOrtho")
        return losses


def run_trainer(trainer: Trainer, resume: str | None) -> tuple[list[float], list[float]]:
    trainer.train(resume_from_checkpoint=resume)
    logged = [line for line in trainer.state.log_history if "grad_norm" in line]
    return [line["loss"] for line in logged], [line["learning_rate"] for line in logged]


@pytest.mark.slow
def test_a_trainer_with_deepspeed_has_the_losses_of_one_without(tmp_path: Path) -> None:
    native, lrs = run_ranks(2, trained, tmp_path, "native", timeout=LIMIT)[0]
    for kind in ("named", "built", "resumed"):
        folder = tmp_path / ("named" if kind == "named" else "built")
        for losses, rates in run_ranks(2, trained, folder, kind, timeout=LIMIT):
            assert losses == pytest.approx(native, abs=1e-5)
            # DeepSpeed steps a schedule beside its own optimizer before the Trainer looks.
            assert rates == pytest.approx([*lrs[1:], 0.0] if kind == "named" else lrs, abs=1e-12)


def test_processes_that_would_all_train_on_the_same_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RankFailure, match="use_configured_state"):
        run_ranks(2, trained, tmp_path, "separate", timeout=LIMIT)


def refused() -> dict[str, str]:
    """What is said where the pieces do not go together."""
    said = {}
    with deepspeed_world():
        for case in ("Muon", "attach", "stage 3", "two optimizers"):
            PartialState(backend="gloo")
            extra = {"optimizer": NAMED} if case == "two optimizers" else {}
            config = make_config(3 if case == "stage 3" else 1, **extra)
            accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
            try:
                refuse(accelerator, case)
            except (RuntimeError, TypeError, ValueError) as error:
                said[case] = str(error)
            AcceleratorState._reset_state(reset_partial_state=True)
    return said


def refuse(accelerator: Accelerator, case: str) -> None:
    model = make_model()
    if case == "Muon":
        groups = build_param_groups(model)
        muon = Muon(groups, lr=LR, process_group=dist.group.WORLD)
        step(accelerator, *accelerator.prepare(model, muon))
        return
    optimizer: Any
    model, optimizer = accelerator.prepare(model, from_model(model, lr=LR))
    if case == "attach":
        attach(accelerator, optimizer, model)
    step(accelerator, model, optimizer)


def step(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    tokens = torch.full((2, 10), 3)
    for _ in range(MICRO_BATCHES):
        accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
        optimizer.step()


def test_what_does_not_go_together_is_refused() -> None:
    wanted = {
        "Muon": "distmuon.deepspeed",
        "attach": "distmuon.deepspeed",
        "stage 3": '"stage": 2',
        "two optimizers": "optimizer in the config file",
    }
    for said in run_ranks(2, refused, timeout=LIMIT):
        assert {
            case for case, words in wanted.items() if words not in said.get(case, "")
        } == set(), said

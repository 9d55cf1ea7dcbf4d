"""The Hugging Face Trainer, as its users use it, on spawned gloo ranks."""

from __future__ import annotations

import inspect
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

pytest.importorskip("transformers", reason="needs the extra distmuon[hf]")

from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from distmuon.adapters.accelerate import unwrap
from distmuon.adapters.transformers import MuonFactory, MuonTrainer, MuonTrainerMixin
from tests.adapters.launched import as_launched
from tests.harness import RankFailure, run_ranks

BATCH, MICRO_BATCHES, STEPS, SAVED = 8, 2, 4, 2


class Trained(NamedTuple):
    """What a rank has after training."""

    weights: dict[str, Tensor]
    grad_norms: list[float]
    lrs: list[float]
    eval_loss: float
    state_bytes: int


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=40,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=32,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def make_data() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, 32, (64, 10), generator=generator)
    return [{"input_ids": row, "labels": row.clone()} for row in tokens]


def make_arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "save_steps": SAVED,
        "logging_steps": 1,
        "learning_rate": 0.02,
        "weight_decay": 0.1,
        "lr_scheduler_type": "cosine",
        "max_grad_norm": 0.5,
        "per_device_train_batch_size": BATCH // MICRO_BATCHES // dist.get_world_size(),
        "gradient_accumulation_steps": MICRO_BATCHES,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**settings, **changes})


def train(
    folder: Path, options: dict[str, Any], resume: str | None = None, seed: int = 0
) -> Trained:
    """Train to the end, evaluate."""
    as_launched()
    trainer = MuonTrainer(
        model=make_model(seed),
        args=make_arguments(folder),
        train_dataset=make_data(),
        eval_dataset=make_data()[:8],
        optimizer_cls_and_kwargs=(MuonFactory, options) if options else None,
    )
    if resume is not None:
        trainer.evaluate()  # the plain Trainer would then train without DistributedDataParallel
    trainer.train(resume_from_checkpoint=resume)
    logs = [line for line in trainer.state.log_history if "grad_norm" in line]
    return Trained(
        {name: value.clone() for name, value in trainer.model.state_dict().items()},
        [float(line["grad_norm"]) for line in logs],
        [float(line["learning_rate"]) for line in logs],
        float(trainer.evaluate()["eval_loss"]),
        unwrap(trainer.optimizer).report().state_bytes,
    )


@pytest.mark.parametrize("reduce", ["ddp", "hook"])
def test_resuming_on_any_number_of_processes_goes_on_as_if_nothing_had_been(
    reduce: str, tmp_path: Path
) -> None:
    # Sums of gradients differ in their last bits, which Halley's inverses would enlarge.
    options = {"ns_coefficients": "p5"} | ({"reduce": reduce} if reduce != "ddp" else {})
    through = run_ranks(2, train, tmp_path, options)[0]
    checkpoint = tmp_path / f"checkpoint-{SAVED}"
    assert {"distmuon", "optimizer.pt", "scheduler.pt"} <= {p.name for p in checkpoint.iterdir()}
    assert through.grad_norms[0] > 0.5, "nothing was clipped"
    for world_size in (2, 1, 4):
        for each in run_ranks(
            world_size, train, tmp_path / f"on-{world_size}", options, str(checkpoint), 1
        ):
            atol = 0 if world_size == 2 else 1e-6
            for name, value in through.weights.items():
                torch.testing.assert_close(each.weights[name], value, rtol=0, atol=atol)
            assert each.eval_loss == pytest.approx(through.eval_loss, abs=1e-5)
            assert each.lrs == through.lrs, "the log is resumed too"
            assert each.grad_norms == pytest.approx(through.grad_norms, rel=1e-4)
            # One of two processes has half of the state, and so on.
            whole = through.state_bytes * 2
            assert each.state_bytes == pytest.approx(whole / world_size, rel=0.1)


def plain_trainer(folder: Path) -> None:
    as_launched()
    Trainer(
        model=make_model(),
        args=make_arguments(folder),
        train_dataset=make_data(),
        optimizer_cls_and_kwargs=(MuonFactory, {"lr": 0.02}),
    ).train()


def test_a_plain_trainer_fails_at_its_first_save_and_names_the_fix(tmp_path: Path) -> None:
    with pytest.raises(RankFailure, match=r"transformers\.MuonTrainer"):
        run_ranks(2, plain_trainer, tmp_path)
    assert not (tmp_path / f"checkpoint-{SAVED}" / "optimizer.pt").exists()


def plain_trainer_resumes(folder: Path) -> str:
    as_launched()
    settings = {"model": make_model(), "train_dataset": make_data()}
    MuonTrainer(args=make_arguments(folder, max_steps=SAVED), **settings).train()
    plain = Trainer(
        args=make_arguments(folder),
        optimizer_cls_and_kwargs=(MuonFactory, {"lr": 0.02}),
        **settings,
    )
    with pytest.raises(ValueError, match="no optimizer state") as caught:
        plain.train(resume_from_checkpoint=True)
    return str(caught.value)


def test_a_plain_trainer_does_not_resume_from_a_muon_trainers_checkpoint(tmp_path: Path) -> None:
    for said in run_ranks(2, plain_trainer_resumes, tmp_path):
        assert "MuonTrainer" in said


def resume_without(folder: Path, missing: str) -> None:
    as_launched()
    trainer = MuonTrainer(
        model=make_model(), args=make_arguments(folder), train_dataset=make_data()
    )
    if missing != "scheduler.pt":  # once is enough to have a checkpoint
        trainer.train()
    checkpoint = folder / f"checkpoint-{SAVED}"
    if missing == "distmuon":
        shutil.rmtree(checkpoint / "distmuon")
    else:
        (checkpoint / missing).unlink()
    trainer.train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize(
    ("missing", "error"),
    [("optimizer.pt", FileNotFoundError), ("distmuon", ValueError)],
)
def test_a_checkpoint_without_optimizer_state_is_not_resumed_in_silence(
    missing: str, error: type[Exception], tmp_path: Path
) -> None:
    with pytest.raises(RankFailure, match=error.__name__):
        run_ranks(1, resume_without, tmp_path, missing)


def train_adapters(folder: Path, whole: list[str]) -> list[tuple[str, float]]:
    as_launched()
    peft = pytest.importorskip("peft", reason="needs peft")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=whole)
    model = peft.get_peft_model(make_model(), config)
    trainer = MuonTrainer(
        model=model,
        args=make_arguments(folder, gradient_checkpointing=False),
        train_dataset=make_data(),
    )
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer.train(resume_from_checkpoint=None)
    muon = unwrap(trainer.optimizer)
    rule = {p: g["algorithm"] for g in muon.param_groups for p in g["params"]}
    trainer.train(resume_from_checkpoint=True)  # nothing left to do but to load
    return [
        (rule[parameter], float((parameter - before[name]).abs().max()))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]


def test_adapters_are_trained_by_adamw_beside_whole_matrices(tmp_path: Path) -> None:
    for moved in run_ranks(2, train_adapters, tmp_path, ["o_proj"]):
        assert sorted(rule for rule, _ in moved) == ["adamw", "adamw", "muon"]
        assert all(distance > 0 for _, distance in moved)


def test_adapters_alone_are_refused_with_their_reasons(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    model = peft.get_peft_model(make_model(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"2 x LoRA factor.*modules_to_save"):
        MuonFactory()(model, lr=0.1)


def build_from(folder: Path, source: str) -> list[str]:
    """What is said when the optimizer is made for a new model, or for one that was saved."""
    as_launched()
    model = make_model()
    if source == "saved":
        weights = folder / "weights"
        if dist.get_rank() == 0:
            model.save_pretrained(weights)
        dist.barrier()
        model = LlamaForCausalLM.from_pretrained(weights)
    trainer = MuonTrainer(model=model, args=make_arguments(folder), train_dataset=make_data())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.create_optimizer()
    return [str(each.message) for each in caught if "AdamW trained" in str(each.message)]


def test_weights_that_adamw_may_have_trained_are_warned_of_once(tmp_path: Path) -> None:
    assert run_ranks(2, build_from, tmp_path, "new") == [[], []]
    (first, *more), others = run_ranks(2, build_from, tmp_path, "saved")
    assert f"loaded from {tmp_path / 'weights'}" in first
    assert not more
    assert not others


@pytest.mark.parametrize(
    "name",
    [
        "create_optimizer",
        "_prepare_for_training",
        "_save_optimizer_and_scheduler",
        "_load_optimizer_and_scheduler",
    ],
)
def test_what_the_mixin_overrides_still_exists_and_takes_the_same(name: str) -> None:
    theirs = inspect.signature(getattr(Trainer, name)).parameters
    ours = inspect.signature(getattr(MuonTrainerMixin, name)).parameters
    kinds = {parameter.kind for parameter in ours.values()}
    assert list(ours) == list(theirs) or inspect.Parameter.VAR_POSITIONAL in kinds
    assert "self.accelerator.clip_grad_norm_" in inspect.getsource(Trainer._clip_grad_norm)
    assert "optimizer_cls()(opt_model" in inspect.getsource(Trainer.create_optimizer)

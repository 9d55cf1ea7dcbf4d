"""The Hugging Face Trainer with Muon.

    trainer = MuonTrainer(model=model, args=args, train_dataset=data)
    trainer.train(resume_from_checkpoint=True)

takes lr and weight decay from the training arguments. With a Trainer class of your own, put the
mixin before it: `class MyMuonTrainer(MuonTrainerMixin, MyTrainer)`. Options of `Muon` are passed as
the Trainer passes any optimizer's: `optimizer_cls_and_kwargs=(MuonFactory, {"reduce": "hook"})`.

The plain Trainer asks rank 0 alone for the optimizer's state when it saves. No rank has all of it,
so that raises; the mixin saves each rank's part to `<checkpoint>/distmuon`.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn
from typing_extensions import override

from distmuon import Muon, build_param_groups
from distmuon.adapters.accelerate import FOLDER, attach, load_state, save_state, unwrap
from distmuon.adapters.deepspeed import ZeroOrtho, from_model
from distmuon.errors import see
from distmuon.param_groups import Decay, MatrixRule

try:
    from transformers import Trainer
except ImportError as error:
    raise ImportError(
        "distmuon.adapters.transformers needs transformers and accelerate: "
        "pip install 'distmuon[hf]'." + see("missing-package")
    ) from error

if TYPE_CHECKING:
    from transformers import Trainer as _AnyTrainer
else:
    _AnyTrainer = object


class MuonFactory:
    """What `Trainer(optimizer_cls_and_kwargs=(MuonFactory, {...}))` builds the optimizer with."""

    def __call__(
        self,
        model: nn.Module,
        *,
        lr: float,
        weight_decay: float = 0.1,
        decay: Decay = "weights",
        overrides: Mapping[str, str] | None = None,
        matrices: MatrixRule = "muon",
        adam_lr: float | None = None,
        **options: Any,
    ) -> Muon:
        """Route the model's parameters and shard their state over all processes.

        Args:
            model: The Trainer's, before it is wrapped.
            lr: Learning rate; `MuonTrainer` fills in `TrainingArguments.learning_rate`.
            weight_decay: As for `build_param_groups`; `MuonTrainer` fills in the arguments'.
            decay: As for `build_param_groups`.
            overrides: As for `build_param_groups`.
            matrices: As for `build_param_groups`.
            adam_lr: As for `build_param_groups`.
            **options: As for `Muon`.

        Raises:
            ValueError: as `build_param_groups` and `Muon`; if nothing is for Muon, says why.
        """
        groups = build_param_groups(
            model,
            weight_decay=weight_decay,
            decay=decay,
            overrides=overrides,
            matrices=matrices,
            adam_lr=adam_lr,
        )
        if not any(group["algorithm"] == matrices for group in groups):
            reasons = Counter(reason for group in groups for reason in group["reasons"])
            listed = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
            raise ValueError(
                f"No trainable parameter is for Muon: {listed}. Train matrices themselves, as with "
                "PEFT's modules_to_save, route some with overrides=, or use AdamW." + see("routing")
            )
        if "process_group" not in options and dist.is_available() and dist.is_initialized():
            options["process_group"] = dist.group.WORLD
        return Muon(groups, lr=lr, weight_decay=weight_decay, **options)


class ZeroFactory:
    """What builds the optimizer in the place of `MuonFactory` where DeepSpeed is configured."""

    def __call__(self, model: nn.Module, *, lr: float, **options: Any) -> ZeroOrtho:
        """Build the optimizer that `deepspeed.initialize` takes.

        Args:
            model: The Trainer's, before DeepSpeed gets it.
            lr: Learning rate.
            **options: As for `distmuon.deepspeed.from_model`.

        Raises:
            ValueError: as `from_model`.
        """
        return from_model(model, lr=lr, **options)


class MuonTrainerMixin(_AnyTrainer):
    """Put before a Trainer class: creates, saves, resumes, clips and accumulates with Muon."""

    optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None
    _attached: Muon | None = None

    @override
    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Build Muon, lr and weight decay from the training arguments if the factory got none.

        Warns if the weights came from `from_pretrained`: AdamW may have trained them.

        Args:
            model: As in the Trainer.
        """
        if self.is_deepspeed_enabled:
            _refuse_separate_processes(self.accelerator.num_processes)
        factory, options = self.optimizer_cls_and_kwargs or (MuonFactory, {})
        if factory is MuonFactory:
            filled = {"lr": self.args.learning_rate, "weight_decay": self.args.weight_decay}
            factory = ZeroFactory if self.is_deepspeed_enabled else MuonFactory
            self.optimizer_cls_and_kwargs = (factory, {**filled, **options})
        if self.is_world_process_zero():
            _warn_of_loaded_weights(self.model)
        return super().create_optimizer(model)

    @override
    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.model_wrapped is self.model:
            # evaluate() before train() leaves the bare model marked as prepared; Accelerate would
            # then not wrap it, and every process would train by itself.
            self.model._is_accelerate_prepared = False
        result = super()._prepare_for_training(*args, **kwargs)
        if self.is_deepspeed_enabled:  # which shards, clips, saves and loads by itself
            return result
        muon = unwrap(self.optimizer)
        if self._attached is not muon:  # train() may be called again
            attach(self.accelerator, self.optimizer, self.model_wrapped)
            self._attached = muon
        return result

    @override
    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_deepspeed_enabled:
            save_state(Path(output_dir) / FOLDER, unwrap(self.optimizer))
        super()._save_optimizer_and_scheduler(output_dir)

    @override
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not self.is_deepspeed_enabled:
            # The Trainer would go on without either of them, and without a word.
            for name in ("optimizer.pt", "scheduler.pt"):
                if not (Path(checkpoint) / name).is_file():
                    raise FileNotFoundError(
                        f"{checkpoint} has no {name}, so training cannot be resumed from it. Was "
                        "it saved with save_only_model=True? Start a new training from its weights "
                        "with from_pretrained()." + see("accelerate")
                    )
            load_state(Path(checkpoint) / FOLDER, unwrap(self.optimizer))
        super()._load_optimizer_and_scheduler(checkpoint)


class MuonTrainer(MuonTrainerMixin, Trainer):
    """`transformers.Trainer` with Muon."""


def _warn_of_loaded_weights(model: nn.Module) -> None:
    source = getattr(model, "name_or_path", "")
    if source:
        warnings.warn(
            f"The weights were loaded from {source}. If AdamW trained them, fine-tuning them with "
            "Muon may bring nothing: in Moonlight's table 7 it did not. Compare the two on your "
            "data." + see("adamw-weights"),
            stacklevel=3,
        )


def _refuse_separate_processes(num_processes: int) -> None:
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if num_processes != world_size:
        raise ValueError(
            f"Accelerate takes this for {num_processes} processes, torch.distributed for "
            f"{world_size}: all of them would train on the same data. It happens with DeepSpeed on "
            'CPUs. Set ACCELERATE_USE_DEEPSPEED="true", call accelerate.PartialState('
            'backend="gloo") before TrainingArguments, and give these '
            'accelerator_config={"use_configured_state": True}.' + see("accelerate")
        )

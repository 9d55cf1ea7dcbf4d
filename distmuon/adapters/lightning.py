"""Lightning's Trainer: a callback for what `configure_optimizers` alone does not say.

    trainer = Trainer(strategy="ddp", devices=4, callbacks=[MuonCallback()])

Lightning makes the optimizer after the process group, steps it with a closure, and asks it to
consolidate its state before it saves: `Muon` is an optimizer like any other there. The callback
refuses one that no process group shards, and with `reduce="hook"` attaches the model and clips.
"""

from __future__ import annotations

import torch
from typing_extensions import override

from distmuon import Muon
from distmuon.errors import see

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(
        "distmuon.adapters.lightning needs Lightning: pip install 'distmuon[lightning]'."
        + see("missing-package")
    ) from error


class MuonCallback(Callback):
    """Makes every `Muon` of a LightningModule ready for the Trainer's ranks; others are left alone.

    With `reduce="hook"` the optimizer averages the gradients: it is attached to Lightning's
    DistributedDataParallel, and `gradient_clip_val` clips the averages.
    """

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check and attach, once the model is in DistributedDataParallel. A collective.

        Raises:
            ValueError: if an optimizer is not sharded, `reduce` is "owned", or gradients are to be
                clipped by value where they are the optimizer's.
        """
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, Muon):
                self._prepare(trainer, optimizer)

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Clip the averaged gradients; Lightning itself clips `p.grad`, which nobody reads then."""
        limit = trainer.gradient_clip_val
        if limit and isinstance(optimizer, Muon) and _averages(optimizer):
            optimizer.clip_grad_norm_(float(limit))

    def _prepare(self, trainer: Trainer, optimizer: Muon) -> None:
        reduce, ranks = optimizer.policy.reduce, optimizer.communicator.world_size
        if ranks == 1 < trainer.world_size:
            raise ValueError(
                f"The optimizer is for one process, Lightning runs {trainer.world_size}: each "
                "would keep the whole state. In configure_optimizers give "
                "Muon(..., process_group=torch.distributed.group.WORLD)." + see("lightning")
            )
        if not _averages(optimizer):
            return
        if reduce == "owned":
            raise ValueError(
                'reduce="owned" is for a bare model, and Lightning puts it into '
                'DistributedDataParallel. Use reduce="hook", which sends as little.'
                + see("lightning")
            )
        if trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value":
            raise ValueError(
                'gradient_clip_algorithm="value" clips p.grad, which is not what the optimizer '
                'steps with under reduce="hook". Clip by norm, or use reduce="ddp".'
                + see("lightning")
            )
        assert trainer.strategy.model is not None, "set up before the hook"
        optimizer.attach(trainer.strategy.model)


def _averages(optimizer: Muon) -> bool:
    """Whether the averaged gradients are with the optimizer, not in `p.grad`."""
    return optimizer.policy.reduce != "ddp" and optimizer.communicator.world_size > 1

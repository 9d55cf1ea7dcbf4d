"""Lightning's Trainer, as its users use it, on spawned gloo ranks."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("lightning", reason="needs the extra distmuon[lightning]")

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy

from distmuon import Muon, build_param_groups
from distmuon.adapters.lightning import MuonCallback
from tests.harness import run_ranks

BATCH, EPOCH, STEPS, CLIP = 48, 2, 4, 0.05


class Model(LightningModule):
    """Its optimizer is made where Lightning's users make it."""

    def __init__(self, *, sharded: bool = True, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(19, 12)
        self.up = nn.Linear(12, 30)
        self.down = nn.Linear(30, 12, bias=False)
        self.lm_head = nn.Linear(12, 19)
        self.sharded, self.options = sharded, options

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        logits: Tensor = self.lm_head(hidden + self.down(self.up(hidden).tanh()))
        return logits

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        (tokens,) = batch
        return F.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        group = dist.group.WORLD if self.sharded and dist.is_initialized() else None
        optimizer = Muon(build_param_groups(self), lr=0.02, process_group=group, **self.options)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


class Trained(NamedTuple):
    """What a rank has after training."""

    weights: dict[str, Tensor]
    owned: int
    state_bytes: int


def batches(ranks: int) -> DataLoader[Any]:
    """This rank's part of the batch, which is the same for every number of ranks and every step.

    Which data a resumed run goes on with is Lightning's affair.
    """
    rank = dist.get_rank() if ranks > 1 else 0
    tokens = torch.randint(19, (BATCH, 9), generator=torch.Generator().manual_seed(1))
    mine = tokens.tensor_split(ranks)[rank].expand(EPOCH, -1, -1)
    return DataLoader(TensorDataset(mine), batch_size=None)


def train(
    ranks: int,
    steps: int = STEPS,
    *,
    folder: Path | None = None,
    resume: Path | None = None,
    accumulate: int = 1,
    sharded: bool = True,
    clip: dict[str, Any] | None = None,
    **options: Any,
) -> Trained:
    """Train on this rank; the ranks have met already."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    if ranks > 1:
        os.environ["LOCAL_RANK"] = str(dist.get_rank())
    environment = LightningEnvironment()
    strategy = DDPStrategy(cluster_environment=environment, process_group_backend="gloo")
    callbacks: list[Any] = [MuonCallback()]
    if folder is not None:
        each = {"save_top_k": -1, "save_on_train_epoch_end": True, "filename": "{epoch}"}
        callbacks.append(ModelCheckpoint(folder, **each))
    trainer = Trainer(
        accelerator="cpu", devices=ranks, strategy=strategy if ranks > 1 else "auto",
        max_steps=steps, accumulate_grad_batches=accumulate, logger=False,
        enable_checkpointing=folder is not None, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, callbacks=callbacks,
        **(clip or {"gradient_clip_val": CLIP}),
    )  # fmt: skip
    model = Model(sharded=sharded, **options)
    trainer.fit(model, batches(ranks), ckpt_path=resume)
    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, Muon)
    report = optimizer.report()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return Trained(weights, report.matrices_owned, report.state_bytes)


def assert_alike(found: Trained, expected: Trained, tolerance: float) -> None:
    for name, weight in expected.weights.items():
        torch.testing.assert_close(found.weights[name], weight, rtol=0, atol=tolerance, msg=name)


def on_ranks(ranks: int, **options: Any) -> list[Trained]:
    return run_ranks(ranks, _train, ranks, options)


def _train(ranks: int, options: dict[str, Any]) -> Trained:
    return train(ranks, **options)


@pytest.mark.parametrize("options", [{}, {"reduce": "hook"}], ids=["ddp", "hook"])
def test_two_ranks_train_as_one_and_share_the_state(options: dict[str, Any]) -> None:
    alone = train(1)
    both = on_ranks(2, **options)
    assert sum(rank.owned for rank in both) == alone.owned == 2
    assert max(rank.state_bytes for rank in both) < 0.6 * alone.state_bytes
    for rank in both:
        assert_alike(rank, alone, 2e-5)


def test_clipping_reaches_the_averaged_gradients() -> None:
    free = on_ranks(2, reduce="hook", clip={"gradient_clip_val": 1e9})
    clipped = on_ranks(2, reduce="hook", clip={"gradient_clip_val": 1e-9})
    # Muon and AdamW hardly mind the size of gradients, unless eps counts beside it.
    moved = (free[0].weights["lm_head.bias"] - clipped[0].weights["lm_head.bias"]).abs().max()
    assert moved > 1e-3


def test_accumulation_is_one_step() -> None:
    alone = train(1, 2, accumulate=2)
    for rank in on_ranks(2, steps=2, accumulate=2, reduce="hook"):
        assert_alike(rank, alone, 2e-5)


def test_a_checkpoint_goes_on_on_any_number_of_ranks(tmp_path: Path) -> None:
    whole = on_ranks(2, folder=tmp_path)
    path = tmp_path / "epoch=0.ckpt"
    state = torch.load(path, weights_only=True)["optimizer_states"][0]["state"]
    assert len(state) == 6, "of every parameter, not of one rank's"
    again = on_ranks(2, resume=path)
    assert_alike(again[0], whole[0], 0.0)
    assert_alike(train(1, resume=path), whole[0], 2e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sharded": False}, "for one process, Lightning runs 2"),
        ({"reduce": "owned"}, 'Use reduce="hook"'),
        (
            {
                "reduce": "hook",
                "clip": {"gradient_clip_val": 1, "gradient_clip_algorithm": "value"},
            },
            "Clip by norm",
        ),
    ],
)
def test_what_would_go_wrong_in_silence_is_refused(options: dict[str, Any], message: str) -> None:
    found = run_ranks(2, _refused, options)
    assert all(message in text and "docs/errors.md#lightning" in text for text in found)


def _refused(options: dict[str, Any]) -> str:
    with pytest.raises(ValueError, match=r"Muon|reduce") as caught:
        train(2, **options)
    return str(caught.value)

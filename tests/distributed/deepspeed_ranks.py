"""What the DeepSpeed tests run on every rank: a small model, real engines, what they must equal.

One process group serves many `deepspeed.initialize` calls: starting a rank costs more than twenty
configurations.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from distmuon import Muon, build_param_groups
from distmuon.adapters.deepspeed.build import arrange

LR, ADAM_LR = 0.02, 0.003


class Net(nn.Module):
    """Matrices of uneven shapes, a stack, all that goes to AdamW, a frozen and an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 12)
        self.norm = nn.LayerNorm(12)
        self.up = nn.Linear(12, 37)
        self.down = nn.Linear(37, 16)
        self.experts = nn.Parameter(torch.randn(3, 16, 20) / 4)
        self.wide = nn.Linear(20, 48, bias=False)
        self.back = nn.Linear(48, 16)
        self.frozen = nn.Linear(16, 16).requires_grad_(requires_grad=False)
        self.unused = nn.Linear(7, 5)
        self.head = nn.Linear(16, 40)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.down(torch.tanh(self.up(self.norm(self.embedding(tokens)))))
        x = torch.tanh(torch.einsum("btd,edh->bth", x, self.experts))
        x = self.back(torch.tanh(self.wide(x)))
        return self.head(x + self.frozen(x))


def make_model(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def batch(step: int, micro: int, rank: int) -> Tensor:
    return torch.randint(
        40, (8, 9), generator=torch.Generator().manual_seed(step * 100 + micro * 10 + rank)
    )


def loss_of(model: nn.Module, tokens: Tensor, engine: Any = None) -> Tensor:
    """Through the engine if there is one: what it does before a backward pass hangs on its outputs.

    Without that BF16_Optimizer adds the gradients of earlier micro-batches once more.
    """
    logits = (engine or model)(tokens[:, :-1])
    loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
    # A push in random directions gives every matrix a gradient of full rank: orthogonalization
    # makes the rounding errors in an empty direction as large as everything else.
    generator = torch.Generator().manual_seed(int((tokens * torch.arange(9)).sum()))
    for name, p in model.named_parameters():
        if p.dim() > 1 and p.requires_grad and not name.startswith("unused"):
            noise = torch.randn(p.shape, generator=generator)
            loss = loss + (p.float() * noise).sum() / 20
    return loss


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().float().clone() for name, p in model.named_parameters()}


def farthest(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@dataclass(frozen=True)
class Case:
    """One DeepSpeed configuration, and what the reference must know of it."""

    stage: int = 1
    zero: Mapping[str, Any] = field(default_factory=dict)
    rest: Mapping[str, Any] = field(default_factory=dict)
    accumulation: int = 1
    clip: float = 0.0
    dtype: torch.dtype = torch.float32
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fp32_sums(self) -> bool:
        """Whether DeepSpeed takes BF16_Optimizer."""
        return "data_types" in self.rest

    @property
    def loss_scale(self) -> float:
        """Of fp16, constant."""
        return float(self.rest.get("fp16", {}).get("loss_scale", 1.0))

    @property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.clip,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": self.stage, **self.zero},
            **self.rest,
        }
        if self.dtype == torch.bfloat16:
            config["bf16"] = {"enabled": True, **config.get("bf16", {})}
        return config


@contextmanager
def deepspeed_world() -> Iterator[None]:
    """What `deepspeed.initialize` wants to find, and no compilation."""
    os.environ.update(
        {
            "RANK": str(dist.get_rank()),
            "LOCAL_RANK": str(dist.get_rank()),
            "WORLD_SIZE": str(dist.get_world_size()),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29500",
            "DS_ACCELERATOR": "cpu",
            "TORCHDYNAMO_DISABLE": "1",
        }
    )
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    # An inference all-reduce that is otherwise compiled at the first init_distributed: 2 minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    yield


def start(case: Case, model: nn.Module | None = None) -> Any:
    """A DeepSpeed engine with this adapter's optimizer."""
    import deepspeed

    from distmuon.adapters.deepspeed import from_model

    model = make_model(case.dtype) if model is None else model
    optimizer = from_model(model, lr=LR, adam_lr=ADAM_LR, config=case.config, **case.options)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=case.config)
    return engine


def train(engine: Any, case: Case, steps: Sequence[int]) -> None:
    for step in steps:
        for micro in range(case.accumulation):
            engine.backward(loss_of(engine.module, batch(step, micro, dist.get_rank()), engine))
            engine.step()


def reference(
    case: Case,
    steps: Sequence[int],
    ranks: int | Sequence[int],
    scales: Sequence[tuple[float, float]] | None = None,
) -> dict[str, Tensor]:
    """The same steps in one process, by the one-process optimizer.

    `scales` are what each step's losses are multiplied with, and what its gradients are divided by.

    Gradients are summed in DeepSpeed's order: rounding depends on it, and orthogonalization makes
    much of little where a gradient is nearly singular. In bf16, gradients are averaged in bf16 and
    added to fp32 masters; BF16_Optimizer adds those of a rank's micro-batches in fp32 before.
    """
    model, masters = make_model(case.dtype), make_model(case.dtype).float()
    options = dict(case.options)
    groups = build_param_groups(masters, blocks=options.pop("blocks", None))
    for group in groups:
        group["lr"] = LR if group["algorithm"] == "muon" else ADAM_LR
    optimizer = Muon(groups, **options)
    sizes = [ranks] * len(steps) if isinstance(ranks, int) else ranks
    pairs = scales or [(case.loss_scale, case.loss_scale)] * len(steps)
    for step, world_size, (scale, divisor) in zip(steps, sizes, pairs, strict=True):
        grads = [
            [
                _gradients(model, batch(step, micro, rank), scale / case.accumulation)
                for micro in range(case.accumulation)
            ]
            for rank in range(world_size)
        ]
        if case.stage == 2:  # averaged over the ranks after each micro-batch
            averaged = [_average(column) for column in zip(*grads, strict=True)]
            total = _add(averaged, case)
        else:
            total = _average([_add(row, case) for row in grads])
        for p, grad in zip(masters.parameters(), total, strict=True):
            p.grad = grad.float() / divisor if p.requires_grad else None
        if case.clip and case.stage == 0:
            nn.utils.clip_grad_norm_(masters.parameters(), case.clip)
        elif case.clip and case.fp32_sums:
            _clip_in_fp32_(arrange(groups, None), case.clip)
        elif case.clip:
            _clip_(masters, case.clip)
        optimizer.step()
        with torch.no_grad():
            for low, high in zip(model.parameters(), masters.parameters(), strict=True):
                low.copy_(high)
    return parameters_of(model)


def _gradients(model: nn.Module, tokens: Tensor, scale: float) -> list[Tensor]:
    """Of every parameter; zeros where there is none, as in a flat partition."""
    model.zero_grad()
    (loss_of(model, tokens) * scale).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def _clip_(model: nn.Module, max_norm: float) -> None:
    """torch's rule, the norm summed in fp64 as DeepSpeed does."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = sum(float(grad.double().square().sum()) for grad in grads) ** 0.5
    excess = (norm + 1e-6) / max_norm
    for grad in grads if excess > 1 else ():
        grad.mul_(1 / excess)


def _clip_in_fp32_(groups: Sequence[Mapping[str, Any]], max_norm: float) -> None:
    """The rule of BF16_Optimizer: fp32 throughout, tensor by tensor in the order of its groups."""
    params = [p for group in groups for _, p in group["params"]]
    grads = [p.grad for p in params if p.grad is not None and p.grad.any()]
    norm = torch.stack([grad.norm(2.0) for grad in grads]).pow(2.0).sum().pow(0.5)
    scale = max_norm / (norm + 1e-6)
    for grad in grads if scale < 1 else ():
        grad.mul_(scale)


def _add(rows: Sequence[Sequence[Tensor]], case: Case) -> list[Tensor]:
    """Micro-batches of a rank, in the dtype that they are added in, for the averaging."""
    sums = torch.float32 if case.fp32_sums else case.dtype
    columns = [[each.to(sums) for each in column] for column in zip(*rows, strict=True)]
    return [functools.reduce(torch.add, column).to(case.dtype) for column in columns]


def _average(rows: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    columns = zip(*rows, strict=True)
    return [functools.reduce(torch.add, column) / len(rows) for column in columns]

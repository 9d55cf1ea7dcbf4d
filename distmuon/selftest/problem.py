"""A small training problem with known gradients: every kind of parameter, cut by every border."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from distmuon import Muon
from distmuon.options import NsDtype
from distmuon.selftest.lab import Lab

# "wide" has nine tenths of the elements: every rank's range holds a piece of it.
MATRICES = {
    "wide": (61, 150),
    "row": (1, 37),
    "column": (29, 1),
    "experts": (3, 11, 6),
    "square": (17, 17),
    "tall": (40, 9),
}
OTHERS = {"bias": (23,), "table": (19, 5), "scale": (1,)}
# On a GPU Newton-Schulz takes 16-bit products by itself, which would hide small mistakes.
_NS_DTYPE: NsDtype = "float32"


class Problem:
    """Parameters, their optimizer and the gradients of each step.

    Attributes:
        model: The parameters by name.
        optimizer: Over the given ranks, or one process.
    """

    def __init__(
        self,
        device: torch.device,
        group: dist.ProcessGroup | None,
        *,
        dtype: torch.dtype = torch.float32,
        seed: int = 3,
        **options: Any,
    ) -> None:
        """Build the same weights on every rank.

        Args:
            device: Where they live.
            group: The ranks that share the state; None for one process.
            dtype: Of the parameters.
            seed: Of the weights.
            **options: For `Muon`.
        """
        self._device = device
        self.model = Bag(seed).to(device, dtype)
        named = dict(self.model.named_parameters())
        matrices = [(name, named[name]) for name in MATRICES]
        groups: list[dict[str, Any]] = [
            {"params": matrices[:3]},
            {"params": matrices[3:], "lr": 5e-3, "nesterov": False, "weight_decay": 0.0},
            {"params": [(name, named[name]) for name in OTHERS], "algorithm": "adamw"},
        ]
        self.optimizer = Muon(groups, lr=2e-2, process_group=group, ns_dtype=_NS_DTYPE, **options)

    def give_gradients(self, step: int) -> None:
        """Set every gradient as an average over the ranks would: the same on all of them.

        Args:
            step: Whose gradients.
        """
        generator = torch.Generator().manual_seed(1000 + step)
        for parameter in self.model.parameters():
            grad = torch.randn(parameter.shape, generator=generator)
            parameter.grad = grad.to(self._device, parameter.dtype)

    def train(self, steps: Iterable[int]) -> dict[str, Tensor]:
        """Make steps.

        Args:
            steps: Their numbers.

        Returns:
            The parameters afterwards.
        """
        for step in steps:
            self.give_gradients(step)
            self.optimizer.step()
        return self.parameters()

    def parameters(self) -> dict[str, Tensor]:
        """A copy of all parameters."""
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def everything(self) -> dict[str, Tensor]:
        """A copy of all parameters and of this rank's state."""
        state = {
            f"{bucket.spec.algorithm} {name}": value.clone()
            for bucket in self.optimizer.open()
            for name, value in bucket.shard.state.items()
        }
        return self.parameters() | state


class Bag(nn.Module):
    """The parameters of a problem, and a loss whose gradients are whole numbers."""

    def __init__(self, seed: int) -> None:
        """Draw the weights on the CPU, the same everywhere."""
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in {**MATRICES, **OTHERS}.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))

    @override
    def forward(self, factor: Mapping[str, Tensor]) -> Tensor:
        """The loss; its gradient with respect to each parameter is the given factor."""
        terms = [(p * factor[name]).sum() for name, p in self.named_parameters()]
        return torch.stack(terms).sum()


def own_gradients(rank: int, step: int, device: torch.device) -> dict[str, Tensor]:
    """One rank's gradients in one step: whole numbers, so that sums have no rounding.

    Each has the sign that it has on all ranks. Were an average 0, AdamW would blow up whatever
    rounding DDP leaves there, which divides before it adds.

    Args:
        rank: Whose.
        step: Of which step.
        device: Where to put them.
    """
    common = torch.Generator().manual_seed(10_000 + step)
    own = torch.Generator().manual_seed(20_000 + 1000 * step + rank)
    found = {}
    for name, shape in {**MATRICES, **OTHERS}.items():
        sign = torch.randint(0, 2, shape, generator=common) * 2 - 1
        found[name] = (sign * torch.randint(1, 65, shape, generator=own)).float().to(device)
    return found


def averaged_gradients(world_size: int, step: int, device: torch.device) -> dict[str, Tensor]:
    """What the average over all ranks must be.

    Args:
        world_size: Number of ranks.
        step: Of which step.
        device: Where to put them.
    """
    everyone = [own_gradients(rank, step, device) for rank in range(world_size)]
    names = everyone[0]
    return {name: torch.stack([g[name] for g in everyone]).sum(0) / world_size for name in names}


@contextmanager
def wrapped(problem: Problem, lab: Lab, reduce: str) -> Iterator[nn.Module]:
    """The model as a training loop calls it, its gradients averaged by whoever `reduce` names.

    Args:
        problem: Built with the same `reduce`.
        lab: The ranks.
        reduce: "ddp", "hook" or "owned".

    Yields:
        The model, in DistributedDataParallel where that averages.
    """
    model: nn.Module = problem.model
    if reduce != "owned":
        devices = [lab.device] if lab.device.type == "cuda" else None
        model = DistributedDataParallel(model, device_ids=devices, process_group=lab.group)
    if reduce != "ddp":
        problem.optimizer.attach(model)
    yield model

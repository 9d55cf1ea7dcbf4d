"""Momentum and updates in bfloat16 on the wire: half the bytes, and what rounding leaves."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distmuon import Muon
from distmuon.options import Wire
from tests.harness import run_ranks

SHAPES = [(24, 40), (40, 24), (30, 30), (16, 48), (33, 21)]


def train(wire: Wire) -> tuple[list[Tensor], dict[str, int]]:
    parameters = [
        nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(i)))
        for i, s in enumerate(SHAPES)
    ]
    optimizer = Muon(parameters, lr=0.1, process_group=dist.group.WORLD, wire=wire)
    for step in range(3):
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return [p.detach().clone() for p in parameters], dict(optimizer.communicator.bytes_sent)


def test_bfloat16_halves_the_bytes_and_stays_near() -> None:
    full, narrow = run_ranks(3, train, "full"), run_ranks(3, train, "bfloat16")
    for kind in ("gather", "scatter"):
        sent = [sum(sizes.get(kind, 0) for _, sizes in ranks) for ranks in (full, narrow)]
        assert sent[0] == 2 * sent[1] > 0
    differ = [not torch.equal(a, b) for a, b in zip(full[0][0], narrow[0][0], strict=True)]
    assert any(differ), "nothing that moved was rounded"
    for rank in range(3):
        for exact, rounded, here in zip(full[0][0], narrow[0][0], narrow[rank][0], strict=True):
            assert torch.equal(here, rounded)
            # Three updates of lr * 0.2 each.
            assert (rounded - exact).norm() < 0.05 * 3 * 0.1 * 0.2 * exact.numel() ** 0.5


def test_other_wires_are_refused() -> None:
    with pytest.raises(ValueError, match="Invalid wire='float16'"):
        Muon([nn.Parameter(torch.zeros(4, 4))], wire="float16")

"""Parameters published in parts while other matrices are still computed: same bits, same bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distmuon import Muon
from distmuon.layout import LayoutKind
from tests.harness import run_ranks

SHAPES = {f"w{i}": (16, 32) for i in range(9)} | {"tall": (80, 24), "wide": (24, 100)}
STEPS = 3


class Weights(nn.Module):
    """Independent matrices with gradients that every rank knows."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterDict(
            {n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in SHAPES.items()}
        ).to(dtype)

    def set_gradients(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step + 1)
        for name, parameter in self.weights.items():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
            if (step, name) == (1, "w3"):
                parameter.grad = None


def train(options: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """Values after some steps, bytes sent, the plan's parts, the longest wait of a step."""
    model = Weights(dtype)
    group = dist.group.WORLD if dist.is_initialized() else None
    optimizer = Muon(list(model.weights.items()), lr=0.1, process_group=group, **options)
    for step in range(STEPS):
        model.set_gradients(step)
        optimizer.step()
    values: dict[str, Tensor] = {n: p.detach().clone() for n, p in model.weights.items()}
    return values, dict(optimizer.report().bytes_sent), optimizer.plan[0].parts


@pytest.mark.parametrize("layout", ["flat", "aligned"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_parts_change_no_bit_and_no_byte(world_size: int, layout: LayoutKind) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        whole = run_ranks(world_size, train, {"layout": layout, "wave_bytes": 2048}, dtype)
        # 301 elements: parts begin and end inside matrices.
        options = {"layout": layout, "wave_bytes": 2048, "publish_bytes": 1204}
        cut = run_ranks(world_size, train, options, dtype)
        for (values, sent, _), (expected, sent_whole, none) in zip(cut, whole, strict=True):
            assert none == ()
            assert sent == sent_whole
            for name, value in values.items():
                assert torch.equal(value, expected[name]), name
        spans = [[(part.start, part.stop) for part in parts] for _, _, parts in cut]
        assert all(span == spans[0] for span in spans)
        assert len(spans[0]) > 1


def test_more_ranks_than_matrices_and_a_shard_that_is_all_on_its_way() -> None:
    expected, _, _ = train({})
    for values, _, _ in run_ranks(7, train, {"publish_bytes": 64}):
        for name, value in values.items():
            assert torch.equal(value, expected[name]), name


def test_a_wrong_size_is_refused() -> None:
    with pytest.raises(ValueError, match="publish_bytes=-1"):
        train({"publish_bytes": -1})

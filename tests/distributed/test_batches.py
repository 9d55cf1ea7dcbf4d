"""Equal matrices orthogonalized as one stack, as on GPUs, give what single ones give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distmuon import Blocks, Muon, exchange, matrix_updates
from distmuon.orthogonalize import orthogonalize_checked, pipeline
from tests.harness import run_ranks

SHAPES = [(12, 20)] * 5 + [(20, 12)] * 2 + [(3, 12, 20)]


def train(world_size: int, stacked: int, options: dict[str, Any]) -> tuple[list[Tensor], int]:
    """Parameters after three steps, and the most matrices that were orthogonalized in one call."""
    parameters = [
        nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(i)))
        for i, s in enumerate(SHAPES)
    ]
    groups = [
        {"params": parameters[:4], **options},
        {"params": parameters[4:], "momentum": 0.8, **options},
    ]
    group = dist.group.WORLD if world_size > 1 else None
    optimizer = Muon(groups, lr=0.1, process_group=group, wave_bytes=4 * 500)
    largest = 0
    whole = matrix_updates.orthogonalize_each

    def counting(matrices: Sequence[Tensor], **options: Any) -> object:
        nonlocal largest
        largest = max(largest, len(matrices))
        return whole(matrices, **options)

    with pytest.MonkeyPatch.context() as patch:
        for module in (exchange, matrix_updates):
            patch.setattr(module, "stack_numel", lambda device: stacked)
        patch.setattr(matrix_updates, "orthogonalize_each", counting)
        for step in range(3):
            generator = torch.Generator().manual_seed(100 + step)
            for i, parameter in enumerate(parameters):
                # The second matrix has no gradient in the second step.
                grad = torch.randn(parameter.shape, generator=generator)
                parameter.grad = None if (i, step) == (1, 1) else grad
            optimizer.step()
    return [p.detach().clone() for p in parameters], largest


@pytest.mark.parametrize(
    ("world_size", "options", "most"),
    [
        (1, {}, 3),
        (3, {}, 3),
        (1, {"algorithm": "normuon"}, 3),
        (1, {"adjust_lr_fn": "update_rms"}, 3),
        (1, {"algorithm": "normuon", "blocks": Blocks(2, repeats=2)}, 6),
        (2, {"blocks": Blocks(2)}, 6),
    ],
)
def test_stacks_give_what_single_matrices_give(
    world_size: int, options: dict[str, Any], most: int
) -> None:
    single, one = run_ranks(world_size, train, world_size, 0, options)[0]
    results = run_ranks(world_size, train, world_size, 3 * 240, options)
    assert one == 1
    assert 1 < max(largest for _, largest in results) <= most
    for stacked, _ in results:
        torch.testing.assert_close(stacked, single, rtol=1e-5, atol=1e-5)


def test_a_large_batch_goes_through_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(7, 70, 130)
    x[4, 0, 0] = torch.nan
    whole = orthogonalize_checked(x)
    monkeypatch.setattr(pipeline, "stack_numel", lambda device: 3 * 70 * 130)
    pieces = orthogonalize_checked(x)
    assert pieces.finite.tolist() == [True] * 4 + [False] + [True] * 2
    torch.testing.assert_close(pieces.update, whole.update, rtol=0, atol=1e-5, equal_nan=True)

"""A rank's range of the gradients, read into memory that held something else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.gpu_checks import poisoned
from distmuon.layout import TensorSpec, flat_layout
from distmuon.shard import Shard


@pytest.mark.parametrize("missing", [(), (0,), (1,), (2,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_what_has_no_gradient_is_zero(world_size: int, missing: tuple[int, ...]) -> None:
    parameters = [nn.Parameter(torch.ones(shape)) for shape in ((3, 5), (7,), (2, 9))]
    specs = [TensorSpec(str(i), tuple(p.shape)) for i, p in enumerate(parameters)]
    layout = flat_layout(specs, world_size)
    expected = torch.zeros(layout.numel)
    for index, (parameter, offset) in enumerate(zip(parameters, layout.offsets, strict=True)):
        if index not in missing:
            parameter.grad = torch.randn_like(parameter)
            expected[offset : offset + parameter.numel()] = parameter.grad.view(-1)
    found = []
    for rank in range(world_size):
        shard = Shard(layout, rank, parameters, {})
        with poisoned():
            found.append(shard.read_grad())
    assert torch.equal(torch.cat(found), expected)

"""Steps with Triton's kernels on fake CUDA tensors: what they are given, and that nothing waits.

The kernels are not run, which tests/kernels does: each launch is looked at instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distmuon import Muon, rounding
from distmuon.kernels import elementwise, symmetric
from tests.gpu.fake_cuda import Host, fake_cuda

pytest.importorskip("triton")

from distmuon.kernels import elementwise_triton, symmetric_triton

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: test_gpu.py")

CUDA = torch.device("cuda:1")  # not the current one
STEPS = 3
# Two of a shape, for a stack; large enough for the kernels.
SHAPES = {
    "first": (4096, 8192),
    "second": (4096, 8192),
    "square": (4096, 4096),
    "odd": (1000, 1000),
    "bias": (2**20,),
}
ALWAYS = {
    "_symmetric_kernel",
    "_momentum_kernel",
    "_apply_kernel",
    "_adamw_kernel",
    "_scale_kernel",
}
CASES: dict[str, tuple[torch.dtype, dict[str, Any], set[str]]] = {
    "float32": (torch.float32, {}, ALWAYS),
    "bfloat16": (torch.bfloat16, {}, ALWAYS | {"_adopt_kernel"}),
    "rounded": (torch.bfloat16, {"stochastic_rounding": 1}, ALWAYS | {"_round_kernel"}),
    "keller": (torch.float32, {"ns_coefficients": "keller", "adjust_lr_fn": "original"}, ALWAYS),
}


class Kernel:
    """In the place of a kernel of Triton's: looks at what a launch is given."""

    def __init__(self, name: str, host: Host, launched: Counter[str]) -> None:
        self._name, self._host, self._launched = name, host, launched

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(isinstance(size, int) and size > 0 for size in grid), grid
        return self._launch

    def _launch(self, *args: Any, **kwargs: Any) -> None:
        for each in args:
            if isinstance(each, Tensor):
                assert each.device == CUDA, f"{self._name} was given {each}"
            else:  # a number of the host; a tensor's value would have been waited for
                assert isinstance(each, int | float), f"{self._name} was given {each!r}"
        assert self._host.current == CUDA.index, f"{self._name} is launched on another device"
        self._launched[self._name] += 1


@pytest.fixture(name="launched")
def _launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Host, Counter[str]]]:
    launched: Counter[str] = Counter()
    with fake_cuda() as host:
        for module in (elementwise_triton, symmetric_triton):
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                monkeypatch.setattr(module, name, Kernel(name, host, launched))
        for where in (elementwise, symmetric):
            monkeypatch.setattr(where, "triton_is_usable", lambda device: device.type == "cuda")
        # Their checks compare values.
        for checked in (elementwise, symmetric, rounding):
            monkeypatch.setattr(checked, "_trusted", {})
            monkeypatch.setattr(checked, "_check", lambda key: True)
        yield host, launched


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernels_get_tensors_of_the_current_device_and_nothing_waits(
    launched: tuple[Host, Counter[str]], case: tuple[torch.dtype, dict[str, Any], set[str]]
) -> None:
    host, launches = launched
    dtype, options, expected = case
    parameters = {
        name: nn.Parameter(torch.zeros(shape, dtype=dtype, device=CUDA))
        for name, shape in SHAPES.items()
    }
    *matrices, bias = parameters.items()
    groups = [{"params": matrices}, {"params": [bias], "algorithm": "adamw"}]
    optimizer = Muon(groups, lr=1e-3, nonfinite="propagate", **options)
    for _ in range(STEPS):
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        host.waits.clear()
        launches.clear()
        optimizer.step()
    assert not host.waits.total()
    assert set(launches) == expected
    assert launches["_momentum_kernel"] == len(matrices), "each finds its largest entry"
    assert host.current == 0

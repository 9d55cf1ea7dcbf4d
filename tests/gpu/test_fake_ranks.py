"""Ranks with fake CUDA tensors: from which device each message leaves, and where a rank waits.

The processes and what they compare by gloo are real. Each rank has a GPU of its own, and none has
said so by `torch.cuda.set_device`.
"""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # registers the backend "fake"
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from distmuon import CostModel, Muon
from distmuon.collectives import Communicator
from tests.gpu.fake_cuda import Host, fake_cuda
from tests.harness import run_ranks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: test_gpu.py")

Reduce = Literal["ddp", "owned"]
# Messages that cost nothing: balance alone decides, so that much has to be moved.
FREE = CostModel(latency=1e-12, bandwidth=1e18, flops=1e9)
STEPS = 3
SHAPES = {"wide": (24, 40), "tall": (97, 17), "small": (17, 9), "bias": (33,)}


class Model(nn.Module):
    """Matrices, a vector, and a buffer that stays on the host."""

    counts: Tensor

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            values = torch.zeros(shape, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(values))
        self.register_buffer("counts", torch.tensor([float(dist.get_rank() + 1)]))


# Of the parameters, of the matrices' group, and of the optimizer.
CASES: tuple[tuple[torch.dtype, dict[str, Any], dict[str, Any]], ...] = (
    (torch.float32, {}, {"max_split": 2}),
    (torch.bfloat16, {"algorithm": "normuon"}, {"wire": "bfloat16", "wave_bytes": 512}),
    (torch.bfloat16, {"stochastic_rounding": 1}, {"publish_bytes": 512, "layout": "aligned"}),
)
# What a step sends in each case.
SENT = (
    {"allreduce_", "alltoall_base_", "_allgather_base_"},
    {"allreduce_", "alltoall_base_", "_allgather_base_"},
    {"allreduce_", "send", "recv_", "_allgather_base_"},
)


def build(
    reduce: Reduce, dtype: torch.dtype, group: dict[str, Any], options: dict[str, Any]
) -> tuple[Model, Muon]:
    # What CUDA tensors send is noted, and goes nowhere.
    process_group = dist.new_group(backend="cpu:gloo,cuda:fake")
    model = Model(torch.device("cuda", dist.get_rank()), dtype)
    *matrices, bias = model.named_parameters()
    groups = [{"params": matrices, **group}, {"params": [bias], "algorithm": "adamw"}]
    chosen = {"cost_model": FREE, "reduce": reduce, "nonfinite": "propagate", **options}
    optimizer = Muon(groups, process_group=process_group, **chosen)
    if reduce == "owned":
        optimizer.attach(model)
    return model, optimizer


def step(model: Model, optimizer: Muon) -> None:
    # autograd has no thread for a GPU here; with "owned" step() sends what no hook has sent.
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


def train(reduce: Reduce) -> list[tuple[Host, int]]:
    """For each case what was done, and the waits of the last step."""
    found = []
    for dtype, group, options in CASES:
        with fake_cuda() as host:
            model, optimizer = build(reduce, dtype, group, options)
            for _ in range(STEPS):
                host.waits.clear()
                host.sent.clear()
                step(model, optimizer)
            found.append((host, host.waits.total()))
            for parameter in model.parameters():
                assert (parameter.device.index, parameter.dtype) == (dist.get_rank(), dtype)
            assert float(model.counts) == (1.0 if reduce == "owned" else dist.get_rank() + 1.0)
    return found


@pytest.mark.parametrize("reduce", ["ddp", "owned"])
def test_a_step_s_messages_leave_from_the_rank_s_gpu_and_it_waits_to_agree(reduce: Reduce) -> None:
    for rank, cases in enumerate(run_ranks(2, train, reduce)):
        for (host, waits), names in zip(cases, SENT, strict=True):
            reduced = {"alltoall_base_"} if reduce == "owned" else set()
            assert set(host.sent) == {(name, f"cuda:{rank}") for name in names | reduced}
            assert waits == 2, "the agreement goes to the device and comes back"
            assert host.current == 0


def compare() -> tuple[Host, Host]:
    with fake_cuda() as first:
        dtype, group, options = CASES[0]
        options = {**options, "check_desync_every": 1, "diagnostics_every": 1, "profile": "phases"}
        model, optimizer = build("ddp", dtype, group, options)
        step(model, optimizer)
        optimizer.clip_grad_norm_(1.0)
        late = nn.Parameter(torch.zeros(12, 30, device=model.get_parameter("wide").device))
        model.register_parameter("late", late)
        optimizer.add_param_group({"params": [("late", late)]})
        optimizer.refresh()
        step(model, optimizer)
        optimizer.consolidate_state_dict(to=0)
    with fake_cuda() as second:
        # As NCCL's: none for the CPU.
        communicator = Communicator(dist.new_group(backend="cuda:fake"))
        communicator.locate([torch.device("cuda", dist.get_rank())])
        communicator.broadcast(torch.ones(3, dtype=torch.bool))
    return first, second


def test_all_else_leaves_from_the_rank_s_gpu_too_buffers_of_the_host_included() -> None:
    for rank, (first, second) in enumerate(run_ranks(2, compare)):
        assert {device for _, device in first.sent} == {f"cuda:{rank}"}
        assert (("recv_" if rank == 0 else "send"), f"cuda:{rank}") in first.sent
        assert second.sent == {("broadcast_", f"cuda:{rank}"): 1}
        assert first.current == 0


def collect_objects() -> tuple[int | None, int]:
    with fake_cuda() as host:
        communicator = Communicator(dist.group.WORLD)
        communicator.locate([torch.device("cpu"), torch.device("cuda", dist.get_rank())])
        seen: list[int | None] = []

        class Current(TorchDispatchMode):
            def __torch_dispatch__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                if func.namespace == "c10d":
                    seen.append(host.current)
                return func(*args, **(kwargs or {}))

        with Current():
            assert communicator.collect(dist.get_rank()) == [0, 1]
        assert len(set(seen)) == 1
        return seen[0], host.current


def test_objects_are_gathered_by_way_of_the_rank_s_gpu() -> None:
    assert run_ranks(2, collect_objects) == [(0, 0), (1, 0)]

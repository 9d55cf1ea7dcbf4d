"""I2 and I3: what goes over the wire and what a step holds, measured apart from the optimizer."""

import fcntl
import math
import shutil
import socket
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from distmuon import CostModel, Muon
from tests.harness import run_ranks

Reduce = Literal["ddp", "hook", "owned"]
# Beside one large matrix the small ones lie far from their owners. 12,288 elements: no padding for
# 3 and 4 ranks.
DRIFTED = {"large": (64, 96)} | {f"small{i}": (32, 32) for i in range(6)}
EQUAL = {f"m{i}": (16, 32) for i in range(12)}
STEPS = 3
# Messages that cost nothing: balance alone decides, however small the matrices.
FREE = CostModel(latency=1e-12, bandwidth=1e18, flops=1e9)


class Ones(nn.Module):
    """A loss whose gradient is one everywhere."""

    def __init__(self, shapes: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        values = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
        self.weights = nn.ParameterDict(values)

    def forward(self) -> torch.Tensor:
        return torch.stack([p.sum() for p in self.weights.values()]).sum()


class Meter:
    """Counts what is handed to torch.distributed, by function; knows nothing of distmuon."""

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self._wrap("all_to_all_single", self._all_to_all)
        self._wrap("batch_isend_irecv", self._peer_to_peer)
        self._wrap("all_reduce", self._all_reduce)

    def _wrap(self, name: str, count: Callable[..., int]) -> None:
        original = getattr(dist, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.sent[name] += count(*args, **kwargs)
            return original(*args, **kwargs)

        setattr(dist, name, counted)

    def _all_to_all(self, output: Any, data: Any, received: Any, sent: Any, **_: Any) -> int:
        assert data.numel() == sum(sent)
        others = sum(count for rank, count in enumerate(sent) if rank != dist.get_rank())
        return others * int(data.element_size())

    def _peer_to_peer(self, operations: list[Any]) -> int:
        return sum(o.tensor.nbytes for o in operations if o.op is dist.isend)

    def _all_reduce(self, tensor: Any, *_: Any, **__: Any) -> int:
        return 2 * (dist.get_world_size() - 1) * int(tensor.nbytes) // dist.get_world_size()


def train(
    shapes: dict[str, tuple[int, int]], reduce: Reduce, **options: Any
) -> tuple[Counter[str], Any, tuple[Any, ...]]:
    model = Ones(shapes)
    wrapped: nn.Module = model if reduce == "owned" else DistributedDataParallel(model)
    named = list(model.weights.items())
    optimizer = Muon(named, process_group=dist.group.WORLD, reduce=reduce, **options)
    if reduce != "ddp":
        optimizer.attach(wrapped)
    wrapped().backward()
    optimizer.step()
    before = Counter(optimizer.report().bytes_sent)
    meter = Meter()
    for _ in range(STEPS):
        optimizer.zero_grad()
        wrapped().backward()
        optimizer.step()
    return meter.sent, Counter(optimizer.report().bytes_sent) - before, optimizer.plan


def train_here(reduce: Reduce, layout: Literal["flat", "aligned"]) -> Any:
    shapes = DRIFTED if layout == "flat" else EQUAL
    return train(shapes, reduce, layout=layout, wave_bytes=4096)


@pytest.mark.parametrize("reduce", ["ddp", "hook", "owned"])
@pytest.mark.parametrize(("layout", "world_size"), [("flat", 3), ("flat", 4), ("aligned", 3)])
def test_i2_metered_bytes_are_those_of_the_plan(
    layout: Literal["flat", "aligned"], world_size: int, reduce: Reduce
) -> None:
    shapes = DRIFTED if layout == "flat" else EQUAL
    elements = sum(math.prod(shape) for shape in shapes.values())
    share = 4 * elements * (world_size - 1) // world_size  # of AdamW under ZeRO-1, each way
    for metered, reported, (plan,) in run_ranks(world_size, train_here, reduce, layout):
        drifted = 4 * (plan.outgoing_numel + plan.incoming_numel)
        assert (layout == "aligned") == (len(plan.waves) == 0)
        reduced = 0 if reduce == "ddp" else share
        assert metered["all_to_all_single"] == STEPS * (reduced + drifted)
        assert metered["batch_isend_irecv"] == STEPS * share
        assert metered["all_reduce"] == reported["agree"]
        assert reported["gather"] + reported["scatter"] == STEPS * drifted
        assert (reported["reduce"], reported["publish"]) == (STEPS * reduced, STEPS * share)


def measure_peak(wave_bytes: int) -> tuple[int, int, int]:
    """Bytes that a step allocates at most, the documented bound, and the number of waves."""
    model = Ones({"large": (256, 384)} | {f"small{i}": (128, 128) for i in range(6)})
    named = list(model.weights.items())
    optimizer = Muon(named, process_group=dist.group.WORLD, wave_bytes=wave_bytes, cost_model=FREE)
    for _ in range(2):
        model.zero_grad()
        model().backward()
        optimizer.step()
    model.zero_grad()
    model().backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        optimizer.step()
    results: Any = recorded.profiler
    held = peak = 0
    for event in sorted(results.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    (plan,) = optimizer.plan
    layout = plan.ownership.layout
    flows = [(wave.incoming_numel, wave.outgoing_numel) for wave in plan.waves]
    flows = [(0, 0)] * 2 + flows + [(0, 0)] * 2  # before the first wave, and after the last
    exchange = max(
        (sum(flows[k - 1]) + flows[k][0] + sum(flows[k + 1]) for k in range(1, len(flows) - 1)),
        default=0,
    )
    largest = max((math.prod(layout.specs[i].shape) for i in plan.owned), default=0)
    return peak, 4 * (layout.shard_numel + exchange + 8 * largest), len(plan.waves)


@pytest.mark.parametrize("wave_bytes", [4, 64 * 2**20])
def test_i3_a_step_allocates_no_more_than_documented(wave_bytes: int) -> None:
    for rank, (peak, bound, waves) in enumerate(run_ranks(4, measure_peak, wave_bytes)):
        assert waves >= 1
        assert 0.3 * bound < peak <= bound, f"rank {rank}"


WIRE = {"large": (768, 1024)} | {f"small{i}": (256, 512) for i in range(6)}


def count_wire(reduce: Reduce) -> tuple[int, int]:
    """Bytes through the loopback device during two steps, and what all ranks say they sent."""
    model = Ones(WIRE)
    named = list(model.weights.items())
    optimizer = Muon(named, process_group=dist.group.WORLD, reduce=reduce, wave_bytes=2**19)
    optimizer.attach(model)
    model().backward()
    optimizer.step()
    sent = Counter(optimizer.report().bytes_sent)
    dist.barrier()
    before = _transmitted()
    dist.barrier()
    for _ in range(2):
        model().backward()
        optimizer.step()
    dist.barrier()
    wire = _transmitted() - before
    told = torch.tensor((Counter(optimizer.report().bytes_sent) - sent).total())
    dist.all_reduce(told)
    return wire, int(told)


def _transmitted() -> int:
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    raise AssertionError("no loopback device")


def count_in_a_namespace() -> None:
    """Runs inside `unshare -rn`: nothing else uses this loopback device."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        request = bytearray(struct.pack("16sH14s", b"lo", 0, b""))
        fcntl.ioctl(handle, 0x8913, request)  # SIOCGIFFLAGS
        flags = struct.unpack_from("H", request, 16)[0] | 1  # IFF_UP
        fcntl.ioctl(handle, 0x8914, struct.pack("16sH14s", b"lo", flags, b""))  # SIOCSIFFLAGS
    print("wire", *run_ranks(3, count_wire, "owned")[0])


@pytest.mark.slow
def test_i2_the_loopback_device_carries_what_the_ranks_say() -> None:
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("no unshare(1)")
    if subprocess.run([unshare, "-rn", "true"], capture_output=True, check=False).returncode:
        pytest.skip("network namespaces are not permitted here")
    code = "from tests.distributed import test_bytes_and_memory as t; t.count_in_a_namespace()"
    run = subprocess.run(
        [unshare, "-rn", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == 0, run.stderr
    wire, told = map(int, run.stdout.split("wire ")[1].split()[:2])
    # Headers, acknowledgements and the barriers come on top of the payload.
    assert told <= wire <= 1.02 * told, (wire, told)

"""What is sent could go by NCCL: its operations, its dtypes, dense tensors, from the right device.

NCCL needs GPUs, so nothing here goes by it. Real gloo ranks do what a training run does, while
every message is looked at where it leaves torch's dispatcher.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distmuon import checkpoint
from tests.distributed import test_combined as combined
from tests.distributed import test_grad_scaler as scaled
from tests.distributed import test_splits as splits
from tests.harness import run_ranks

PACKAGE = Path(__file__).parents[2] / "distmuon"
# Source: torch/csrc/distributed/c10d, ncclDataType in NCCLUtils.hpp and ncclOp in
# ProcessGroupNCCL.cpp. It has bool too, as bytes; nothing here needs it.
DTYPES = {
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
}
REDUCE_OPS = {"SUM", "AVG", "MIN", "MAX", "PRODUCT"}
OPERATIONS = {
    "_allgather_base_",
    "allgather_",
    "allreduce_",
    "alltoall_base_",
    "barrier",
    "broadcast_",
    "recv_",
    "send",
}


class Vocabulary(TorchDispatchMode):
    """Looks at every message of this rank while it is entered; nothing is replaced.

    Attributes:
        seen: How often each operation was sent.
        wrong: What NCCL could not do, once each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.wrong: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            self.look(func.overloadpacket.__name__, tree_leaves((args, kwargs)))
        return func(*args, **(kwargs or {}))

    def look(self, name: str, leaves: Sequence[Any]) -> None:
        self.seen[name] += 1
        if name not in OPERATIONS:
            self.wrong.add(f"{name} is no operation of NCCL's")
        for tensor in (leaf for leaf in leaves if isinstance(leaf, Tensor)):
            if tensor.dtype not in DTYPES:
                self.wrong.add(f"{name} of {tensor.dtype}")
            if not tensor.is_contiguous():
                self.wrong.add(f"{name} of strides {tensor.stride()} for {list(tensor.shape)}")


def everything(folder: Path) -> tuple[Counter[str], set[str]]:
    """What tests of many features together do, and the rest of a run."""
    with Vocabulary() as vocabulary:
        for dtype, options in combined.VARIANTS[::4]:  # blocks, NorMuon, companions, QK-Clip, ...
            model, optimizer = combined.build(dist.group.WORLD, dtype, **options)
            combined.train(model, optimizer, range(2))
        checkpoint.save(folder / "now", optimizer, model=model)
        checkpoint.load(folder / "now", optimizer, model=model)
        for reduce in ("ddp", "hook", "owned"):
            scaled.train(reduce, "ours", clip=True)
        splits.train(splits.SHAPES, dist.group.WORLD, {}, max_split=2)
        _, optimizer = splits.train(
            splits.SHAPES,
            dist.group.WORLD,
            {1: ("small",)},
            wire="bfloat16",
            publish_bytes=1024,
            check_desync_every=1,
            nonfinite="skip",
        )
        optimizer.consolidate_state_dict(to=1)
        optimizer.add_param_group({"params": [("late", nn.Parameter(torch.ones(4, 6)))]})
        optimizer.refresh()
        pending = checkpoint.save(folder / "behind", optimizer, async_save=True)
        pending.wait()
        checkpoint.load(folder / "behind", optimizer)
    return vocabulary.seen, vocabulary.wrong


def test_every_message_of_a_run_is_one_that_nccl_has(tmp_path: Path) -> None:
    for seen, wrong in run_ranks(2, everything, tmp_path):
        assert not wrong
        assert {"alltoall_base_", "allreduce_", "allgather_", "broadcast_"} <= set(seen)
        assert {"send", "recv_"} <= set(seen)


def what_it_finds() -> set[str]:
    with Vocabulary() as vocabulary:
        dist.all_reduce(torch.ones(3, dtype=torch.int16).bool())
        dist.broadcast(torch.ones(4, 3).T, src=0)
        dist.monitored_barrier()
    return vocabulary.wrong


def test_the_recorder_finds_what_nccl_lacks() -> None:
    for found in run_ranks(2, what_it_finds):
        assert found == {
            "allreduce_ of torch.bool",
            "broadcast_ of strides (1, 3) for [3, 4]",
            "monitored_barrier_ is no operation of NCCL's",
        }


def test_reductions_and_single_messages_are_those_of_nccl() -> None:
    # A single message connects its two ranks anew under NCCL; in a batch it goes by the group's own
    # connections. connections.py is for gloo, and asks.
    single = {f"dist.{name}" for name in ("send", "recv", "isend", "irecv")}
    reductions = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        batched = {
            id(argument)
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "dist.P2POp"
            for argument in node.args
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute):
                continue
            name = ast.unparse(node)
            if name in single and path.name != "connections.py":
                assert id(node) in batched, f"{path.name}:{node.lineno} {name}"
            if name.startswith("dist.ReduceOp.") and name != "dist.ReduceOp.RedOpType":
                reductions.add(name.removeprefix("dist.ReduceOp."))
    assert reductions
    assert reductions <= REDUCE_OPS

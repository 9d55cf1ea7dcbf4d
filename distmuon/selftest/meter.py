"""Counts what is handed to torch's process groups, apart from the optimizer's own counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has not typed it
    """Sees every message of this rank while it is entered, whoever sends it.

    Collectives reach their backend through torch's dispatcher, which shows them to a mode first
    (torch's own CommDebugMode counts them there too). Nothing is replaced.

    Attributes:
        sent: Payload bytes to other ranks by operation, as `Communicator.bytes_sent` counts:
            where the backend chooses the algorithm, the least that any algorithm sends.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        """Count for a member of a group.

        Args:
            group: Whose rank and size the counts are for.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.sent: Counter[str] = Counter()
        self._rank = group.rank()
        self._others = group.size() - 1
        self._count: dict[str, Callable[[Mapping[str, Any]], int]] = {
            "alltoall_base_": self._all_to_all,
            "send": lambda given: _nbytes(given["tensors"]),
            "_allgather_base_": lambda given: self._others * given["input_tensor"].nbytes,
            "allreduce_": self._all_reduce,
        }

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            kind = func._schema.name.partition("::")[2]
            names = (argument.name for argument in func._schema.arguments)
            given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
            if kind in self._count:
                self.sent[kind] += self._count[kind](given)
            elif kind not in ("recv_", "barrier"):
                # A message that the plan knows nothing of must not go uncounted.
                self.sent[kind] += sum(_nbytes(v) for k, v in given.items() if "output" not in k)
        return func(*args, **(kwargs or {}))

    def _all_to_all(self, given: Mapping[str, Any]) -> int:
        counts = given["input_split_sizes"]
        rows = sum(n for rank, n in enumerate(counts) if rank != self._rank)
        return int(rows * given["input"].element_size())

    def _all_reduce(self, given: Mapping[str, Any]) -> int:
        return 2 * self._others * _nbytes(given["tensors"]) // (self._others + 1)


def _nbytes(value: Any) -> int:
    if isinstance(value, (list, tuple)):
        return sum(map(_nbytes, value))
    return int(getattr(value, "nbytes", 0))

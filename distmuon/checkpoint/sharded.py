"""What a checkpoint asks of an optimizer: which parameters it has, and this rank's ranges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from distmuon.buckets import Bucket
from distmuon.collectives import Communicator
from distmuon.shard import FlatRange

# Ours, or a framework's: what matters is where the elements of each parameter are.
AnyBucket = Bucket[FlatRange]


@runtime_checkable
class Sharded(Protocol):
    """`distmuon.Muon`, or another optimizer whose state lies in flat ranges as its does."""

    @property
    def communicator(self) -> Communicator:
        """The ranks that the state is sharded over."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Hyperparameters of each group, and under "params" the parameters of the model."""

    @property
    def parameter_names(self) -> Mapping[Tensor, str]:
        """FQN of each parameter, in the order of the groups."""

    def open(self, mode: Literal["read", "write"] = "read") -> Sequence[AnyBucket]:
        """The live buffers, to be read or to be written. A collective."""

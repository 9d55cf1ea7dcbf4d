"""The state of a sharded optimizer as the dictionaries that torch knows."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from distmuon import group_check
from distmuon.buckets import BucketSpec
from distmuon.errors import see
from distmuon.state_io import StateKeeper, key_by_name
from distmuon.state_part import StateByParameter


class SavedOptimizer(torch.optim.Optimizer):
    """An optimizer whose state lies in shards: what saves and loads it.

    Attributes:
        keeper: The state as dictionaries, for adapters that save it in their own way.
    """

    keeper: StateKeeper
    _names: dict[Tensor, str]

    @abstractmethod
    def _specify(self) -> list[BucketSpec]:
        """The buffers, also before they are made."""

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Gather the whole state on one rank, for `state_dict` until the next step. A collective.

        Args:
            to: The rank, within the process group, that receives the state in host memory.

        Raises:
            ValueError: if `to` is not a rank of the group.
            RuntimeError: if `state_dict` returns handles.
        """
        self.keeper.consolidate(to=to)

    def sharded_state_dict(self) -> dict[str, Any]:
        """State by FQN in handles for torch.distributed.checkpoint. Never a collective.

        Returns:
            As `state_dict`, but views of each rank's part: `save` writes it, `load` reads into it,
            from any number of ranks. Then give this to `load_state_dict`, for the numbers in it.

        Raises:
            ValueError: if the parameters have no names.
        """
        return key_by_name(self._pack(self.keeper.sharded(self._specify())))

    @override
    def state_dict(self) -> dict[str, Any]:
        """State of every parameter, in torch's form. Never a collective.

        Returns:
            An ordinary optimizer dictionary, the same for every world size, named as torch.optim
            does: "momentum_buffer", or "step", "exp_avg" and "exp_avg_sq", in each parameter's own
            shape; narrow ones' fp32 "master" too. With `state_dict_kind="sharded"` handles.

        Raises:
            RuntimeError: over several ranks, unless `consolidate_state_dict` came just before.
        """
        return self.keeper.reference() or self._pack(self.keeper.to_save(self._specify()))

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take hyperparameters and state, from a full dictionary at any world size.

        Args:
            state_dict: From `state_dict` of an optimizer with the same groups or of
                torch.optim.Muon, by parameter number or FQN, or from `sharded_state_dict`. Each
                rank keeps its own part; momentum stays fp32 whatever the parameters' dtype.

        Raises:
            ValueError: for other groups, hyperparameters out of range, or state that is partial,
                foreign or misshaped, naming the parameter; nothing has been changed then.
        """
        if self.keeper.follows(state_dict):
            return
        groups = state_dict["param_groups"]
        merged = group_check.merge_groups(self.param_groups, self._names, groups)
        specs = self._specify()
        saved = self.keeper.check(specs, self.param_groups, merged, state_dict["state"])
        # torch's own loading of state would cast momentum to the parameters' dtype.
        super().load_state_dict({**state_dict, "state": {}, "param_groups": merged})
        self.keeper.load(specs, saved)
        self.keeper.mark(self.state, self.param_groups)

    @override
    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "Muon cannot be copied or pickled: its state lies in buffers shared with the model and "
            "with other ranks. Use state_dict() and load_state_dict()." + see("partial-state")
        )

    def _pack(self, state: StateByParameter) -> dict[str, Any]:
        self.state.update(state)
        try:
            return super().state_dict()
        finally:
            self.keeper.mark(self.state, self.param_groups)

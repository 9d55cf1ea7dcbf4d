"""Optimizer state as torch's dictionaries, whole or sharded: where it is kept, what is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, get_args

from torch import Tensor

from distmuon.buckets import Bucket, BucketSpec
from distmuon.collectives import Communicator
from distmuon.dcp import StateHandle, describe_ranges
from distmuon.errors import see
from distmuon.failure import Topic
from distmuon.options import StateDictKind
from distmuon.state_part import (
    Row,
    StateByParameter,
    StatePart,
    fill,
    full_state,
    gather_full_state,
    handles,
    new_part,
    rows,
    wanted_state,
)

REFERENCE = "distmuon_state_in"


class StateKeeper:
    """The optimizer's state as dictionaries: whole or in handles, before and after the first step.

    State that is loaded before the first step is cut at once, so that no rank keeps more than its
    own part.
    """

    def __init__(self, communicator: Communicator, kind: StateDictKind) -> None:
        """Keep nothing yet.

        Args:
            communicator: The group that state is sharded over.
            kind: What to save.

        Raises:
            ValueError: for an unknown kind.
        """
        if kind not in get_args(StateDictKind):
            raise ValueError(
                f"Invalid state_dict_kind={kind!r}. Must be one of {get_args(StateDictKind)}."
                + see("bad-option")
            )
        self._communicator = communicator
        self._kind = kind
        self._pending: list[StatePart] = []  # until there are buckets
        self._buckets: Sequence[Bucket] = ()
        self._gathered: StateByParameter | None = None
        self._gathered_to: int | None = None
        self._saved_in: str | None = None
        self._loaded_from: str | None = None

    def open(self, buckets: Sequence[Bucket]) -> None:
        """Give the buckets what was loaded before the first step; from now on theirs is the state.

        Args:
            buckets: All of the engine's.

        Raises:
            RuntimeError: if the parameters were laid out otherwise when it was loaded.
        """
        if self._pending:
            self._check_layout([bucket.spec for bucket in buckets])
            for bucket, part in zip(buckets, self._pending, strict=True):
                bucket.shard.take_state(part.steps, part.tensors)
        self._buckets, self._pending = buckets, []

    def mark(
        self, state: MutableMapping[Tensor, dict[str, Any]], groups: Sequence[Mapping[str, Any]]
    ) -> None:
        """Say in `Optimizer.state` what there is, without values: these lie in flat buffers.

        torch.distributed.checkpoint takes a step of its own where an optimizer looks stateless, and
        asks here what its state is called.

        Args:
            state: The optimizer's.
            groups: `param_groups`.
        """
        state.clear()
        if self._parts() or self._kind == "sharded":
            for group in groups:
                for parameter in group["params"]:
                    rule, seed = group["algorithm"], group.get("stochastic_rounding")
                    state[parameter] = dict.fromkeys(wanted_state(rule, parameter, seed))

    def consolidate(self, *, to: int) -> None:
        """Gather the state of all buckets on one rank. A collective.

        Args:
            to: The rank that receives.

        Raises:
            ValueError: if `to` is not a rank.
            RuntimeError: if handles are what is saved.
        """
        if self._kind == "sharded":
            raise RuntimeError(
                'With state_dict_kind="sharded" state_dict() returns handles, so nothing would use '
                "what is gathered. Save them with torch.distributed.checkpoint; its "
                "dcp_to_torch_save makes one file of a checkpoint." + see("bad-option")
            )
        if not 0 <= to < self._communicator.world_size:
            raise ValueError(
                f"Invalid {to=}. Must be in [0, {self._communicator.world_size})."
                + see("bad-option")
            )
        state: StateByParameter = {}
        for part in self._parts():
            with self._communicator.during(Topic("consolidate", None, part.spec.names)):
                state.update(gather_full_state(part, self._communicator, to=to))
        self._gathered_to = to
        self._gathered = state if self._communicator.rank == to else None

    def forget_gathered(self) -> None:
        """What was gathered, or lies in a folder, is no longer the state."""
        self._gathered, self._gathered_to = None, None
        self._saved_in, self._loaded_from = None, None

    def saved_in(self, folder: str) -> None:
        """Let `state_dict` refer to a folder until the next step.

        For frameworks that write `state_dict()` to a file of their own, beside that folder.

        Args:
            folder: Where `distmuon.checkpoint` has just put the state.
        """
        self._saved_in = folder

    def loaded_from(self, folder: str) -> None:
        """Let `load_state_dict` take a reference to a folder, once.

        Args:
            folder: From which `distmuon.checkpoint` has just loaded the state.
        """
        self._loaded_from = folder

    def reference(self) -> dict[str, Any] | None:
        """What `state_dict` returns while the state is elsewhere; None while it is here.

        It has no parameter groups, so every torch optimizer refuses it; ours asks `follows`.
        """
        if self._saved_in is None:
            return None
        return {"state": {}, "param_groups": [], REFERENCE: self._saved_in}

    def follows(self, saved: Mapping[str, Any]) -> bool:
        """Whether a dictionary only refers to state that has just been loaded.

        Args:
            saved: From `state_dict`.

        Raises:
            ValueError: if it refers to state that has not been loaded.
        """
        if REFERENCE not in saved:
            return False
        if saved[REFERENCE] != self._loaded_from:
            raise ValueError(
                "This file has no optimizer state; it is beside it in the folder "
                f"{saved[REFERENCE]!r} and has not been loaded. Load the way it was saved: after "
                "distmuon.adapters.accelerate.attach(accelerator, optimizer), or with MuonTrainer."
                + see("partial-state")
            )
        self._loaded_from = None
        return True

    def to_save(self, specs: Sequence[BucketSpec]) -> StateByParameter:
        """State of every parameter, whole or in handles. Never a collective.

        Args:
            specs: All buckets.

        Returns:
            For each parameter its state.

        Raises:
            RuntimeError: as `whole` and `sharded`.
        """
        return self.whole() if self._kind == "whole" else self.sharded(specs)

    def whole(self) -> StateByParameter:
        """State of every parameter. Never a collective.

        Returns:
            For each parameter its state; nothing before the first step or loading.

        Raises:
            RuntimeError: if this rank has only its part.
        """
        world_size = self._communicator.world_size
        if world_size == 1 or not self._parts():
            return {p: state for part in self._parts() for p, state in full_state(part).items()}
        if self._gathered is not None:
            return self._gathered
        where = "" if self._gathered_to is None else f"Rank {self._gathered_to} has the whole. "
        raise RuntimeError(
            f"This rank holds 1/{world_size} of the optimizer state, and state_dict() does not "
            f"communicate: saved as it is, the other shards would be lost. {where}Either call "
            "consolidate_state_dict(to=0) on every rank after the step, then state_dict() on rank "
            "0 alone. Or let every rank write its part: give sharded_state_dict() to "
            "torch.distributed.checkpoint.save, or build the optimizer with "
            'state_dict_kind="sharded" for a framework that calls state_dict() itself. Under '
            "Accelerate call distmuon.adapters.accelerate.attach(accelerator, optimizer) once, "
            "before save_state; with the Hugging Face Trainer use "
            "distmuon.adapters.transformers.MuonTrainer." + see("bad-option")
        )

    def sharded(self, specs: Sequence[BucketSpec]) -> StateByParameter:
        """State of every parameter as handles of this rank's part. Never a collective.

        Args:
            specs: All buckets; before the first step their state is allocated, as zeros.

        Returns:
            For each parameter its state: a `StateHandle` for each tensor and, where the rule needs
            it, "step" as torch.optim.AdamW has it.

        Raises:
            RuntimeError: if the parameters were laid out otherwise when state was loaded.
        """
        self._allocate(specs)
        self._check_layout(specs)
        return {p: state for part in self._parts() for p, state in handles(part).items()}

    def check(
        self,
        specs: Sequence[BucketSpec],
        groups: Sequence[Mapping[str, Any]],
        saved_groups: Sequence[Mapping[str, Any]],
        state: Mapping[Any, Any],
    ) -> dict[Tensor, Any]:
        """Refuse state that `load` could not take; nothing is changed.

        Args:
            specs: All buckets.
            groups: `param_groups`.
            saved_groups: From `merge_groups`: "params" are the saved keys in our order.
            state: The "state" of a dictionary.

        Returns:
            The saved state of each parameter; nothing at all for empty state.

        Raises:
            ValueError: for state that is partial, foreign or misshaped, naming the parameter.
        """
        saved = _match_saved(groups, saved_groups, state)
        for spec in specs if saved else ():
            _check_entries(spec, self._communicator.rank, saved)
        return saved

    def load(self, specs: Sequence[BucketSpec], saved: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """Take this rank's part of every parameter's state, from tensors that are whole or handles.

        Args:
            specs: All buckets.
            saved: What `check` has passed; empty to start anew.
        """
        self.forget_gathered()
        # What was there may be laid out otherwise; but keep what handles are views of.
        if not saved or self._differs(specs):
            self._pending = []
        if saved:
            self._allocate(specs)
        for part in self._parts():
            fill(part, saved)

    def _parts(self) -> list[StatePart]:
        rank = self._communicator.rank
        live = [StatePart(b.spec, rank, b.shard.steps, b.shard.tensors) for b in self._buckets]
        return live or self._pending

    def _allocate(self, specs: Sequence[BucketSpec]) -> None:
        if not self._parts():
            self._pending = [new_part(spec, self._communicator.rank) for spec in specs]

    def _differs(self, specs: Sequence[BucketSpec]) -> bool:
        here = [part.spec for part in self._parts()]
        places = [
            [(spec.algorithm, spec.layout, spec.kept) for spec in some] for some in (here, specs)
        ]
        return places[0] != places[1]

    def _check_layout(self, specs: Sequence[BucketSpec]) -> None:
        if self._differs(specs):
            raise RuntimeError(
                "The parameters are laid out otherwise than when state was loaded or asked for: "
                "groups were added, or some parameters changed their dtype or device. Load state "
                "(load_state_dict) after the model is on its device and the groups are complete."
                + see("changed-parameters")
            )


def key_by_name(packed: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's dictionary with FQNs in place of parameter numbers.

    Args:
        packed: From torch's `state_dict`.

    Returns:
        The same with FQNs in "state" and in the groups' "params".

    Raises:
        ValueError: if the optimizer does not know the parameters' names.
    """
    names: dict[int, str] = {}
    groups = []
    for index, group in enumerate(packed["param_groups"]):
        fqns = list(group.get("param_names", ()))
        if len(fqns) != len(group["params"]):
            raise ValueError(
                f"The parameters of group {index} have no names to save them under. Give the "
                "optimizer (name, parameter) pairs, as build_param_groups does."
                + see("state-mismatch")
            )
        names.update(zip(group["params"], fqns, strict=True))
        groups.append({**group, "params": fqns})
    state = {names[key]: entry for key, entry in packed["state"].items()}
    return {"state": state, "param_groups": groups}


def _match_saved(
    groups: Sequence[Mapping[str, Any]],
    saved_groups: Sequence[Mapping[str, Any]],
    state: Mapping[Any, Any],
) -> dict[Tensor, Any]:
    keys = {
        key: parameter
        for here, there in zip(groups, saved_groups, strict=True)
        for parameter, key in zip(here["params"], there["params"], strict=True)
    }
    foreign = [key for key in state if key not in keys]
    if foreign:
        raise ValueError(
            f"The file has state of {foreign[:3]}, which none of its parameter groups lists "
            f"({len(foreign)} such entries). Is it one rank's part, or put together by hand?"
            + see("state-mismatch")
        )
    return {parameter: state.get(key) for key, parameter in keys.items()} if state else {}


def _check_entries(spec: BucketSpec, rank: int, saved: Mapping[Tensor, Any]) -> None:
    for name, parameter in zip(spec.names, spec.parameters, strict=True):
        entry = saved[parameter] if isinstance(saved[parameter], Mapping) else {}
        found = sorted(map(str, entry))
        # Without a master the parameter's own value is taken, without Muon's count it begins anew.
        wanted = [key for key in wanted_state(spec.algorithm, parameter) if key != "master"]
        if any(key not in found for key in wanted):
            raise ValueError(
                f"The saved state of {name} has {found}. {spec.algorithm} needs {wanted}. Was it "
                "saved by another optimizer, or is it one rank's part of a sharded one?"
                + see("state-mismatch")
            )
        _check_step(name, entry.get("step", 0))
    for key in (*spec.states, "master"):
        for row in rows(spec, rank, key):
            if key in saved[row.parameter]:
                _check_tensor(row, key, saved[row.parameter][key])


def _check_tensor(row: Row, key: str, value: Any) -> None:
    if not isinstance(value, Tensor) or value.shape != row.tensor.shape:
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"The saved {key} of {row.tensor.name} is {shape}. Must be a tensor of shape "
            f"{list(row.tensor.shape)}." + see("state-mismatch")
        )
    if isinstance(value, StateHandle) and value.ranges != row.ranges:
        raise ValueError(
            f"{value!r} is a handle from another layout: here this rank holds elements "
            f"{describe_ranges(row.ranges)}. Load the file into this optimizer's own handles, "
            "those of sharded_state_dict()." + see("state-mismatch")
        )


def _check_step(name: str, value: Any) -> None:
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if not isinstance(number, (int, float)) or not 0 <= number < math.inf or number % 1:
        raise ValueError(
            f"The saved step of {name} is {value!r}. Must be a count." + see("state-mismatch")
        )

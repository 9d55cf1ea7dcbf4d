"""Bring optimizer state from torch.optim.Muon, AdamW and other Muons, and take it back.

[Note: momentum conventions] torch.optim.Muon, like this one, keeps an average of the gradients,
`buffer = momentum*buffer + (1 - momentum)*grad`, and so does Keller Jordan's repository today.
Moonlight and Keller Jordan's first version keep a sum, `buffer = momentum*buffer + grad`. The
average is `1 - momentum` times the sum, for the momentum of the next step whatever it was before.
Orthogonalization ignores the scale of a buffer but not of new gradients beside it: an average taken
for a sum, at momentum 0.95, would be outweighed twentyfold by the first gradient that follows.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from distmuon.dcp import StateHandle
from distmuon.errors import see
from distmuon.optimizer import Muon
from distmuon.parameters import canonical_name

MomentumConvention = Literal["ema", "sum"]
AdamWMatrices = Literal["refuse", "momentum"]

_KEYS = {
    "muon": ("momentum_buffer",),
    "normuon": ("momentum_buffer", "second_momentum_buffer"),
    "adamw": ("step", "exp_avg", "exp_avg_sq"),
}
_MOONLIGHT = {"moment1": "exp_avg", "moment2": "exp_avg_sq"}
_TARGETS = {torch.optim.Muon: "muon", torch.optim.AdamW: "adamw"}


class _Known(NamedTuple):
    """What our optimizer has of one parameter."""

    name: str
    algorithm: str
    momentum: float
    state: Mapping[str, Any]


def with_names(state_dict: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Key an optimizer's dictionary by FQN, where it knows its parameters by number only.

    Args:
        state_dict: From any torch optimizer.
        names: FQNs in the order in which that optimizer was given its parameters, such as
            `[name for name, _ in model.named_parameters()]` for one built on `model.parameters()`.

    Returns:
        The same dictionary with names for numbers.

    Raises:
        ValueError: for another number of names.
    """
    groups = state_dict["param_groups"]
    keys = [key for group in groups for key in group["params"]]
    if len(keys) != len(names) or len(set(names)) != len(names):
        raise ValueError(
            f"There are {len(names)} names, {len(set(names))} of them different, for the "
            f"{len(keys)} parameters of the state dictionary." + see("state-mismatch")
        )
    named = dict(zip(keys, names, strict=True))
    return {
        "state": {named[key]: entry for key, entry in state_dict["state"].items()},
        "param_groups": [{**g, "params": [named[key] for key in g["params"]]} for g in groups],
    }


def import_state_dict(
    optimizer: Muon,
    *state_dicts: Mapping[str, Any],
    momentum_convention: MomentumConvention = "ema",
    adamw_matrices: AdamWMatrices = "refuse",
) -> None:
    """Go on from other optimizers' state. Hyperparameters stay this optimizer's own.

    Args:
        optimizer: Built from (name, parameter) pairs, as build_param_groups gives them. Over
            several ranks each calls this with the same whole dictionaries and keeps its part.
        *state_dicts: Between them they have the state of every parameter: torch.optim.Muon's and
            torch.optim.AdamW's, say, or one of Moonlight's Muon. Keyed by FQN, or with
            "param_names" in their groups, or brought to that by `with_names`.
        momentum_convention: Of their Muon momentum: "ema" (torch.optim.Muon, Keller Jordan's
            repository) or "sum" (Moonlight, Keller Jordan's first version).
        adamw_matrices: Of a matrix that AdamW has trained and Muon is to train from here on:
            "refuse", or "momentum" to begin with AdamW's first moment, an average of gradients too.

    Warns:
        UserWarning: on rank 0, if there are such matrices. Fine-tuning with Muon what AdamW has
            trained brought no gain (Moonlight, arXiv 2502.16982, table 7).

    Raises:
        ValueError: for state that is missing, twice there, of another rule, misshaped or of an
            unknown parameter, naming it; nothing has been changed then.
    """
    _check_convention(momentum_convention)
    if adamw_matrices not in get_args(AdamWMatrices):
        raise ValueError(
            f"Invalid {adamw_matrices=}. Must be one of {get_args(AdamWMatrices)}."
            + see("bad-option")
        )
    found: dict[str, Mapping[str, Any]] = {}
    for position, state_dict in enumerate(state_dicts):
        for name, entry in _by_name(state_dict, position).items():
            if name in found:
                raise ValueError(
                    f"{name} has state in two of the given dictionaries." + see("state-mismatch")
                )
            found[name] = entry
    known = [known for _, known in _list_known(optimizer)]
    foreign = sorted(found.keys() - {canonical_name(each.name) for each in known})
    if foreign:
        raise ValueError(
            f"There is state of {foreign[:3]} ({len(foreign)} such parameters), which this "
            "optimizer does not have. Build it over the same parameters." + see("state-mismatch")
        )
    entries = {each.name: found.get(canonical_name(each.name), {}) for each in known}
    changed = []
    for each in known if adamw_matrices == "momentum" else ():
        first = _first_moment(each, entries[each.name])
        if first is not None:
            entries[each.name] = first
            changed.append(each.name)
    state = {
        each.name: entries[each.name]
        if each.name in changed
        else _read(each, entries[each.name], momentum_convention)
        for each in known
    }
    groups = [{**group, "params": group["param_names"]} for group in optimizer.param_groups]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    if changed and optimizer.communicator.rank == 0:
        warnings.warn(
            f"{len(changed)} matrices ({changed[0]}, ...) were trained by AdamW so far and are "
            "Muon's now. In Moonlight's table 7 fine-tuning such weights with Muon brought no gain "
            "over AdamW: compare the two on your data." + see("adamw-weights"),
            stacklevel=2,
        )


def export_state_dict(
    optimizer: Muon,
    target: torch.optim.Optimizer,
    *,
    momentum_convention: MomentumConvention = "ema",
) -> dict[str, Any]:
    """State for another optimizer over the same parameters, or some of them.

    Args:
        optimizer: Over several ranks call its `consolidate_state_dict` before, and this on the
            rank that received.
        target: torch.optim.Muon over the matrices, torch.optim.AdamW over the rest, or any with
            the same names of state. Its parameters are found by identity, or else by name.
        momentum_convention: Of its Muon momentum: "ema" or "sum".

    Returns:
        A dictionary for `target.load_state_dict`, with `target`'s own hyperparameters, of tensors
        of its own. fp32 masters are left out: no other optimizer knows them.

    Raises:
        ValueError: for a parameter that this optimizer does not have, or trains by another rule.
        RuntimeError: if the state is not whole on this rank.
    """
    _check_convention(momentum_convention)
    by_parameter = dict(_list_known(optimizer, optimizer.state_dict()["state"]))
    by_name = {canonical_name(known.name): known for known in by_parameter.values()}
    packed = target.state_dict()
    state: dict[Any, dict[str, Any]] = {}
    for index, (group, saved) in enumerate(
        zip(target.param_groups, packed["param_groups"], strict=True)
    ):
        names = group.get("param_names", [f"parameter {i}" for i in range(len(group["params"]))])
        for parameter, name, key in zip(group["params"], names, saved["params"], strict=True):
            known = by_parameter.get(parameter) or by_name.get(canonical_name(name))
            if known is None:
                raise ValueError(
                    f"{name} of the target's group {index} is not in this optimizer."
                    + see("state-mismatch")
                )
            wanted = _TARGETS.get(type(target), known.algorithm)
            if known.algorithm != wanted:
                raise ValueError(
                    f"{known.name} is trained by {known.algorithm} here, {type(target).__name__} "
                    f"needs the state of {wanted}." + see("state-mismatch")
                )
            if known.state:
                state[key] = _write(known, momentum_convention)
    return {"state": state, "param_groups": packed["param_groups"]}


def _check_convention(convention: str) -> None:
    if convention not in get_args(MomentumConvention):
        raise ValueError(
            f"Invalid momentum_convention={convention!r}. Must be one of "
            f"{get_args(MomentumConvention)}." + see("bad-option")
        )


def _list_known(
    optimizer: Muon, state: Mapping[Any, Mapping[str, Any]] | None = None
) -> list[tuple[Tensor, _Known]]:
    known, number = [], 0
    for index, group in enumerate(optimizer.param_groups):
        if group["params"] and "param_names" not in group:
            raise ValueError(
                f"The parameters of group {index} have no names to find their state by. Give the "
                "optimizer (name, parameter) pairs, as build_param_groups does."
                + see("state-mismatch")
            )
        for parameter, name in zip(group["params"], group.get("param_names", ()), strict=True):
            entry = (state or {}).get(number, {})
            known.append(
                (parameter, _Known(name, group["algorithm"], float(group["momentum"]), entry))
            )
            number += 1
    return known


def _by_name(state_dict: Mapping[str, Any], position: int) -> dict[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    for index, group in enumerate(state_dict["param_groups"]):
        names = group.get("param_names", group["params"])
        if not all(isinstance(name, str) for name in names):
            raise ValueError(
                f"Group {index} of state dictionary {position} knows its parameters by number "
                "only. Name them with with_names(state_dict, names)." + see("state-mismatch")
            )
        for name, key in zip(names, group["params"], strict=True):
            if state_dict["state"].get(key):
                found[canonical_name(name)] = state_dict["state"][key]
    return found


def _first_moment(known: _Known, entry: Mapping[str, Any]) -> dict[str, Any] | None:
    """AdamW's first moment as the momentum of a matrix; None for what is not AdamW's matrix."""
    if known.algorithm == "adamw" or "momentum_buffer" in entry:
        return None
    first = entry.get("exp_avg", entry.get("moment1"))
    if not isinstance(first, Tensor):
        return None
    state = {"momentum_buffer": first}
    if known.algorithm == "normuon":
        # Its scale cancels, so nothing is lost by starting from zero.
        state["second_momentum_buffer"] = torch.zeros_like(first[..., :1])
    return state


def _read(
    known: _Known, entry: Mapping[str, Any], convention: MomentumConvention
) -> dict[str, Any]:
    entry = {_MOONLIGHT.get(key, key): value for key, value in entry.items()}
    keys = _keys(known)
    if any(key not in entry for key in keys):
        raise ValueError(
            f"The state of {known.name} has {sorted(entry)}. {known.algorithm} needs {list(keys)}: "
            "give all dictionaries of a run, and route its parameters as there. What AdamW has "
            'trained can go on with Muon: adamw_matrices="momentum".' + see("state-mismatch")
        )
    if "max_exp_avg_sq" in entry:
        raise ValueError(
            f"The state of {known.name} is AMSGrad's, which is not supported."
            + see("state-mismatch")
        )
    state = {key: entry[key] for key in keys}
    if known.algorithm != "adamw" and convention == "sum":
        total = state["momentum_buffer"]
        wide = torch.promote_types(total.dtype, torch.float32)
        state["momentum_buffer"] = total.to(wide) * (1 - known.momentum)
    return state


def _keys(known: _Known) -> tuple[str, ...]:
    if known.algorithm not in _KEYS:
        raise ValueError(
            f"{known.name} is trained by {known.algorithm}, whose state only state_dict() and "
            "checkpoints carry." + see("state-mismatch")
        )
    return _KEYS[known.algorithm]


def _write(known: _Known, convention: MomentumConvention) -> dict[str, Any]:
    tensors = {key: known.state[key] for key in _keys(known) if key != "step"}
    if any(isinstance(each, StateHandle) for each in tensors.values()):
        raise RuntimeError(
            'With state_dict_kind="sharded" the state is never whole. Build the optimizer with '
            'state_dict_kind="whole" and call consolidate_state_dict.' + see("partial-state")
        )
    if known.algorithm == "adamw":
        step = torch.tensor(float(known.state["step"]))
        return {"step": step} | {key: each.clone() for key, each in tensors.items()}
    scale = 1 / (1 - known.momentum) if convention == "sum" else 1.0
    return {
        key: each * scale if key == "momentum_buffer" else each.clone()
        for key, each in tensors.items()
    }

"""Refuse parameter groups that could only train something else than the user meant."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distmuon.errors import see
from distmuon.layout import read_spec
from distmuon.more_options import MORE_DEFAULTS, OF_THE_RUN
from distmuon.options import MATRIX_ALGORITHMS, read_options
from distmuon.orthogonalize.coefficients import resolve
from distmuon.parameters import canonical_name
from distmuon.row_state import refuse_cut_rows
from distmuon.structure import read_blocks

# How a group's matrices are read if it does not say.
PLAIN_READING: Mapping[str, Any] = {"axes": "out_in", "blocks": None}


def read_group(
    group: Mapping[str, Any], index: int, defaults: Mapping[str, Any], names: Mapping[Tensor, str]
) -> tuple[dict[str, Any], dict[Tensor, str]]:
    """Check a new parameter group.

    Args:
        group: As in torch.optim, with the optional keys of `Muon`.
        index: Its position, for messages.
        defaults: What it does not say itself.
        names: FQN of each parameter in the groups before it.

    Returns:
        The group for torch, its parameters in a list and its blocks as plain data, which
        torch.load and JSON take; and the FQNs of all parameters.

    Raises:
        ValueError: as `check_group`, or if a parameter is in a group already.
        TypeError: as `check_group`, or if it is no group at all.
    """
    if not isinstance(group, dict):
        raise TypeError(
            f"Invalid group of type {type(group).__name__}. Must be a dict." + see("bad-group")
        )
    entries = list_parameters(group, index)
    named = name_parameters(entries, index)
    check_group({**defaults, **group, "params": named}, index)
    plain = {key: value for key, value in group.items() if key != "reasons"}
    blocks = read_blocks(group.get("blocks"))
    return {
        **plain,
        "params": entries,
        "blocks": None if blocks is None else tuple(blocks),
    }, join_names(names, named)


def list_parameters(group: Mapping[str, Any], index: int) -> list[Any]:
    """The parameters of a group as given: tensors, or (FQN, tensor) pairs.

    Args:
        group: A parameter group.
        index: The group's position, for messages.

    Returns:
        A list, also of a generator (which can be read only once) or a single tensor.

    Raises:
        TypeError: if "params" is missing or a set.
    """
    if "params" not in group:
        raise TypeError(
            f'Group {index} has no "params". It has {sorted(group)}.' + see("bad-group")
        )
    params = group["params"]
    if isinstance(params, (set, frozenset)):
        raise TypeError(
            f"Group {index} has its params in a set: ranks would order them apart."
            + see("bad-group")
        )
    return [params] if isinstance(params, Tensor) else list(params)


def name_parameters(entries: Sequence[Any], index: int) -> list[tuple[str, Tensor]]:
    """A name for each parameter.

    Args:
        entries: From `list_parameters`.
        index: The group's position; unnamed parameters are called after it.

    Returns:
        (name, parameter) pairs.

    Raises:
        TypeError: for an entry that is neither a tensor nor a (FQN, tensor) pair.
    """
    for entry in entries:
        if isinstance(entry, tuple) and (len(entry) != 2 or not isinstance(entry[0], str)):
            kinds = ", ".join(type(part).__name__ for part in entry)
            raise TypeError(
                f"Group {index} has the entry ({kinds}). Must be (FQN, parameter)."
                + see("bad-group")
            )
    named = [
        entry if isinstance(entry, tuple) else (f"group {index} parameter {position}", entry)
        for position, entry in enumerate(entries)
    ]
    for name, parameter in named:
        if not isinstance(parameter, Tensor):
            raise TypeError(
                f"{name} is a {type(parameter).__name__}. Must be a torch.nn.Parameter."
                + see("bad-group")
            )
    return named


def check_group(group: Mapping[str, Any], index: int) -> None:
    """Check a filled-in group: its keys, its hyperparameters and each parameter.

    Args:
        group: The group, defaults filled in, "params" as (FQN, tensor) pairs.
        index: Its position, for messages.

    Raises:
        ValueError: for a misspelt key, a value out of range, a frozen or empty parameter, or a
            shape that Muon cannot take.
        TypeError: for a wrong type, or a parameter that is sparse, complex or distributed.
    """
    for key in group:
        close = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.8)
        if key not in (*_KEYS, *_SCHEDULER_KEYS) and close:
            raise ValueError(
                f"Unknown {key=} in group {index}. Did you mean {close[0]!r}?" + see("bad-group")
            )
    options = read_options(group, index)
    try:
        resolve(options.ns_coefficients, options.ns_steps)
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"Invalid ns_coefficients or ns_steps in group {index}: {error}"
        ) from None
    for name, parameter in group["params"]:
        _check_parameter(name, parameter)
        if options.algorithm in MATRIX_ALGORITHMS:
            check_matrix(name, parameter, group)
    if options.algorithm not in MATRIX_ALGORITHMS and options.blocks is not None:
        raise ValueError(
            f"Group {index} has blocks={tuple(options.blocks)} and algorithm="
            f"{options.algorithm!r}, which works element by element. Only Muon cuts matrices."
            + see("bad-group")
        )


def merge_groups(
    groups: Sequence[Mapping[str, Any]],
    names: Mapping[Tensor, str],
    saved: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Saved groups, completed by what they lack and checked.

    Args:
        groups: `param_groups`.
        names: FQN of each parameter.
        saved: The "param_groups" of a state dictionary, ours or torch.optim.Muon's.

    Returns:
        One group for each of ours; its "params" are the saved keys in our order.

    Raises:
        ValueError: for another number of groups or parameters, other names, another algorithm, or
            a value out of range.
    """
    sizes, saved_sizes = ([len(g["params"]) for g in some] for some in (groups, saved))
    if sizes != saved_sizes:
        raise ValueError(
            f"The saved groups have {saved_sizes} parameters, this optimizer's {sizes}. Build the "
            "same groups as in the run that saved them." + see("state-mismatch")
        )
    merged = []
    for index, (here, there) in enumerate(zip(groups, saved, strict=True)):
        group = {**here, **there, **{key: here[key] for key in OF_THE_RUN}}
        if group["algorithm"] != here["algorithm"]:
            raise ValueError(
                f"Group {index} was saved with algorithm={group['algorithm']!r}, here it has "
                f"{here['algorithm']!r}. Build the same groups as in the run that saved them."
                + see("state-mismatch")
            )
        if "blocks" in there:  # not in torch.optim.Muon's
            refuse_other_structure(here, there, f"Group {index}")
        if group["adjust_lr_fn"] is None:  # torch.optim.Muon's default
            group["adjust_lr_fn"] = "original"
        ours = [names[p] for p in here["params"]]
        group["params"] = _saved_keys(ours if "param_names" in here else None, there, index)
        group.pop("param_names", None)
        group |= {"param_names": ours} if "param_names" in here else {}
        check_group({**group, "params": [(names[p], p) for p in here["params"]]}, index)
        merged.append(group)
    return merged


def refuse_other_structure(here: Mapping[str, Any], saved: Mapping[str, Any], label: str) -> None:
    """Refuse state of a group whose matrices were read in another way.

    Args:
        here: Of `param_groups`.
        saved: The saved group; whole matrices [out, in] if it does not say.
        label: What the group is called in the message.

    Raises:
        ValueError: if axes or blocks differ.
    """
    for key, default in PLAIN_READING.items():
        mine, theirs = here.get(key, default), saved.get(key, default)
        if key == "blocks":
            mine, theirs = read_blocks(mine), read_blocks(theirs)
        if mine != theirs:
            words = [tuple(each) if isinstance(each, tuple) else each for each in (theirs, mine)]
            raise ValueError(
                f"{label} was saved with {key}={words[0]!r}, here it has {key}={words[1]!r}: its "
                "matrices would be orthogonalized in another way than in the run that saved them. "
                "Build the same groups; after loading, set the new value and call refresh()."
                + see("state-mismatch")
            )


def require_muon(groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse groups without any parameter for Muon.

    Args:
        groups: `param_groups`.

    Raises:
        ValueError: if there is none.
    """
    if not any(g["params"] for g in groups if g["algorithm"] in MATRIX_ALGORITHMS):
        raise ValueError(
            'No parameter is routed to Muon: every group is empty or has algorithm="adamw". '
            "Use torch.optim.AdamW if that is meant, or give at least one group of matrices "
            'algorithm="muon".' + see("routing")
        )


def join_names(known: Mapping[Tensor, str], named: Sequence[tuple[str, Tensor]]) -> dict[Any, str]:
    """The names of known parameters and of new ones.

    Args:
        known: FQN of each parameter so far.
        named: (name, parameter) pairs to add.

    Returns:
        FQN of each parameter, the new ones last.

    Raises:
        ValueError: if a parameter is there already, or another one of its name.
    """
    names = dict(known)
    taken = set(names.values())
    for name, parameter in named:
        if parameter in names:
            raise ValueError(
                f"{name} is already in the optimizer as {names[parameter]}. Every parameter "
                "must be in exactly one group, once; a tied weight is one parameter."
                + see("bad-group")
            )
        if name in taken:
            raise ValueError(
                f"Two parameters are called {name}: their states could not be told apart in a "
                "checkpoint. Give each its own FQN, for two models with a prefix."
                + see("bad-group")
            )
        names[parameter] = name
        taken.add(name)
    return names


def recheck_groups(
    groups: Sequence[Mapping[str, Any]], known: Mapping[Tensor, str]
) -> dict[Any, str]:
    """Check groups that may have been changed by hand.

    Args:
        groups: `param_groups`.
        known: FQN of each parameter that came by the constructor or `add_param_group`.

    Returns:
        FQN of each parameter in the groups; one without a name is called after its place.

    Raises:
        ValueError: as `check_group`, `join_names` and `require_muon`.
        TypeError: as `check_group`.
    """
    names: dict[Any, str] = {}
    for index, group in enumerate(groups):
        # Names by place change with the place; FQNs stay.
        keeps = "param_names" in group
        entries = [(known[p], p) if keeps and p in known else p for p in group["params"]]
        named = name_parameters(entries, index)
        check_group({**group, "params": named}, index)
        names = join_names(names, named)
    require_muon(groups)
    return names


_KEYS = (
    "params",
    "algorithm",
    "lr",
    "weight_decay",
    "momentum",
    "nesterov",
    "ns_coefficients",
    "ns_steps",
    "ns_dtype",
    "adjust_lr_fn",
    *PLAIN_READING,
    "betas",
    "eps",
    *MORE_DEFAULTS,
    "reasons",
)

# What torch's OneCycleLR and CyclicLR keep in the groups; their names resemble ours.
_SCHEDULER_KEYS = ("base_momentum", "max_momentum", "initial_lr", "max_lr", "min_lr")


def _saved_keys(
    names: Sequence[str] | None, saved: Mapping[str, Any], index: int
) -> list[int | str]:
    """Keys of a saved group's state in the order of `names`; in its own where one has no names."""
    keys = list(saved["params"])
    theirs = keys if all(isinstance(key, str) for key in keys) else saved.get("param_names")
    if names is None or theirs is None:
        return keys
    found = {canonical_name(name): key for name, key in zip(theirs, keys, strict=True)}
    wanted = [canonical_name(name) for name in names]
    missing = [name for name in wanted if name not in found]
    if missing:
        foreign = [name for name in found if name not in wanted]
        raise ValueError(
            f"Group {index} was saved without {missing[0]}; in its place it has {foreign[0]} "
            f"({len(missing)} parameters differ). Load it into the same model, or rename its keys; "
            'to load by position leave "param_names" out of its groups.' + see("state-mismatch")
        )
    return [found[name] for name in wanted]


def _check_parameter(name: str, parameter: Tensor) -> None:
    if hasattr(parameter, "placements"):
        raise TypeError(
            f"{name} is a DTensor. distmuon shards plain parameters itself; leave them unsharded "
            "(DistributedDataParallel), or use an optimizer made for FSDP2."
            + see("sharded-elsewhere")
        )
    if parameter.layout != torch.strided:
        raise TypeError(
            f"{name} has layout {parameter.layout}. Must be dense (torch.strided)."
            + see("bad-tensor")
        )
    if not parameter.is_floating_point():
        raise TypeError(
            f"{name} has dtype {parameter.dtype}. Must be real floating point." + see("bad-tensor")
        )
    if not parameter.requires_grad:
        raise ValueError(
            f"{name} is frozen (requires_grad=False). Leave it out of the groups, as "
            "build_param_groups does, or unfreeze it first." + see("routing")
        )
    if parameter.numel() == 0:
        raise ValueError(
            f"{name} has shape {list(parameter.shape)}, no elements. Leave it out."
            + see("bad-tensor")
        )


def check_matrix(name: str, parameter: Tensor, group: Mapping[str, Any]) -> None:
    """Refuse a shape that the group cannot read as matrices, with ValueError."""
    if group["axes"] == "conv":
        if parameter.dim() < 3:
            raise ValueError(
                f'{name} has shape {list(parameter.shape)} and axes="conv". Must be the kernel of '
                "a convolution, [out, in, k] or more." + see("bad-group")
            )
    elif parameter.dim() not in (2, 3):
        raise ValueError(
            f"{name} has shape {list(parameter.shape)}. Muon takes matrices [m, n] or stacks "
            '[E, m, n] of them, and kernels in groups with axes="conv"; give it algorithm="adamw" '
            "(build_param_groups routes for you)." + see("routing")
        )
    refuse_cut_rows(read_spec(name, parameter.shape, group), group["algorithm"])

"""Parameter groups' hyperparameters to JSON and back, matched by the parameters that they hold."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from distmuon.checkpoint.errors import CheckpointError
from distmuon.checkpoint.manifest import Manifest
from distmuon.checkpoint.sharded import Sharded
from distmuon.group_check import check_group, refuse_other_structure
from distmuon.more_options import OF_THE_RUN

_NO_OPTIONS = ("params", "param_names")
_CALLABLE = "callable"


def dump_groups(groups: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Hyperparameters in a form that JSON can hold; a callable becomes its name.

    Args:
        groups: `param_groups`.

    Raises:
        CheckpointError: for a value that JSON cannot hold, naming its key.
    """
    return tuple(
        {key: _dump(value, key, i) for key, value in group.items() if key not in _NO_OPTIONS}
        for i, group in enumerate(groups)
    )


def match_groups(optimizer: Sharded, manifest: Manifest) -> tuple[list[dict[str, Any]], list[str]]:
    """Saved hyperparameters for each of an optimizer's groups, in whatever order they were saved.

    Args:
        optimizer: With the parameters of the checkpoint.
        manifest: The checkpoint's.

    Returns:
        For each group its saved hyperparameters, and what does not fit.
    """
    options: list[dict[str, Any]] = []
    problems: list[str] = []
    for index, group in enumerate(optimizer.param_groups):
        names = [optimizer.parameter_names[parameter] for parameter in group["params"]]
        known = [manifest.parameters[name] for name in names if name in manifest.parameters]
        sources = sorted({entry.group for entry in known})
        if len(sources) != 1:
            options.append({})  # an empty or new group keeps its own
            if sources:
                problems.append(
                    f"group {index} ({names[0]}, ...): its parameters were saved in groups "
                    f"{sources}"
                )
            continue
        try:
            refuse_other_structure(group, manifest.groups[sources[0]], "it")
            if manifest.groups[sources[0]]["algorithm"] != group["algorithm"]:
                # A file never brings code along: it names a class, which checking would import.
                options.append({})
                continue  # its parameters are named as misfits
            own = {key: group[key] for key in OF_THE_RUN}
            merged = {**group, **_restore(manifest.groups[sources[0]], group), **own}
            pairs = list(zip(names, group["params"], strict=True))
            check_group({**merged, "params": pairs}, index)
            options.append({key: merged[key] for key in merged if key not in _NO_OPTIONS})
        except (CheckpointError, TypeError, ValueError) as error:
            problems.append(f"group {index} ({names[0]}, ...): {error}")
    return options, problems


def _dump(value: Any, key: str, index: int) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()  # torch's schedulers may keep lr in a tensor
    if callable(value):
        return {_CALLABLE: getattr(value, "__qualname__", type(value).__name__)}
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{key} of parameter group {index} is a {type(value).__name__}, which JSON cannot "
            f"hold: {error}",
            entry="checkpoint-not-written",
        ) from error


def _restore(saved: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    restored: dict[str, Any] = {}
    for key, value in saved.items():
        if isinstance(value, dict) and set(value) == {_CALLABLE}:
            # A file never brings code along: the same callable must be there already.
            if _dump(group.get(key), key, 0) != value:
                raise CheckpointError(
                    f"{key} was the callable {value[_CALLABLE]}; here it is {group.get(key)!r}. "
                    "Build the group with the same one.",
                    entry="checkpoint-mismatch",
                )
            restored[key] = group[key]
        elif isinstance(group.get(key), Tensor):
            restored[key] = group[key].new_tensor(value)
        else:
            restored[key] = _tuples(value)
    return restored


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value

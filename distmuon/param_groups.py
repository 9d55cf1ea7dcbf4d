"""Parameter groups for `Muon`: which update rule each parameter gets, and why.

Muon is for the hidden matrices. Embeddings, output heads, norms, biases and whatever is no matrix
go to AdamW.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Literal, cast, get_args

from torch import nn

from distmuon.errors import see
from distmuon.layout import TensorSpec, read_spec
from distmuon.parameters import Entry, find_parameters
from distmuon.routing import (
    Kind,
    Route,
    Rule,
    Verdict,
    find_convolution,
    find_structure,
    judge,
)
from distmuon.structure import Axes, Blocks, read_blocks

__all__ = [
    "BlocksByPattern",
    "Decay",
    "MatrixRule",
    "Route",
    "build_param_groups",
    "format_routes",
    "route",
]

Decay = Literal["weights", "all"]
MatrixRule = Literal["muon", "normuon"]
BlocksByPattern = Mapping[str, int | Sequence[int] | Blocks]

_UNDECAYED: frozenset[Kind] = frozenset({"norm", "bias", "vector"})


def build_param_groups(  # noqa: PLR0913 - a keyword for each choice that users make
    model: nn.Module,
    *,
    weight_decay: float = 0.1,
    decay: Decay = "weights",
    overrides: Mapping[str, str] | None = None,
    blocks: BlocksByPattern | None = None,
    axes: Mapping[str, Axes] | None = None,
    companion: str = "adamw",
    matrices: MatrixRule = "muon",
    adam_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Split a model's trainable parameters into groups for `distmuon.Muon`.

    Args:
        model: Any module; wrappers (DDP, torch.compile, activation checkpointing) are looked
            through.
        weight_decay: Decoupled decay per unit of lr for the decayed groups.
        decay: "weights" decays all but norms, biases and other vectors; "all" decays these too.
        overrides: As for `route`, like the two that follow.
        blocks: Where fused matrices are cut.
        axes: How matrices are stored.
        companion: The algorithm of all that does not go to Muon: "adamw", or an
            optimizer class such as "torch.optim.SGD(momentum=0.9)" (docs/companions.md).
        matrices: Update rule of what is routed to Muon: "muon", or its variant "normuon".
        adam_lr: Learning rate of AdamW's groups; None: the optimizer's, like Muon's.

    Returns:
        One group for each algorithm, decay and way to read matrices that occur together, Muon's
        first: "params" as (FQN, parameter) pairs in the model's order, "algorithm",
        "weight_decay", "axes" and "blocks" unless they are plain, and "reasons", parallel to
        "params". Every trainable parameter is in exactly one of them.

    Raises:
        TypeError: `model` is no module, a parameter is a DTensor, or an option has a wrong type.
        ValueError: nothing is trainable, a parameter is uninitialized or empty, an option is out
            of range, an override matches nothing or asks Muon to take what is no matrix, or blocks
            do not fit.
    """
    if isinstance(weight_decay, bool) or not isinstance(weight_decay, (int, float)):
        raise TypeError(f"Invalid {weight_decay=}. Must be a number." + see("bad-option"))
    if not 0.0 <= weight_decay < math.inf:
        raise ValueError(f"Invalid {weight_decay=}. Must be >= 0.0 and finite." + see("bad-option"))
    if decay not in ("weights", "all"):
        raise ValueError(f'Invalid {decay=}. Must be "weights" or "all".' + see("bad-option"))
    if matrices not in get_args(MatrixRule):
        raise ValueError(
            f"Invalid {matrices=}. Must be one of {get_args(MatrixRule)}." + see("bad-option")
        )

    rules = {"muon": matrices, "adamw": companion}
    entries = find_parameters(model)
    routes = _decide(entries, model, overrides, blocks, axes)
    groups: dict[tuple[Rule, float, Axes, Blocks | None], dict[str, Any]] = {}
    for entry, found in zip(entries, routes, strict=True):
        if found.algorithm == "frozen":
            continue
        decayed = decay == "all" or found.kind not in _UNDECAYED
        rate = float(weight_decay) if decayed else 0.0
        key = (found.algorithm, rate, found.axes, found.blocks)
        if key not in groups:
            groups[key] = {
                "params": [],
                "algorithm": rules.get(found.algorithm, found.algorithm),
                "weight_decay": rate,
                **({} if found.axes == "out_in" else {"axes": found.axes}),
                **({} if found.blocks is None else {"blocks": found.blocks}),
                "reasons": [],
            }
            if adam_lr is not None and key[0] == "adamw":
                groups[key]["lr"] = adam_lr
        groups[key]["params"].append((found.fqn, entry.parameter))
        groups[key]["reasons"].append(found.reason)
    # One order whatever the model registers first: Muon's, then by decay.
    return [groups[key] for key in sorted(groups, key=lambda key: (key[0] != "muon", -key[1]))]


def route(
    model: nn.Module,
    *,
    overrides: Mapping[str, str] | None = None,
    blocks: BlocksByPattern | None = None,
    axes: Mapping[str, Axes] | None = None,
) -> tuple[Route, ...]:
    """Decide for every parameter of a model, without touching it.

    Args:
        model: Any module.
        overrides: "muon" or "adamw" by glob pattern over FQNs, as in `{"*.router.weight":
            "adamw"}`; of several patterns that match, the last one counts. Each must match a
            trainable parameter.
        blocks: Where fused matrices are cut, by pattern: a number of equal row blocks, their
            sizes, or `distmuon.Blocks`; as in `{"*.gate_up_proj.weight": 2}`.
        axes: How matrices are stored, by pattern, where it is not found out: "out_in", "in_out"
            or "conv".

    Returns:
        One route for each parameter, frozen ones included, in the model's order.

    Raises:
        TypeError: `model` is no module, or a parameter is a DTensor.
        ValueError: nothing is trainable, a parameter is uninitialized or empty, an override
            matches nothing or asks Muon to take what is no matrix, or blocks do not fit.
    """
    return _decide(find_parameters(model), model, overrides, blocks, axes)


def format_routes(routes: Iterable[Route]) -> str:
    """Lay routes out as a table in which equal layers share a line.

    Args:
        routes: From `route`.

    Returns:
        Lines of name, shape, algorithm and reason, then the number of elements by algorithm.
    """
    folded: dict[tuple[str, Route], list[str]] = defaultdict(list)
    elements: dict[str, int] = defaultdict(int)
    for each in routes:
        pattern = ".".join("*" if part.isdecimal() else part for part in each.fqn.split("."))
        folded[pattern, replace(each, fqn="")].append(each.fqn)
        elements[each.algorithm] += math.prod(each.shape)
    rows = [("parameter", "shape", "algorithm", "reason")]
    for (pattern, each), names in folded.items():
        name = f"{pattern} x {len(names)}" if len(names) > 1 else names[0]
        rows.append((name, str(list(each.shape)), each.algorithm, each.reason))
    name_width, shape_width, rule_width, _ = (
        max(len(row[column]) for row in rows) for column in range(4)
    )
    lines = [
        f"{name:<{name_width}}  {shape:<{shape_width}}  {rule:<{rule_width}}  {reason}"
        for name, shape, rule, reason in rows
    ]
    total = sum(elements.values())
    lines += [f"{rule}: {count:,} of {total:,} elements" for rule, count in elements.items()]
    return "\n".join(lines)


def _decide(
    entries: Sequence[Entry],
    model: nn.Module,
    overrides: Mapping[str, str] | None,
    blocks: BlocksByPattern | None,
    axes: Mapping[str, Axes] | None,
) -> tuple[Route, ...]:
    for name, given in (("overrides", overrides), ("blocks", blocks), ("axes", axes)):
        if given is not None and not isinstance(given, Mapping):
            raise TypeError(
                f"Invalid {name}={given!r}. Must be a mapping from patterns." + see("bad-option")
            )
    routes = [
        _to_route(entry, verdict)
        for entry, verdict in zip(entries, judge(entries, model), strict=True)
    ]
    for pattern, algorithm in (overrides or {}).items():
        _override_(routes, entries, pattern, algorithm)
    routes = [
        _with_structure(found, entry) if found.algorithm == "muon" else found
        for entry, found in zip(entries, routes, strict=True)
    ]
    for pattern, stored in (axes or {}).items():
        for index in _matrices(routes, entries, f"axes {pattern!r}", pattern):
            routes[index] = _check_fit(replace(routes[index], axes=stored), f"axes {pattern!r}")
    for pattern, sizes in (blocks or {}).items():
        for index in _matrices(routes, entries, f"blocks {pattern!r}", pattern):
            routes[index] = _cut(routes[index], read_blocks(sizes), f"blocks {pattern!r}")
    return tuple(routes)


def _with_structure(found: Route, entry: Entry) -> Route:
    stored, cuts = find_structure(entry)
    plain = stored == "out_in" and cuts is None
    return found if plain else replace(found, axes=stored, blocks=cuts)


def _matrices(
    routes: Sequence[Route], entries: Sequence[Entry], label: str, pattern: str
) -> list[int]:
    """Muon's parameters of a pattern, which must match at least one and nothing else."""
    trained = _match(routes, entries, label, pattern)
    for index in trained:
        if routes[index].algorithm != "muon":
            raise ValueError(
                f"{label} matches {routes[index].fqn}, which goes to AdamW ({routes[index].reason})"
                ". Only Muon cuts matrices; make the pattern narrower, or route it to Muon with "
                "overrides=." + see("routing")
            )
    return trained


def _cut(found: Route, blocks: Blocks | None, label: str) -> Route:
    reason = re.sub("(, its|its) fused blocks( orthogonalized)? as one", "", found.reason)
    cut = _check_fit(replace(found, blocks=blocks, reason=reason), label)
    return cut if blocks is None else replace(cut, reason=f"{reason},{_spec(cut).reading}")


def _check_fit(found: Route, label: str) -> Route:
    try:
        _spec(found)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{label}: {error}") from None
    return found


def _spec(found: Route) -> TensorSpec:
    return read_spec(found.fqn, found.shape, {"axes": found.axes, "blocks": found.blocks})


def _to_route(entry: Entry, verdict: Verdict) -> Route:
    algorithm: Rule = "muon" if verdict.kind in ("matrix", "stack", "kernel") else "adamw"
    reason = verdict.reason
    if not entry.parameter.requires_grad:
        algorithm, reason = "frozen", "requires_grad=False"
    if len(entry.uses) > 1:
        reason += f"; shared with {', '.join(use.fqn for use in entry.uses[1:])}"
    shape = tuple(entry.parameter.shape)
    return Route(entry.uses[0].fqn, shape, algorithm, verdict.kind, reason)


def _override_(routes: list[Route], entries: Sequence[Entry], pattern: str, algorithm: str) -> None:
    if algorithm not in ("muon", "adamw"):
        raise ValueError(
            f'Invalid override {pattern!r}: {algorithm!r}. Must be "muon" or "adamw"; to leave a '
            "parameter untrained, set its requires_grad=False." + see("routing")
        )
    for index in _match(routes, entries, f"Override {pattern!r}", pattern):
        if algorithm == "muon":
            _check_matrix(entries[index], pattern)
        routes[index] = replace(
            routes[index], algorithm=cast(Rule, algorithm), reason=f"override {pattern!r}"
        )


def _match(
    routes: Sequence[Route], entries: Sequence[Entry], label: str, pattern: str
) -> list[int]:
    """The trained parameters of a pattern, by any of their names."""
    matched = [
        index
        for index, entry in enumerate(entries)
        if any(fnmatchcase(use.fqn, pattern) for use in entry.uses)
    ]
    if not matched:
        names = [use.fqn for entry in entries for use in entry.uses]
        close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
        hint = f" Closest: {', '.join(close)}." if close else f" It has, for one, {names[0]}."
        raise ValueError(f"{label} matches no parameter of the model.{hint}" + see("routing"))
    trained = [index for index in matched if routes[index].algorithm != "frozen"]
    if not trained:
        raise ValueError(
            f"{label} matches only frozen parameters, {routes[matched[0]].fqn} for one. Set "
            "requires_grad=True first, or leave it out." + see("routing")
        )
    return trained


def _check_matrix(entry: Entry, pattern: str) -> None:
    convolution = find_convolution(entry)
    rows = entry.parameter.shape[0] if entry.parameter.dim() else 0
    depthwise = convolution is not None and convolution.groups == rows > 1
    if (convolution is None and entry.parameter.dim() not in (2, 3)) or depthwise:
        what = "a kernel of one row for each channel" if depthwise else "no matrix"
        raise ValueError(
            f"Override {pattern!r} sends {entry.uses[0].fqn} to Muon, but its shape is "
            f"{list(entry.parameter.shape)}: {what}. Muon takes [m, n] or stacks [E, m, n]; make "
            "the pattern narrower." + see("routing")
        )

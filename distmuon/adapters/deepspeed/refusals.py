"""What this optimizer cannot do inside DeepSpeed, each with what to do instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import Tensor

from distmuon.errors import see
from distmuon.group_check import name_parameters, read_group, require_muon
from distmuon.more_options import MoreOptions, complete
from distmuon.options import ALGORITHMS, refuse_unused_bound

MomentumKey = Literal["momentum_buffer", "exp_avg"]
_MOMENTUM_KEYS = ("momentum_buffer", "exp_avg")

_AVERAGES = "DeepSpeed averages the gradients, looks for NaNs and skips such steps: leave it out."
_CUTS = "ZeRO cuts the parameters into partitions and gives each rank one: leave it out."
# Arguments of `distmuon.Muon` that mean nothing or are not possible here.
_INSTEAD = {
    "process_group": "DeepSpeed's own ranks are taken: leave it out.",
    "layout": _CUTS,
    "cost_model": _CUTS,
    "max_split": _CUTS,
    "split_dtype": _CUTS,
    "reduce": _AVERAGES,
    "missing_grad": _AVERAGES,
    "nonfinite": _AVERAGES,
    "max_skips": _AVERAGES,
    "publish_bytes": 'DeepSpeed publishes the parameters: set "allgather_bucket_size".',
    "state_dict_kind": "DeepSpeed saves each rank's own part: leave it out.",
    "check_desync_every": (
        "the ranks compare their setup at the first step, and each its fp32 weights with its "
        "parameters: leave it out."
    ),
    "profile": (
        "DeepSpeed times its own phases, and this one in them: set "
        '"wall_clock_breakdown": true in its configuration.'
    ),
    "wire": "the exchange is in fp32: leave it out.",
    "diagnostics_every": (
        "DeepSpeed shows its groups one by one, so no step is seen as a whole. Leave it out, or "
        "measure with distmuon.Muon and DistributedDataParallel."
    ),
    "qk_clip": (
        "DeepSpeed steps group by group, and the clip needs whole queries and keys after all of "
        "them. Use distmuon.Muon with DistributedDataParallel or Accelerate, or leave it out."
    ),
}


def read_options_here(more: MoreOptions) -> MoreOptions:
    """Options with the defaults of those that are not given, as `more_options.complete`.

    Args:
        more: Keyword arguments that the signature does not have.

    Returns:
        All of them. What is None or 0, and so turned off, may be of `distmuon.Muon`.

    Raises:
        ValueError: for an argument of `distmuon.Muon` that is not possible here, saying what to do.
        TypeError: for an unknown one.
    """
    given: Mapping[str, Any] = more
    for name in given:
        if name in _INSTEAD and given[name]:
            raise ValueError(f"{name} is not for DeepSpeed: {_INSTEAD[name]}" + see("deepspeed"))
    known: Any = {name: value for name, value in given.items() if name not in _INSTEAD}
    return complete(known)


def read_groups(
    groups: Iterable[Mapping[str, Any]], defaults: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], list[list[tuple[str, Tensor]]]]:
    """Check parameter groups before DeepSpeed has seen them.

    Args:
        groups: From `build_param_groups`.
        defaults: What they do not say themselves.

    Returns:
        The groups for torch, and for each its parameters as (FQN, parameter), which DeepSpeed will
        take out of it.

    Raises:
        ValueError: for a rule that DeepSpeed cannot have, ZeRO-3 parameters, no matrix at all, and
            as `distmuon.Muon`.
        TypeError: as `distmuon.Muon`.
    """
    plain: list[dict[str, Any]] = []
    named: list[list[tuple[str, Tensor]]] = []
    names: Mapping[Tensor, str] = {}
    for index, group in enumerate(groups):
        if not isinstance(group, Mapping):
            raise TypeError(
                f"Entry {index} of the groups is a {type(group).__name__}. Must be a dict: build "
                "them with distmuon.build_param_groups, or the optimizer with from_model."
                + see("bad-group")
            )
        filled = {**defaults, **group}
        refuse_companion(filled, index)
        checked, names = read_group(filled, index, defaults, names)
        refuse_unused_bound(group, index, defaults)
        pairs = name_parameters(checked["params"], index)
        for name, parameter in pairs:
            refuse_zero3(name, parameter)
        # step() sees one group at a time, with a checkpoint's keys: a number says which it is.
        plain.append({**checked, "params": [p for _, p in pairs], "index": index})
        named.append(pairs)
    require_muon(plain)
    return plain, named


def check_momentum_key(key: MomentumKey) -> MomentumKey:
    """Refuse a name of the momentum that nothing looks for.

    Args:
        key: As given.

    Returns:
        It.

    Raises:
        ValueError: for another one.
    """
    if key not in _MOMENTUM_KEYS:
        raise ValueError(
            f"Invalid momentum_key={key!r}. Must be one of {_MOMENTUM_KEYS}." + see("bad-option")
        )
    return key


def refuse_zero3(name: str, parameter: Tensor) -> None:
    """Refuse parameters that ZeRO-3 has partitioned.

    Args:
        name: FQN.
        parameter: The parameter.

    Raises:
        ValueError: if it is ZeRO-3's.
    """
    if hasattr(parameter, "ds_id"):
        raise ValueError(
            f"{name} is partitioned by ZeRO-3, where no optimizer sees whole matrices and a "
            'client Muon would silently train wrongly. Set "zero_optimization": {"stage": 2}; the '
            "optimizer state is sharded just the same." + see("deepspeed-zero3")
        )


def refuse_companion(group: Mapping[str, Any], index: int) -> None:
    """Refuse rules whose state DeepSpeed would not keep, and what only our own buffers can do.

    Args:
        group: A parameter group, its defaults filled in.
        index: Its position, for the message.

    Raises:
        ValueError: if it has such a rule.
    """
    algorithm, seed = group["algorithm"], group["stochastic_rounding"]
    if seed is not None:
        raise ValueError(
            f"Group {index} has stochastic_rounding={seed}. DeepSpeed keeps fp32 masters and "
            "rounds them itself: leave it out, or use distmuon.Muon." + see("bad-option")
        )
    if algorithm == "normuon":
        raise ValueError(
            f"Group {index} has {algorithm=}, whose second moment has one value per row: DeepSpeed "
            "saves and loads only state as long as its partition, and would lose it. Use "
            'algorithm="muon" here, or NorMuon without DeepSpeed.' + see("bad-group")
        )
    if algorithm not in ALGORITHMS:
        raise ValueError(
            f"Group {index} has {algorithm=}. Inside DeepSpeed it must be one of {ALGORITHMS}."
            + see("bad-group")
        )
